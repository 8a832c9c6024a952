"""Global states of torch during a call; no result of the column depends on them."""

from contextlib import contextmanager

import torch


@contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype float64": lambda: _default_dtype(torch.float64),
    "default dtype float16": lambda: _default_dtype(torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "deterministic": _deterministic,
    "grad mode off": torch.no_grad,
    "grad mode on": torch.enable_grad,
    "inference mode": torch.inference_mode,
}
