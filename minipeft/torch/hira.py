"""HiRA: the frozen weight times a product of thin matrices, entry by entry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn

from minipeft.torch import lora
from minipeft.torch.adapted import Adapted
from minipeft.torch.linear import Form, Output, Product, Weight
from minipeft.torch.lora import LoRA, LoRAConfig
from minipeft.torch.operands import check_tensors
from minipeft.values import check_kind, check_number


class HiRA(LoRA):
    """The trained factor of one weight: scaling * B A, multiplied entry by entry."""

    def forward(self, product: Product) -> Output:  # type: ignore[override]
        r"""Return the change of the output, $s\,x (W \odot B A)^T$.

        It costs as much time as the frozen product, and the memory of another W.
        """
        check_fits(product.form, self)
        return product.project(delta(product.W, self), self.dropout)


def delta(W: Weight, adapter: HiRA) -> Weight:
    r"""Return the update, $\Delta W = s\,W \odot B A$, in float32 or wider."""
    check_tensors({"W": (W, "out_features in_features")})
    check_fits(Form.of(W), adapter)
    product = lora.delta(adapter)
    return W.to(product.dtype) * product


def check_fits(form: Form, adapter: HiRA) -> None:
    """Refuse matrices of another layer, and an adapter of another method."""
    check_kind("adapter", adapter, HiRA)
    lora.check_fits(form, adapter)


class HiRALinear(Adapted[HiRA]):
    r"""A frozen layer and its update: $y = x W^T + b + s\,x (W \odot B A)^T$.

    With several active adapters, each one multiplies the frozen weight.

    Source: HiRA (ICLR 2025, openreview TwJrTz9cRS), equation 6.
    """

    check_fits = staticmethod(check_fits)

    def change(self, adapter: HiRA, W: Weight) -> Weight:
        r"""Return $\Delta W = s\,W \odot B A$."""
        return delta(W, adapter)


@dataclass(frozen=True)
class HiRAConfig:
    """HiRA for the layers of a model; A and B start as in LoRA.

    Args:
        r: rank of B A.
        scaling: the factor of the update; the paper uses 1.
        dropout: as in `LoRA`.
    """

    r: int
    scaling: float = 1.0
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[HiRA]]] = HiRALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, HiRA]:
        """Return a new adapter for each layer, on the device of the layer.

        Raises:
            InputError: if r, the scaling or dropout is out of range.
        """
        check_number("scaling", self.scaling)
        thin = LoRAConfig(self.r, self.r, dropout=self.dropout)
        found = thin.adapters(layers, generator)
        return {name: self._adapter(cast(LoRA, found[name])) for name in layers}

    def _adapter(self, new: LoRA) -> HiRA:
        A, B = new.A.detach(), new.B.detach()
        return HiRA(A, B, self.scaling, new.dropout)
