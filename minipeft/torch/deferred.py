"""A weight that is not there until something is computed with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minipeft.errors import InputError
from minipeft.torch.linear import Form

_WRITES):
            raise InputError(
                "this weight is computed from the base and its adapters, and what is "
                "written to it would be lost; write to `layer.base.weight`."
            )
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute the weight and go on with it."""
        now = tree_map_only(cls, lambda weight: weight.compute(), (args, kwargs or {}))
        return function(*now[0], **now[1])


_WRITES = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class Deferred(Tensor):
    """A weight that is computed when something is computed with it.

    Its shape, dtype and device are known before. To write to it is refused: the change
    would be lost.
    """

    METADATA = frozenset(
        {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")}
        | {getattr(Tensor, name).__get__ for name in ("layout", "requires_grad")}
        | {getattr(Tensor, name).__get__ for name in ("is_meta", "is_cuda", "is_leaf")}
        | {getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized")}
        | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point}
        | {Tensor.stride, Tensor.element_size, Tensor.__len__}
    )

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
        """Answer from what is known, or compute the weight and go on with it."""
        if function in cls.METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args)
        name = getattr(function, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
        if args and isinstance(args[0], cls) and (writes or name in
