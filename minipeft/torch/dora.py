"""DoRA: every row of the weight has a trained length, and LoRA turns its direction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from minipeft.shapes import Float, Shaped
from minipeft.torch import lora as lora_
from minipeft.torch.linear import Adapted, layout
from minipeft.torch.lora import LoRA, LoRAConfig

ROWS = 512
"""Rows of W that are widened and squared at a time: what the norm costs in memory."""


class DoRA(LoRA):
    """The trained parts: LoRA's, and one length for each output row.

    Args:
        lora: the part that turns the rows; its A and B become this adapter's.
        magnitude: of each row, in the dtype of A.
    """

    magnitude: Float[Tensor, " out_features"]

    def __init__(self, lora: LoRA, magnitude: Float[Tensor, " out_features"]):
        super().__init__(lora.A.detach(), lora.B.detach(), lora.scaling, lora.dropout)
        self.magnitude = nn.Parameter(magnitude)


def init(
    generator: torch.Generator | None,
    W: Float[Tensor, "out_features in_features"],
    r: int,
    alpha: float,
) -> DoRA:
    r"""Start at the weight itself: LoRA's A and B, and $m_i = \|W_i\|$.

    Source: DoRA (arXiv:2402.09353), section 4.1.
    """
    new = lora_.init(generator, W.shape[1], W.shape[0], r, alpha).to(W.device)
    return DoRA(new, row_norm(W, new))


@torch.no_grad()
def squared_row_norm(
    W: Float[Tensor, "out_features in_features"], lora: LoRA
) -> Float[Tensor, " out_features"]:
    r"""Return the squared norm of each row of V = W + s B A, without forming V.

    $\|V_i\|^2 = \|W_i\|^2 + 2s\,(W A^T)_i \cdot B_i + s^2\,B_i (A A^T) B_i^T$, in
    float32 or wider: O((in + out) r) numbers of memory where V has in times out.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B, s = lora.A.to(wide), lora.B.to(wide), lora.scaling
    blocks = [_with_rows(rows.to(wide), A) for rows in torch.split(W, ROWS)]
    square, thin = (torch.cat(part) for part in zip(*blocks, strict=True))
    return square + ((2 * s * thin + s * s * (B @ (A @ A.T))) * B).sum(dim=1)


