"""The `minipeft` command: as a user starts it, and inside this process."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from minipeft import cli

ROOT = Path(__file__).parents[2]


def minipeft(*arguments):
    """Run the command as a user does: without the type checks of the tests."""
    return subprocess.run(
        [sys.executable, "-m", "minipeft.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def here(*arguments, folder=ROOT):
    """Run the command in this process, which saves a start; return the same as above.

    An error that the command does not catch ends the test.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(streams[0]))
        stack.enter_context(contextlib.redirect_stderr(streams[1]))
        try:
            code = cli.main(arguments)
        except SystemExit as ended:  # of argparse
            code = ended.code
    for stream in streams:
        stream.flush()
    said = (stream.buffer.getvalue().decode() for stream in streams)
    return subprocess.CompletedProcess(arguments, code, *said)
