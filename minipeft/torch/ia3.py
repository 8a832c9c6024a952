"""IA3: a trained vector that rescales keys, values, or the feed-forward layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped
from minipeft.torch.adapted import Adapted, mixed, naming
from minipeft.torch.linear import (
    Bias,
    Form,
    Lookup,
    Output,
    Product,
    Weight,
    WeightView,
    check_shape,
    weight_view,
)
from minipeft.torch.operands import check_tensors
from minipeft.torch.targets import check_names, matches
from minipeft.values import check_integer, check_kind

Side = Literal["output", "input"]
Vector = Float[Tensor, " features"]


class IA3(nn.Module):
    """The trained vector l, and the side of the layer that l scales.

    The two sides: `reference.ia3.IA3`.

    Raises:
        InputError: if the side is neither `output` nor `input`.
    """

    l: Vector  # noqa: E741  # the paper's name

    def __init__(self, l: Vector, side: Side):  # noqa: E741
        super().__init__()
        check_tensors({"l": (l, "features")})
        if side not in get_args(Side):
            raise InputError(f"side is {side!r}; choose 'output' or 'input'.")
        self.l = nn.Parameter(l)
        self.side = side

    def forward(self, v: Float[Tensor, "... features"]) -> Float[Tensor, "..."]:
        r"""Return $l \odot v$ in the wider of their two dtypes."""
        check_shape("l", self.l, v.shape[-1])
        return self.l * v


def init(features: int, side: Side = "output") -> IA3:
    """Start without a change: every number of l is 1.

    Args:
        features: length of the side that l scales.
        side: `output` for keys and values, `input` for feed-forward.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """
    check_integer("features", features, 0)
    return IA3(torch.ones(features, dtype=torch.float32, device="cpu"), side)


def check_fits(form: Form, adapter: IA3) -> None:
    """Refuse a vector for another layer, or for the other side of this layer."""
    check_kind("adapter", adapter, IA3)
    features = form.in_features if adapter.side == "input" else form.out_features
    check_shape(f"l, for the {adapter.side},", adapter.l, features)


class IA3Linear(Adapted[IA3]):
    r"""A frozen layer, rescaled: $y = l \odot (x W^T + b)$, or $(l \odot x) W^T + b$.

    With several active adapters, the differences l - 1 are added, each times its share.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """

    check_fits = staticmethod(check_fits)

    def change(self, adapter: IA3, W: Weight) -> Weight:
        r"""Return $\Lambda_l W - W$, or $W \Lambda_l - W$."""
        changed = adapter(W) if adapter.side == "input" else adapter(W.T).T
        return cast(Tensor, changed - W)

    def adapt(self, product: Product) -> Output:
        """Scale the input, multiply, scale the output."""
        x = self._scaled(product.x, "input")
        y = product.y if x is product.x else product.compute(x)
        return self._scaled(y, "output")

    def adapt_weight(self, W: Weight) -> Weight:
        r"""Return $W' = \Lambda_l W$ or $W \Lambda_l$."""
        W = mixed(W, self._on("input"), lambda adapter: adapter(W))
        rows = mixed(W.T, self._on("output"), lambda adapter: adapter(W.T))
        return rows.T

    def adapt_bias(self, bias: Bias) -> Bias:
        """Return the bias, which l scales together with the output."""
        check_shape("bias", bias, self.view.form(self.base).out_features)
        return self._scaled(bias, "output")

    def add(self, name: str, adapter: IA3) -> None:
        """Hold another adapter, inactive until `activate`; refuse to scale indices."""
        check_kind("adapter", adapter, IA3)
        _check_side(self.view, adapter.side)
        if adapter.side == "output":
            _check_bias(self.base)
        super().add(name, adapter)

    def _scaled(self, v: Shaped[Tensor, "..."], side: Side) -> Shaped[Tensor, "..."]:
        return mixed(v, self._on(side), lambda adapter: adapter(v)).to(v.dtype)

    def _on(self, side: Side) -> list[tuple[float, IA3]]:
        return [(share, a) for share, a in self.shares() if a.side == side]


@dataclass(frozen=True)
class IA3Config:
    """IA3 for the layers of a model.

    Args:
        feedforward: last parts of names, or patterns, of the layers whose input is
            scaled; every other target is scaled at its output.
    """

    feedforward: Sequence[str] = ()

    wrapper: ClassVar[type[Adapted[IA3]]] = IA3Linear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, IA3]:
        """Return a new adapter for each layer, on the device of the layer.

        Args:
            layers: by name.
            generator: not used: every number of l starts at 1.

        Raises:
            InputError: if a name in `feedforward` matches none of the layers, or an
                embedding, whose input is an index and cannot be scaled.
        """
        check_names("feedforward", self.feedforward)
        for pattern in self.feedforward:
            if not any(matches(name, pattern) for name in layers):
                raise InputError(
                    f"the feed-forward layer {pattern!r} is none of the targets; "
                    f"choose from {', '.join(layers)}."
                )
        return {name: self._adapter(name, layer) for name, layer in layers.items()}

    def _adapter(self, name: str, layer: nn.Module) -> IA3:
        view = weight_view(layer)
        chosen = any(matches(name, pattern) for pattern in self.feedforward)
        side: Side = "input" if chosen else "output"
        with naming(name):
            _check_side(view, side)
        form = view.form(layer)
        features = form.in_features if chosen else form.out_features
        return init(features, side).to(form.device, form.wide)


def _check_bias(base: nn.Module) -> None:
    bias = getattr(base, "bias", None)
    if bias is not None and bias is not base._parameters.get("bias"):
        raise InputError(
            f"the bias of this {type(base).__name__} is no parameter: something "
            "computes it before each pass (pruning), and no scaled bias could replace "
            "it; make it permanent first, or leave the layer out of the targets."
        )


def _check_side(view: WeightView, side: Side) -> None:
    if side == "input" and isinstance(view, Lookup):
        raise InputError(
            "the input of an embedding is an index, which cannot be scaled; scale its "
            "output, or leave it out of `feedforward`."
        )