def _with_rows(
    rows: Float[Tensor, "rows in_features"], A: Float[Tensor, "r in_features"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows r"]]:
    return (rows * rows).sum(dim=1), rows @ A.T


def row_norm(
    W: Float[Tensor, "out_features in_features"], lora: LoRA
) -> Float[Tensor, " out_features"]:
    """Return the norm of each output row of W + s B A, over in_features."""
    # Rounding can leave a row that cancels to zero slightly below it.
    return squared_row_norm(W, lora).clamp(min=0).sqrt()


def over_norm(
    values: Float[Tensor, " out_features"], norm: Float[Tensor, " out_features"]
) -> Float[Tensor, " out_features"]:
    r"""Return values / norm, and 0 for a zero row, whose direction is zero."""
    zero = norm == 0
    return torch.where(zero, 0, values / torch.where(zero, 1, norm))


def rescale(
    z: Float[Tensor, "... out_features"],
    magnitude: Float[Tensor, " out_features"],
    norm: Float[Tensor, " out_features"],
    bias: Float[Tensor, " out_features"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "... out_features"]:
    r"""Return $g \odot (z - b) + b$ with $g_i = m_i / \|V_i\|$; the norm is a constant.

    z already holds the bias b, which g must not scale. The result is rounded once, to
    `dtype`.
    """
    if torch.compiler.is_compiling():  # a compiler decides for itself what to keep
        return _rescaled(z, over_norm(magnitude, norm), bias).to(dtype)
    y = _Rescale.apply(z, magnitude, norm, bias, dtype)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


def _rescaled(
    z: Float[Tensor, "... out_features"],
    g: Float[Tensor, " out_features"],
    bias: Float[Tensor, " out_features"] | None,
) -> Float[Tensor, "... out_features"]:
    # Not g (z - b) + b, which would round where g is 1: a new adapter changes no bit.
    return g * z if bias is None else torch.addcmul((1 - g) * bias, z, g)


class _Rescale(torch.autograd.Function):
    """`rescale`, with its output remembered in place of its input.

    The magnitude's gradient needs z, which nothing else would keep. But z follows from
    the output, which the next layer keeps anyway, so DoRA trains in the memory of LoRA.
    Where a gain is too small to divide by, the columns of z are kept after all.
    """

    SMALL = 2.0**-4

    @staticmethod
    def forward(
        z: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return _rescaled(z, over_norm(magnitude, norm), bias).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, magnitude, norm, bias, _ = inputs
        g = over_norm(magnitude, norm)
        small = torch.nonzero(g.abs() < _Rescale.SMALL)[:, 0]
        kept = z[..., small] if bias is None else z[..., small] - bias[small]
        ctx.save_for_backward(output, magnitude, norm, g, bias, small, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        y, magnitude, norm, g, bias, small, kept = ctx.saved_tensors
        grad_z = grad_y * g if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_z, None, None, None, None
        grad_y = grad_y.to(magnitude.dtype)
        sums = _over_positions(grad_y * y)
        if bias is not None:
            sums -= _over_positions(grad_y) * bias
        grad_magnitude = sums / magnitude
        few = _over_positions(grad_y[..., small] * kept)
        grad_magnitude[small] = over_norm(few, norm[small])
        return grad_z, grad_magnitude, None, None, None


def _over_positions(values: Float[Tensor, "... n"]) -> Float[Tensor, " n"]:
    return values[None].flatten(0, -2).sum(dim=0)


def merge(
    W: Float[Tensor, "out_features in_features"], dora: DoRA
) -> Float[Tensor, "out_features in_features"]:
    r"""Return $W'_i = m_i V_i / \|V_i\|$, in float32 or wider."""
    g = over_norm(dora.magnitude, row_norm(W, dora))
    return g[:, None] * (W + lora_.delta(dora))


class DoRALinear(Adapted[DoRA]):
    r"""A frozen layer whose rows are turned and given a length.

    $y = g \odot (x W^T + s (x A^T) B^T) + b$ with $g_i = m_i / \|V_i\|$ and
    V = W + s B A. Dropout acts on the way to A alone, never on the norm. Several active
    adapters add up what each of them changes, times its share.

    Source: DoRA (arXiv:2402.09353), equation 5.
    """

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "... out_features"]:
        """Apply the adapted layer; V is never formed."""
        if self.merged_weight is not None:
            return self.layout.forward(self.base, x, self.merged_weight)
        y, shares = self.base(x), self.shares()
        if [share for share, _ in shares] == [1]:
            return self._adapted(x, y, shares[0][1], y.dtype)
        total = self._unchanged() * y
        for share, dora in shares:
            total = total + share * self._adapted(x, y, dora, dora.A.dtype)
        return total.to(y.dtype)

    def merged(self) -> Float[Tensor, "out_features in_features"]:
        r"""Return $W'$, rounded once to the dtype of W."""
        W, shares = self.W, self.shares()
        if [share for share, _ in shares] == [1]:
            return merge(W, shares[0][1]).to(W.dtype)
        total = self._unchanged() * W
        for share, dora in shares:
            total = total + share * merge(W, dora)
        return total.to(W.dtype)

    def _unchanged(self) -> float:
        return 1 - sum(share for share, _ in self.shares())

    def _adapted(
        self,
        x: Shaped[Tensor, "..."],
        y: Float[Tensor, "... out_features"],
        dora: DoRA,
        dtype: torch.dtype,
    ) -> Float[Tensor, "... out_features"]:
        p = dora.dropout if self.training else 0.0
        h = self.layout.project(self.base, x, dora.A, p)
        turned = y + linear(dora.scaling * h, dora.B)
        bias = getattr(self.base, "bias", None)  # an embedding has none
        norm = row_norm(self.W, dora)
        return rescale(turned, dora.magnitude, norm, bias, dtype)


@dataclass(frozen=True)
class DoRAConfig:
    """DoRA for the layers of a model; the arguments are those of `LoRAConfig`."""

    r: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[DoRA]]] = DoRALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, DoRA]:
        """Return a new adapter for each layer, where the layer lives.

        Raises:
            InputError: if r or dropout is out of range; the sentence names the layer.
        """
        loras = LoRAConfig(self.r, self.alpha, self.rank_stabilized, self.dropout)
        return {
            name: DoRA(lora, row_norm(_weight(layers[name]), lora).to(lora.A.dtype))
            for name, lora in loras.adapters(layers, generator).items()
        }


def _weight(layer: nn.Module) -> Float[Tensor, "out_features in_features"]:
    return layout(layer).turn(cast(Tensor, layer.weight))
