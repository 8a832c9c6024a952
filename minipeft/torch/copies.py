"""Copies of adapters whose tensors lie somewhere else."""

from collections.abc import Callable
from copy import copy

from torch import Tensor, nn

Move = Callable[[Tensor], Tensor]
"""What brings a tensor to where it is wanted."""


def copied(
    module: nn.Module,
    move: Move,
    shared: Callable[[nn.Module], nn.Module] | None = None,
) -> nn.Module:
    """Return a frozen copy with moved tensors; its children are what `shared` says."""
    new = copy(module)
    new._parameters = {
        name: None if p is None else nn.Parameter(move(p.detach()), False)
        for name, p in module._parameters.items()
    }
    new._buffers = {
        name: None if b is None else move(b) for name, b in module._buffers.items()
    }
    children = module._modules.items()
    new._modules = {n: shared(m) if shared and m else m for n, m in children}
    return new


def nbytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's own tensors, without its children's."""
    held = [*module._parameters.values(), *module._buffers.values()]
    return sum(tensor.nbytes for tensor in held if tensor is not None)
