"""IA3: one trained vector that rescales keys, values, or the feed-forward layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped
from minipeft.torch.linear import Adapted, Lookup, layout, naming


class IA3(nn.Module):
    """The trained vector and the side of the layer that it scales.

    Keys and values: l has out_features numbers and scales the output. Feed-forward:
    l has in_features numbers and scales the input of the layer after the
    nonlinearity, which is the output of that nonlinearity.
    """

    l: Float[Tensor, " features"]  # noqa: E741  # the paper's name

    def __init__(self, l: Float[Tensor, " features"], feedforward: bool):  # noqa: E741
        super().__init__()
        self.l = nn.Parameter(l)
        self.feedforward = feedforward


def init(features: int, feedforward: bool = False) -> IA3:
    """Start at no change: every l is 1.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """
    return IA3(torch.ones(features), feedforward)


class IA3Linear(Adapted[IA3]):
    r"""A frozen layer, rescaled: $y = l \odot (x W^T + b)$, or $(l \odot x) W^T + b$.

    Several active adapters add up what each of them changes about 1, times its share.

    Source: IA3 (arXiv:2205.05638), section 3.3.
    """

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "... out_features"]:
        """Apply the rescaled layer."""
        inner, outer = self._scale(feedforward=True), self._scale(feedforward=False)
        if self.merged_weight is not None:
            y = self.layout.forward(self.base, x, self.merged_weight)
            # The base adds the bias as it was, and keys and values scale that too.
            bias = getattr(self.base, "bias", None)
            return (
                y if outer is None or bias is None else y + (self._bias(outer) - bias)
            )
        y = self.base(x if inner is None else (inner * x).to(x.dtype))
        return cast(Tensor, y if outer is None else (outer * y).to(y.dtype))

    @property
    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The effective bias: that of keys and values is scaled with the rest."""
        outer = self._scale(feedforward=False)
        bias = getattr(self.base, "bias", None)
        return bias if outer is None or bias is None else self._bias(outer)

    def merged(self) -> Float[Tensor, "out_features in_features"]:
        r"""Return $W' = \Lambda_l W$ or $W \Lambda_l$, in the dtype of W."""
        W = total = self.W
        inner, outer = self._scale(feedforward=True), self._scale(feedforward=False)
        if inner is not None:
            total = total * inner
        if outer is not None:
            total = outer[:, None] * total
        return total.to(W.dtype)

    def unload(self) -> nn.Module:
        """Return a plain layer; once merged, its bias is the scaled one."""
        bias = self.bias
        if self.merged_weight is not None and bias is not None:
            self.base.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return super().unload()

    def _scale(self, feedforward: bool) -> Float[Tensor, " features"] | None:
        chosen = [(s, a) for s, a in self.shares() if a.feedforward == feedforward]
        if not chosen:
            return None
        if [share for share, _ in chosen] == [1]:
            return chosen[0][1].l
        total = chosen[0][1].l.new_tensor(1 - sum(share for share, _ in chosen))
        for share, adapter in chosen:
            total = total + share * adapter.l
        return total

    def _bias(
        self, outer: Float[Tensor, " out_features"]
    ) -> Float[Tensor, " out_features"]:
        bias = cast(Tensor, self.base.bias)
        return (outer * bias).to(bias.dtype)


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
        """Return a new adapter for each layer, where the layer lives.

        Args:
            layers: by name.
            generator: not used: every l starts at 1.

        Raises:
            InputError: if a name of `feedforward` matches none of the layers, or an
                embedding, whose input is no vector to scale.
        """
        for pattern in self.feedforward:
            if not any(_matches(name, pattern) for name in layers):
                raise InputError(
                    f"the feed-forward layer {pattern!r} is none of the targets; "
                    f"choose from {', '.join(layers)}."
                )
        return {name: self._adapter(name, layer) for name, layer in layers.items()}

    def _adapter(self, name: str, layer: nn.Module) -> IA3:
        found = layout(layer)
        feedforward = any(_matches(name, pattern) for pattern in self.feedforward)
        if feedforward and isinstance(found, Lookup):
            with naming(name):
                raise InputError(
                    "the input of an embedding is an index, which cannot be scaled; "
                    "leave it out of `feedforward`."
                )
        d, k, dtype, device = found.form(layer)
        adapter = init(k if feedforward else d, feedforward)
        return adapter.to(device, torch.promote_types(dtype, torch.float32))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
