"""A stack of weights `(experts, out, in)`, with its update, up to the product.

Models index the stack by an expert, transpose it, and multiply, in several ways. Each
of these operations is linear in the weight, so it can be applied to two thin factors of
the update $L R$ as well: indexing selects the same experts of both factors, and the
transpose of $L R$ is $R^T L^T$.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only

from minipeft.errors import InputError
from minipeft.shapes import Shaped
from minipeft.torch.deferred import METADATA, WRITES

Factor = Shaped[Tensor, "..."]

TURNS = (Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes)
TURNED = frozenset({Tensor.mT.__get__, Tensor.T.__get__})  # type: ignore[attr-defined]
PRODUCTS = frozenset(
    {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__}
    | {torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
)
GROUPED = frozenset({torch._grouped_mm, torch.nn.functional.grouped_mm})
ALIGNED = 8  # kernels need rows of 16 bytes: 8 numbers of 16 bits, 4 of 32 bits


class Coded(NamedTuple):
    """Quantized weights, one layer for each expert.

    Attributes:
        layers: each has `dequantize(dtype)` and is called with x, and a bias if any.
        turned: whether the model stores the transposes of the layers' weights.
        one: whether a single expert was selected; then there is no leading axis.
        dtype: of the weights after decoding.
    """

    layers: Sequence[Any]
    turned: bool
    one: bool
    dtype: torch.dtype

    def decode(self) -> Tensor:
        """Return the weights as the model would store them."""
        if any(layer.packed.is_meta for layer in self.layers):
            raise InputError(
                "the weights are offloaded and come in for a call of one expert alone; "
                "set experts_implementation to 'eager' or 'grouped_mm'."
            )
        W = torch.stack([layer.dequantize(self.dtype) for layer in self.layers])
        W = W.mT if self.turned else W
        return W[0] if self.one else W

    def take(self, index: Any) -> "Coded | Tensor":
        """Return one expert, or the experts that a list or a mask selects."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            return self._replace(layers=[self.layers[int(index)]], one=True)
        decoded: Tensor = self.decode()[index]
        return decoded

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x times the one weight; backward decodes the weight again."""
        y: Tensor = self.layers[0](x, bias)
        return y

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the products of runs of tokens, decoding one expert at a time."""
        out, start = [], 0
        for layer, end in zip(self.layers, ends.tolist(), strict=True):
            if end > start:
                out.append(layer(x[start:end]))
            start = end
        rows, columns = self.layers[0].out_features, len(x) - start
        return torch.cat([*out, x.new_zeros(columns, rows)])


