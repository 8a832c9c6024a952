"""The CuPy column, on the first CUDA device."""

from minipeft.cupy.executor import current
from minipeft.errors import InputError
from minipeft.golden.errors import Unavailable

try:
    current()
except InputError as error:
    raise Unavailable(str(error)) from None
