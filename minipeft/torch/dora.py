"""DoRA: each row of the weight has a trained length; LoRA changes its direction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Float
from minipeft.torch import launches, lora, operators
from minipeft.torch.adapted import Adapted, mixed
from minipeft.torch.linear import (
    Bias,
    Form,
    Output,
    Product,
    Weight,
    check_shape,
    full_precision,
    transformed,
    under_torch_func,
    weight_of,
)
from minipeft.torch.lora import LoRA, LoRAConfig, MatrixA
from minipeft.torch.operands import check_tensors, has_values
from minipeft.values import check_kind

Rows = Float[Tensor, " out_features"]

ROWS = 512
"""Rows of W that a CPU converts and squares at a time: they stay in its cache."""
VALUES = 2**23
"""As many values of W another device takes at a time: each slice is five launches."""


class DoRA(LoRA):
    """The trained parts: a LoRA, and one length for each output row.

    Args:
        update: the LoRA that changes the directions; this module uses its A and B.
        magnitude: the length of each row, in the dtype of A.
    """

    magnitude: Rows

    def __init__(self, update: LoRA, magnitude: Rows):
        check_kind("update", update, LoRA)
        rows = (magnitude, "out_features")
        check_tensors({"B": (update.B, "out_features r"), "magnitude": rows})
        A, B = update.A.detach(), update.B.detach()
        super().__init__(A, B, update.scaling, update.dropout)
        self.magnitude = nn.Parameter(magnitude)

    def forward(self, product: Product, dtype: torch.dtype | None = None) -> Output:
        r"""Return the new output: $g \odot (x W^T + s (x A^T) B^T) + b$.

        V = W + s B A is never formed.

        Args:
            product: of the frozen layer.
            dtype: of the output; None: the dtype of the frozen layer's output.
        """
        check_fits(product.form, self)
        z = self._changed(product, torch.promote_types(product.y.dtype, self.A.dtype))
        norm = row_norm(product.W, self)
        return _rescale(z, self.magnitude, norm, product.bias, dtype or product.y.dtype)


def init(generator: torch.Generator | None, W: Weight, r: int, alpha: float) -> DoRA:
    r"""Start at the weight itself: A and B as in LoRA, and $m_i = \|W_i\|$.

    Source: DoRA (arXiv:2402.09353), section 4.1.
    """
    check_tensors({"W": (W, "out_features in_features")})
    new = lora.init(generator, W.shape[1], W.shape[0], r, alpha).to(W.device)
    return DoRA(new, row_norm(W, new))


@torch.no_grad()
def squared_row_norm(W: Weight, update: LoRA) -> Rows:
    """Return the squared norm of each row of V = W + s B A, without forming V.

    Formula: `reference.dora.squared_row_norm`; computed in float32 or wider, also under
    autocast.
    """
    check_tensors({"W": (W, "out_features in_features")})
    lora.check_fits(Form.of(W), update)
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B, s = update.A.to(wide), update.B.to(wide), update.scaling
    with full_precision(W.device):
        slices = torch.split(W, _at_a_time(W))
        blocks = [_with_rows(rows.to(wide), A) for rows in slices]
        square, thin = (torch.cat(part) for part in zip(*blocks, strict=True))
        return square + ((2 * s * thin + s * s * (B @ (A @ A.T))) * B).sum(dim=1)


def _at_a_time(W: Weight) -> int:
    return ROWS if W.device.type == "cpu" else max(1, VALUES // max(1, W.shape[1]))


def _with_rows(
    rows: Float[Tensor, "rows in_features"], A: MatrixA
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows r"]]:
    return (rows * rows).sum(dim=1), rows @ A.T


def row_norm(W: Weight, update: LoRA) -> Rows:
    """Return the norm of each output row of W + s B A, over in_features."""
    check_kind("update", update, LoRA)
    launched = operators.row_norm_on_kernels(W, update.A, update.B, update.scaling)
    if launched is not None:
        return launched
    check_tensors({"W": (W, "out_features in_features")})
    A, B = update.A.detach(), update.B.detach()
    if not W.dtype == A.dtype == B.dtype:  # a kernel takes float32 beside any W
        A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (A, B))
    if not under_torch_func() and launches.available(W, A, B):
        norm: Tensor = operators.dora_row_norm(W.detach(), A, B, update.scaling)
        return norm
    # Rounding can make the squared norm of a zero row slightly negative.
    # Detached, as `no_grad` does not stop derivatives in forward mode.
    return squared_row_norm(W, update).clamp(min=0).sqrt().detach()


def over_norm(values: Rows, norm: Rows) -> Rows:
    """Return values / norm; for a zero row, whose direction is zero, return 0."""
    check_tensors({"norm": (norm, "out_features"), "values": (values, "out_features")})
    return _over(values, norm)


def _over(values: Rows, norm: Rows) -> Rows:
    zero = norm == 0
    # The derivative of values / 0 would be NaN. A trace is held against another one
    # without derivatives, so both take one way.
    if torch.is_grad_enabled() or transformed():
        return torch.where(zero, 0, values / norm.masked_fill(zero, 1))
    return (values / norm).masked_fill(zero, 0)


def _rescale(
    z: Output, magnitude: Rows, norm: Rows, bias: Bias | None, dtype: torch.dtype
) -> Output:
    # g (z - b) + b with g = m / |V|, the norm a constant. z includes the bias b,
    # which g must not scale. Rounded once, to `dtype`.
    if transformed() or not torch.is_grad_enabled():
        return _rescaled(z, _over(magnitude, norm), bias).to(dtype)
    y, _ = _Rescale.apply(z, magnitude, norm, bias, dtype)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


def _rescaled(z: Output, g: Rows, bias: Bias | None) -> Output:
    # Not computed as g (z - b) + b: that rounds even where g = 1, but a new adapter
    # must change no bit.
    return g * z if bias is None else torch.addcmul((1 - g) * bias, z, g)


class _Rescale(torch.autograd.Function):
    """`_rescale` for autograd, which on a CPU stores the output instead of the input z.

    The gradient of the magnitude needs z, which no other operation stores. z follows
    from the output, which the next layer often stores anyway, so DoRA trains with about
    the memory of LoRA. Where g is too small to divide by, the columns of z are stored
    after all: they are returned as an output, because torch can differentiate twice
    only through inputs and outputs.

    On other devices the host would have to wait to learn which columns these are. So
    there z is stored instead of the output, in the dtype of the output.
    """

    SMALL = 2.0**-4

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        z, magnitude, norm, bias, dtype = operands
        g = _over(magnitude, norm)
        y, looks = _rescaled(z, g, bias).to(dtype), _looks(z)
        kept = z[..., _Rescale._small(g)] if looks else z.to(dtype)
        kept = z.view_as(z) if kept is z else kept  # an output, and no input
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y if looks else None, kept, magnitude, norm, bias, g)
        return y, kept

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_kept: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, kept, magnitude, norm, bias, g = _Rescale._saved(ctx)
        if torch.is_grad_enabled():  # a derivative of this derivative goes through g
            g = _over(magnitude, norm)
        wants_z, wants_magnitude, *_ = ctx.needs_input_grad
        grad_z, grad_magnitude = None, None
        if grad_y is not None:
            if wants_z:
                grad_z = grad_y * g
            if wants_magnitude:
                slope = grad_y.to(magnitude.dtype)
                grad_magnitude = _Rescale._of_magnitude(
                    slope, y, kept, (magnitude, norm, bias, g)
                )
        if grad_kept is not None and wants_z:
            if y is not None:
                small = _Rescale._small(g)
                there = y.new_zeros(y.shape, dtype=grad_kept.dtype)
                grad_kept = there.index_copy(-1, small, grad_kept)
            grad_z = grad_kept if grad_z is None else grad_z + grad_kept
        return grad_z, grad_magnitude, None, None, None

    @staticmethod
    def _of_magnitude(
        slope: Tensor,
        y: Tensor | None,
        kept: Tensor,
        rows: tuple[Tensor, Tensor, Tensor | None, Tensor],
    ) -> Tensor:
        magnitude, norm, bias, g = rows
        if y is None:
            part = kept if bias is None else kept - bias
            return _over(_over_positions(slope * part), norm)
        small = _Rescale._small(g)
        part = kept if bias is None else kept - bias[small]
        few = _over(_over_positions(slope[..., small] * part), norm[small])
        sums = _over_positions(slope * y)
        if bias is not None:
            sums = sums - _over_positions(slope) * bias
        over = magnitude.index_fill(0, small, 1)
        total = sums / over
        return total.index_copy(0, small, few.to(total.dtype))

    @staticmethod
    def _saved(ctx: Any) -> tuple[Any, ...]:
        try:
            saved: tuple[Any, ...] = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            if "output 0 of" in str(error):  # else it is an input: all are the layer's
                raise InputError(
                    "the model changes the output of a DoRA layer in place (y += ...), "
                    "and its gradient needs that output; leave such layers out of the "
                    "targets (in Falcon dense_4h_to_h)."
                ) from None
            raise InputError(
                "the magnitude or the bias of a DoRA layer was changed between forward "
                "and backward, and the gradient needs what forward used; take the "
                "optimizer's step, or load weights, after backward."
            ) from None
        return saved

    @staticmethod
    def _small(g: Tensor) -> Tensor:
        return torch.nonzero(g.abs() < _Rescale.SMALL)[:, 0]


def _looks(values: Tensor) -> bool:
    # To read a number that a device computes, the host waits for the device.
    return values.device.type == "cpu" and has_values(values)


def _over_positions(values: Float[Tensor, "... n"]) -> Float[Tensor, " n"]:
    matrix = values if values.dim() > 1 else values[None]
    return matrix.flatten(0, -2).sum(dim=0)


def merge(W: Weight, adapter: DoRA) -> Weight:
    r"""Return $W'_i = m_i V_i / \|V_i\|$, in float32 or wider."""
    check_kind("adapter", adapter, DoRA)
    g = over_norm(adapter.magnitude, row_norm(W, adapter))
    return g[:, None] * (W + lora.delta(adapter))


