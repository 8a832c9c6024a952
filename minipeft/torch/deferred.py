"""A weight that is computed only when an operation uses it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minipeft.errors import InputError
from minipeft.torch.linear import Form

PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
KINDS = ("is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_nested")
METADATA = frozenset(
    {getattr(Tensor, name).__get__ for name in PROPERTIES + KINDS}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__}
    | {Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size}
)
"""Attributes and methods of a tensor that need none of its values."""

# Code reads `.data` in order to write to it, so reading it is refused.
_DATA = vars(torch._C.TensorBase)["data"].__get__

WRITES = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class Deferred(Tensor):
    """A weight that is computed when an operation uses it.

    Its shape, dtype and device are known before. Writing to it is refused, because the
    written values would be lost.
    """

    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        compute: Callable[[], Tensor],
        shape: tuple[int, ...],
        form: Form,
        requires_grad: bool = False,
    ) -> "Deferred":
        """Remember how to compute the weight."""
        self = Tensor._make_wrapper_subclass(
            cls,
            shape,
            dtype=form.dtype,
            device=form.device,
            requires_grad=requires_grad,
        )
        self.compute = compute
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer from the known facts, or compute the weight and call the function."""
        if function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        if function == _DATA:
            return args[0]
        name = getattr(function, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        written = args[0] if args else (kwargs or {}).get("tensor")  # nn.init's name
        if isinstance(written, cls) and (writes or name in WRITES):
            raise InputError(
                "this weight is computed from what is stored, and what is written to "
                "it would be lost; write to what is stored (`layer.base.weight`)."
            )
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute the weight and call the operator."""
        now = tree_map_only(cls, lambda weight: weight.compute(), (args, kwargs or {}))
        return function(*now[0], **now[1])
