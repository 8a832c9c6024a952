"""A tensor on another device, or at an odd address, never reaches a kernel."""

import pytest
import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.kernels import driver
from minipeft.kernels.checks import Facts
from minipeft.torch import launches, operators
from tests.cuda.test_operators import on_kernels, samples

# What a kernel loads one value at a time, so that it may start at any value.
ONE_AT_A_TIME = {"bias", "indices", "offset", "m_absmax", "v_absmax"}
ONE_AT_A_TIME |= {"m_absmax_out", "v_absmax_out"}


class Aligned:
    """Notes launches, and refuses an address that a vector of the kernel misses."""

    def __init__(self):
        self.launched = []

    def launch(self, kernel, dtype, args, stream):
        self.launched.append(kernel.template)
        free = ONE_AT_A_TIME | ({"y"} if kernel.template == "expand" else set())
        for name, found in zip(kernel.arguments, args, strict=True):
            if isinstance(found, Facts):
                step = found.itemsize if name in free else 16
                assert found.address % step == 0, (kernel.template, name)


def tensors(args, path=()):
    """Yield the place of every tensor in nested arguments."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            yield (*path, i)
        elif isinstance(value, list | tuple):
            yield from tensors(value, (*path, i))


def shifted(args, path):
    """Put one tensor a value later in memory; its contents are the same."""
    args = [list(a) if isinstance(a, list | tuple) else a for a in args]
    *before, last = path
    place = args
    for i in before:
        place = place[i]
    old = place[last].detach()
    room = torch.cat([old.new_zeros(1), old.flatten()])
    place[last] = room[1:].view_as(old)
    return args


def said(call, args):
    """Return the sentence with which a call is refused; None if it is not."""
    try:
        call(*args)
    except InputError as refused:
        return str(refused)
    return None


@pytest.mark.parametrize("name", samples())
def test_no_kernel_gets_an_address_that_its_vectors_miss(name):
    """A view at an odd offset is copied, read value by value, or refused."""
    launcher = Aligned()
    whole = samples()[name]
    with driver.use(launcher):
        operators.LAUNCHES[f"minipeft::{name}"](*whole)
        assert launcher.launched
        for path in tensors(whole):
            found = said(operators.LAUNCHES[f"minipeft::{name}"], shifted(whole, path))
            assert found is None or "past a multiple of 16, where a kernel" in found


def to_meta(args, *path):
    """Move one tensor of nested arguments to another device."""
    *before, last = path
    for i in before:
        args = args[i]
    args[last] = args[last].to("meta")


@pytest.mark.parametrize(
    ("name", "path", "part"),
    [
        ("matmul_4bit", (0,), "x"),
        ("matmul_4bit", (3,), "bias"),
        ("dequantize_nested", (0, 2), "nested_absmax"),
        ("dequantize_nested", (0, 3), "offset"),
        ("adamw_", (2,), "m"),
        ("adamw_8bit_", (2, 1), "the codes of v"),
        ("adamw_8bit_", (3, 0), "absmax of m"),
    ],
)
def test_a_tensor_that_lies_elsewhere_is_refused(monkeypatch, name, path, part):
    monkeypatch.setattr(launches, "GPUS", {"cpu"})  # any other counts as the host
    args = list(samples()[name])
    to_meta(args, *path)
    with pytest.raises(InputError, match=f"^{part} is on device -1, other parts on"):
        on_kernels(name, *args)