class Stack(Tensor):
    """A stack, or one weight of it, together with the factors of its update."""

    base: Tensor | Coded
    factors: tuple[tuple[Factor, Factor], ...]

    @staticmethod
    def __new__(
        cls,
        base: Tensor | Coded,
        factors: tuple[tuple[Factor, Factor], ...] = (),
        shape: tuple[int, ...] | None = None,
    ) -> "Stack":
        """Store the weights and the factors; quantized weights need a shape."""
        device = (
            base.device if isinstance(base, Tensor) else base.layers[0].packed.device
        )
        self = Tensor._make_wrapper_subclass(
            cls,
            base.shape if isinstance(base, Tensor) else shape or (),
            dtype=base.dtype,
            device=device,
        )
        self.base, self.factors = base, factors
        return self

    def added(self, L: Factor, R: Factor) -> "Stack":
        """Return the stack with L R added."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
        return Stack(self.base, (*self.factors, (L, R)), shape)

    def whole(self) -> Tensor:
        """Return the sum of weight and update, for operations that are no product."""
        W = self.base if isinstance(self.base, Tensor) else self.base.decode()
        total = W
        for L, R in self.factors:
            total = total + L @ R
        return total.to(W.dtype)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Apply linear operations to weight and factors; give others the sum."""
        kwargs = kwargs or {}
        if function in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        _check_not_written(cls, name, args)
        step = None if "out" in kwargs else _step(function, args)
        if step is not None:
            return step(*args, **kwargs)
        return cls.__torch_dispatch__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the operator with the sum."""
        now = tree_map_only(cls, lambda weight: weight.whole(), (args, kwargs or {}))
        return function(*now[0], **now[1])


def _check_not_written(kind: type, name: str, args: Any) -> None:
    writes = (name.endswith("_") and not name.endswith("__")) or name in WRITES
    if writes and args and isinstance(args[0], kind):
        raise InputError(
            "the stack of an adapted layer is computed for one call, and what is "
            "written to it would be lost; write to what is stored (`layer.base`)."
        )


def _step(function: Any, args: Any) -> Callable[..., Any] | None:
    at = [isinstance(a, Stack) for a in args]
    if not any(at):
        return None
    if function is Tensor.__getitem__:
        return _take if _first_axis(args[1]) else None
    if function in TURNED or (function in TURNS and {-1, -2} == _axes(args)):
        return _turn
    if function is Tensor.to:
        return _to
    if function is torch.nn.functional.linear:
        return _linear
    if function in GROUPED or name_of(function).startswith("grouped_mm"):
        return _Grouped(function).__call__
    if function in PRODUCTS and sum(at) == 1:
        return _Product(function, right=at[1]).__call__
    return None


def name_of(function: Any) -> str:
    """Return the last part of the name of a function or an operator."""
    return str(getattr(function, "__name__", "")).split(".")[0]


def _first_axis(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.dtype != torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def _axes(args: Any) -> set[int]:
    with torch._C.DisableTorchFunctionSubclass():
        dim = args[0].dim()
    return {axis if axis < 0 else axis - dim for axis in args[1:3]}


def _shape(stack: Stack) -> tuple[int, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(stack.shape)


def _take(stack: Stack, index: Any) -> Any:
    if isinstance(index, Tensor):
        index = index.as_subclass(Tensor)
    base = stack.base
    if len(_shape(stack)) != 3:
        return stack.whole()[index]
    taken = base[index] if isinstance(base, Tensor) else base.take(index)
    factors = tuple((L[index], R[index]) for L, R in stack.factors)
    return Stack(taken, factors, _shape(stack)[1:])


def _turn(stack: Stack, *axes: int) -> Stack:
    base, shape = stack.base, _shape(stack)
    turned = (
        base.mT if isinstance(base, Tensor) else base._replace(turned=not base.turned)
    )
    factors = tuple((R.mT, L.mT) for L, R in stack.factors)
    return Stack(turned, factors, (*shape[:-2], shape[-1], shape[-2]))


def _to(stack: Stack, *args: Any, **kwargs: Any) -> Any:
    # A program that brings operands to a device finds it there: it stays a stack.
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        here = device is None or device == stack.device or stack.is_meta
        same = dtype is None or dtype == stack.dtype
    return stack if here and same else stack.whole().to(*args, **kwargs)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Stack) or isinstance(x, Stack):
        raise InputError("a stack of weights stands where a linear layer has its x.")
    base = weight.base
    if isinstance(base, Tensor):
        y = torch.nn.functional.linear(x, base, bias)
    elif base.one and not base.turned:
        y = base.product(x, bias)
    else:
        y = torch.nn.functional.linear(x, base.decode().to(x.dtype), bias)
    total = y
    for L, R in weight.factors:
        h = torch.nn.functional.linear(x.to(R.dtype), R)
        total = total + torch.nn.functional.linear(h, L)
    return total.to(y.dtype)


class _Product(NamedTuple):
    """x times the weight, or the weight times x: `matmul`, `mm`, `bmm`."""

    function: Any
    right: bool

    def __call__(self, one: Any, other: Any) -> Tensor:
        stack, x = (other, one) if self.right else (one, other)
        y = self._base(stack.base, x)
        total = y
        for L, R in stack.factors:
            wide = x.to(L.dtype)
            first, second = (L, R) if self.right else (R, L)
            total = total + self._times(self._times(wide, first), second)
        return total.to(y.dtype)

    def _base(self, base: Tensor | Coded, x: Tensor) -> Tensor:
        if isinstance(base, Tensor):
            return self._times(x, base)
        if base.one and base.turned and self.right:
            return base.product(x)
        return self._times(x, base.decode().to(x.dtype))

    def _times(self, x: Tensor, W: Tensor) -> Tensor:
        y: Tensor = torch.matmul(x, W) if self.right else torch.matmul(W, x)
        return y


class _Grouped(NamedTuple):
    """Runs of tokens, each multiplied by the weight of its expert."""

    function: Any

    def __call__(
        self,
        x: Tensor,
        stack: Stack,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        if bias is not None or out_dtype is not None:
            options: dict[str, Any] = {"offs": offs, "bias": bias}
            options["out_dtype"] = out_dtype
            whole: Tensor = self.function(x, stack.whole(), **options)
            return whole
        y = self._base(x, stack.base, offs)
        total = y
        for L, R in stack.factors:
            more = -L.shape[-1] % ALIGNED
            L, R = pad(L, (0, more)), pad(R, (0, 0, 0, more))
            h = self.function(x.to(L.dtype), L.contiguous(), offs=offs)
            total = total + self.function(h, R.contiguous(), offs=offs)
        return total.to(y.dtype)

    def _base(self, x: Tensor, base: Tensor | Coded, offs: Tensor | None) -> Tensor:
        if isinstance(base, Tensor):
            y: Tensor = self.function(x, base, offs=offs)
            return y
        if base.turned and offs is not None:
            return base.grouped(x, offs)
        return self._base(x, base.decode().to(x.dtype), offs)
