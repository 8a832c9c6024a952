"""`python -m minipeft`: the `minipeft` command."""

import os
import sys

if sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # `python -m` looks here first: a json.py would be taken for json

from minipeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
