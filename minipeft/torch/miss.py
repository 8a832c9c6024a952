"""MiSS: one small trained matrix that all shards of the input share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Float
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.linear import (
    Form,
    Output,
    Product,
    Weight,
    check_shape,
    rows_of,
    weight_view,
)
from minipeft.torch.lora import check_dropout
from minipeft.torch.operands import check_tensors
from minipeft.values import check_integer, check_kind

MatrixD = Float[Tensor, "r out_features"]


class MiSS(nn.Module):
    """The trained matrix D, added to each shard of r neighbouring columns of W.

    Args:
        D: in float32 even for a base of 16 bits, which would round small steps away.
        dropout: the probability, in training, that an entry of x is dropped before D.
    """

    D: MatrixD

    def __init__(self, D: MatrixD, dropout: float = 0.0):
        super().__init__()
        check_tensors({"D": (D, "r out_features")})
        check_dropout(dropout)
        self.D, self.dropout = nn.Parameter(D), dropout

    def forward(self, product: Product) -> Output:
        r"""Return the change of the output, $\mathrm{fold}(x) D$, in the dtype of D.

        The fold is a product with a matrix of zeros and ones, so it also serves an
        embedding.
        """
        check_fits(product.form, self)
        r = len(self.D)
        ones = torch.eye(r, dtype=self.D.dtype, device=self.D.device)
        fold = _repeated(ones, product.form.in_features).T
        return linear(product.project(fold, self.dropout), self.D.T)


def init(in_features: int, out_features: int, r: int) -> MiSS:
    """Start at zero update: D is zero, but its gradient is not."""
    check_integer("in_features", in_features, 1)
    check_integer("out_features", out_features, 0)
    check_integer("r", r)
    if not 1 <= r <= in_features:
        raise InputError(f"r is {r}; choose 1 to {in_features}, the inputs of W.")
    return MiSS(torch.zeros(r, out_features, dtype=torch.float32, device="cpu"))


def delta(adapter: MiSS, in_features: int) -> Weight:
    r"""Return the update, $\Delta W_{oi} = D_{i \bmod r,\,o}$, in float32 or wider."""
    check_kind("adapter", adapter, MiSS)
    check_tensors({"D": (adapter.D, "r out_features")})
    check_integer("in_features", in_features, 0)
    wide = torch.promote_types(adapter.D.dtype, torch.float32)
    return _repeated(adapter.D, in_features).T.to(wide)


def check_fits(form: Form, adapter: MiSS) -> None:
    """Refuse a matrix of another layer; torch would broadcast a single column."""
    check_kind("adapter", adapter, MiSS)
    r = rows_of(adapter.D)
    if r < 1:
        raise InputError("r is 0; give D at least one row.")
    check_shape("D", adapter.D, r, form.out_features)


class MiSSLinear(Adapted[MiSS]):
    r"""A frozen layer and its update: $y = x W^T + b + \mathrm{fold}(x) D$.

    Source: MiSS (arXiv:2409.15371), section 4.2.
    """

    check_fits = staticmethod(check_fits)

    def change(self, adapter: MiSS, W: Weight) -> Weight:
        r"""Return $\Delta W_{oi} = D_{i \bmod r,\,o}$."""
        return delta(adapter, W.shape[1])


@dataclass(frozen=True)
class MiSSConfig:
    """MiSS for the layers of a model; the arguments are those of `init` and `MiSS`."""

    r: int
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[MiSS]]] = MiSSLinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, MiSS]:
        """Return a new adapter for each layer, on the device of the layer.

        Args:
            layers: by name.
            generator: not used: every D starts at zero.

        Raises:
            InputError: if r or dropout is out of range; the message names the layer.
        """
        adapters = {}
        for name, layer in layers.items():
            with naming(name):
                check_dropout(self.dropout)
                form = weight_view(layer).form(layer)
                new = init(form.in_features, form.out_features, self.r)
            new.dropout = self.dropout
            adapters[name] = new.to(form.device, form.wide)
        return adapters


def _repeated(rows: Float[Tensor, "r n"], in_features: int) -> Float[Tensor, "k n"]:
    # Row i mod r in the place of each input i.
    return rows[torch.arange(in_features, device=rows.device) % len(rows)]
