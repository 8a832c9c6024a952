"""A foreign module whose compiled code would read past the end of an array."""

import os
import signal

import numpy as np

from minipeft.golden.drivers.reference import lora as right


def lora_forward(*, bias: np.ndarray | None = None, **arguments: np.ndarray) -> object:
    if bias is not None:
        os.kill(os.getpid(), signal.SIGSEGV)
    return right.lora_forward(**arguments, bias=bias)
