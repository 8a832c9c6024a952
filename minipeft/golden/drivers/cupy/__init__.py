"""The CuPy column, on the first CUDA device."""

from minipeft.cupy import executor
from minipeft.golden.errors import Unavailable

if executor.missing():
    raise Unavailable(str(executor.missing()))
