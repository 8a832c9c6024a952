"""QLoRA's base: a frozen linear layer that keeps its weight in a few bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minipeft.shapes import Float, Shaped
from minipeft.torch.blockwise import Blockwise, dequantize, quantize
from minipeft.torch.codebook import NF4
from minipeft.torch.linear import Form, Layout, layout


class QuantizedLinear(nn.Module):
    r"""A frozen linear layer, $y = x \hat W^T + b$, that keeps $\hat W$ in a few bits.

    Every pass dequantizes to the dtype of x, and backward does so again: nothing of
    W's size stays in memory between the two. Only x gets a gradient.

    Args:
        q: the quantized weight, `(out_features, in_features)`.
        bias: as in `nn.Linear`.
        dtype: of `weight`, for whoever reads it; follows `.to(dtype)`.

    Source: QLoRA (arXiv:2305.14314), equation 5.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor

    def __init__(
        self,
        q: Blockwise,
        bias: Float[Tensor, " out_features"] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.blocksize, self.dtype = q.blocksize, dtype
        # Copies: loading a state dict writes into them, and must not reach NF4 itself.
        self.register_buffer("packed", q.packed.clone())
        self.register_buffer("absmax", q.absmax.clone())
        self.register_buffer("codebook", q.codebook.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        codebook: Float[Tensor, " codes"] = NF4,
        blocksize: int = 64,
    ) -> "QuantizedLinear":
        """Quantize the weight of a linear layer; the layer itself is left alone."""
        q = quantize(layer.weight, codebook, blocksize)
        return cls(q, layer.bias, layer.weight.dtype)

    @property
    def q(self) -> Blockwise:
        """The quantized weight."""
        shape = (self.out_features, self.in_features)
        return Blockwise(self.packed, self.absmax, self.codebook, self.blocksize, shape)

    @property
    def weight(self) -> Float[Tensor, "out_features in_features"]:
        r"""$\hat W$, dequantized."""
        return self.dequantize(self.dtype)

    def dequantize(
        self, dtype: torch.dtype
    ) -> Float[Tensor, "out_features in_features"]:
        r"""Return $\hat W$ in this dtype."""
        return dequantize(self.q, dtype)

    def forward(
        self, x: Shaped[Tensor, "... in_features"]
    ) -> Shaped[Tensor, "... out_features"]:
        """Apply the layer."""
        y: Tensor = _Frozen.apply(x, self.dequantize, self.bias)  # type: ignore[no-untyped-call]
        return y

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "QuantizedLinear":
        # A cast to 16 bits would round scales and codes: they move, but stay float32.
        exact, probe = (self.absmax, self.codebook), self.absmax.new_empty(0)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(probe.to(self.dtype)).dtype
        self.absmax, self.codebook = (
            t if t.is_meta else t.to(self.packed.device) for t in exact
        )
        return self

    def extra_repr(self) -> str:
        """Say what `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codes={len(self.codebook)}, "
            f"blocksize={self.blocksize}"
        )


class _Frozen(torch.autograd.Function):
    """A linear layer whose weight is made in forward and made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[torch.dtype], Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        ctx.weight = weight
        return linear(x, weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return grad_y @ ctx.weight(grad_y.dtype), None, None


class _Quantized(Layout):
    """`QuantizedLinear`: W is decoded; what is merged into it is kept decoded."""

    def form(self, layer: Any) -> Form:
        rows, columns = layer.out_features, layer.in_features
        return Form(rows, columns, layer.dtype, layer.packed.device)

    def forward(
        self, layer: Any, x: Tensor, W: Shaped[Tensor, "out_features in_features"]
    ) -> Tensor:
        return linear(x, W.to(x.dtype), layer.bias)

    def plain(
        self, layer: Any, W: Shaped[Tensor, "out_features in_features"]
    ) -> nn.Module:
        rows, columns = W.shape
        merged = nn.Linear(columns, rows, bias=False, device="meta")
        merged.weight, merged.bias = nn.Parameter(W, requires_grad=False), layer.bias
        return merged


@layout.register
def _(layer: QuantizedLinear) -> Layout:
    return _Quantized()