def check_fits(form: Form, adapter: DoRA) -> None:
    """Refuse parts of another layer; torch would broadcast a single magnitude."""
    check_kind("adapter", adapter, DoRA)
    lora.check_fits(form, adapter)
    check_shape("magnitude", adapter.magnitude, form.out_features)


class DoRALinear(Adapted[DoRA]):
    r"""A frozen layer with trained directions and lengths of its rows.

    $y = g \odot (x W^T + s (x A^T) B^T) + b$ with $g_i = m_i / \|V_i\|$ and V = W + s B
    A. Dropout changes the input of A and never the norm. With several active adapters,
    the changes of the output are added, each times its share.

    Source: DoRA (arXiv:2402.09353), equation 5.
    """

    check_fits = staticmethod(check_fits)

    def change(self, adapter: DoRA, W: Weight) -> Weight:
        r"""Return $W' - W$."""
        return merge(W, adapter) - W

    def adapt(self, product: Product) -> Output:
        """Return the rescaled output."""
        one = list(self.active.values()) == [1]
        dtype = product.y.dtype if one else product.form.wide
        shares, y = self.shares(), product.y.to(dtype)
        y = mixed(y, shares, lambda adapter: adapter(product, dtype))
        return y.to(product.y.dtype)

    def adapt_weight(self, W: Weight) -> Weight:
        """Return $W'$."""
        return mixed(W, self.shares(), lambda adapter: merge(W, adapter))


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
        """Return a new adapter for each layer, on the device of the layer.

        Raises:
            InputError: if r or dropout is out of range; the message names the layer.
        """
        updates = LoRAConfig(self.r, self.alpha, self.rank_stabilized, self.dropout)
        found = updates.adapters(layers, generator)
        return {n: _started(layers[n], cast(LoRA, found[n])) for n in layers}


def _started(layer: nn.Module, update: LoRA) -> DoRA:
    magnitude = row_norm(weight_of(layer), update)
    return DoRA(update, magnitude.to(update.A.dtype))
