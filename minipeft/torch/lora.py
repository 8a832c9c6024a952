"""LoRA: a frozen weight plus a trained product of two thin matrices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Float
from minipeft.torch import experts
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.experts import ExpertsLoRA, LoRAExperts
from minipeft.torch.linear import (
    Form,
    Lookup,
    Output,
    Product,
    Stacked,
    Weight,
    check_shape,
    rows_of,
    weight_view,
)
from minipeft.torch.operands import check_generator, check_tensors
from minipeft.values import check_flag, check_integer, check_kind, check_number

MatrixA = Float[Tensor, "r in_features"]
MatrixB = Float[Tensor, "out_features r"]


class LoRA(nn.Module):
    """The update of one weight: scaling * B A.

    Args:
        A: in float32 even for a base of 16 bits, which would round small steps away.
        B: in the dtype of A.
        scaling: a constant; not part of the state dict.
        dropout: the probability, in training, that an entry of x is dropped before A.
    """

    def __init__(self, A: MatrixA, B: MatrixB, scaling: float, dropout: float = 0.0):
        super().__init__()
        check_tensors({"A": (A, "r in_features"), "B": (B, "out_features r")})
        check_number("scaling", scaling)
        check_dropout(dropout)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, product: Product, dtype: torch.dtype | None = None) -> Output:
        """Return the change of the output, $s (x A^T) B^T$, in the dtype of A.

        With a dtype, return the sum of the frozen output and the change, rounded to it.
        """
        check_fits(product.form, self)
        return self._changed(product, dtype)

    def _changed(self, product: Product, dtype: torch.dtype | None) -> Output:
        A, B = self.A, self.B
        if dtype is not None and product.adds(A, self.dropout):
            return product.added(A, B, self.scaling, dtype)
        h = product.project(A, self.dropout)
        change = linear(self.scaling * h, B)
        return change if dtype is None else (product.y + change).to(dtype)


def scaling(alpha: float, r: int, rank_stabilized: bool = False) -> float:
    r"""Return $\alpha / r$, or rsLoRA's $\alpha / \sqrt r$.

    Raises:
        InputError: if r is below 1, or alpha is not finite.

    Source: LoRA (arXiv:2106.09685), section 4.1; rsLoRA (arXiv:2312.03732),
    theorem 3.2.
    """
    check_integer("r", r, 1)
    check_number("alpha", alpha)
    check_flag("rank_stabilized", rank_stabilized)
    return alpha / sqrt(r) if rank_stabilized else alpha / r


def init(
    generator: torch.Generator | None,
    in_features: int,
    out_features: int,
    r: int,
    alpha: float,
    rank_stabilized: bool = False,
) -> LoRA:
    """Start at zero update: A random, B zero.

    Formula and arguments: `reference.lora.init`. The numbers are drawn on the CPU, so
    that a seed gives the same adapter on every device.

    Args:
        generator: the source of A, on the CPU; None for torch's own.
        in_features: columns of W.
        out_features: rows of W.
        r: rank of the update.
        alpha: numerator of the scaling.
        rank_stabilized: divide by sqrt(r) instead of r.

    Raises:
        InputError: if r is out of range, or the generator is not on the CPU.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """
    check_generator(generator)
    check_rank(r, in_features, out_features)
    bound = 1 / sqrt(in_features)
    A = torch.empty(r, in_features, dtype=torch.float32, device="cpu")
    B = torch.zeros(out_features, r, dtype=torch.float32, device="cpu")
    A.uniform_(-bound, bound, generator=generator)
    return LoRA(A, B, scaling(alpha, r, rank_stabilized))


def delta(adapter: LoRA) -> Weight:
    r"""Return the update $\Delta W = s B A$ in float32 or wider."""
    check_kind("adapter", adapter, LoRA)
    A, B = (adapter.A, "r in_features"), (adapter.B, "out_features r")
    check_tensors({"A": A, "B": B})
    wide = torch.promote_types(adapter.A.dtype, torch.float32)
    return adapter.scaling * (adapter.B.to(wide) @ adapter.A.to(wide))


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Refuse a rank below 1, or above the rank that W can have."""
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        check_integer(name, value, 1)
    check_integer("r", r)
    if not 1 <= r <= min(in_features, out_features):
        raise InputError(
            f"r is {r}; choose 1 to {min(in_features, out_features)} for a weight of "
            f"shape ({out_features}, {in_features})."
        )


def check_fits(form: Form, adapter: LoRA) -> None:
    """Refuse matrices of another layer; torch would broadcast a B of one row.

    Like `reference.lora.check_fits`, it allows a rank above the rank of W.
    """
    check_kind("adapter", adapter, LoRA)
    A, B = adapter.A, adapter.B
    r = rows_of(A)
    if r < 1:
        raise InputError("r is 0; give A at least one row and B at least one column.")
    check_shape("A", A, r, form.in_features)
    check_shape("B", B, form.out_features, r)


class LoRALinear(Adapted[LoRA]):
    """A frozen layer and its updates: $y = x W^T + b + s (x A^T) B^T$.

    The update is computed in the dtype of A and B and added to the base's output in
    that dtype. The sum is rounded once, to the dtype of the base's output. With several
    active adapters, the updates are added, each times its share.

    Source: LoRA (arXiv:2106.09685), equation 3.
    """

    @staticmethod
    def check_fits(form: Form, adapter: LoRA) -> None:
        """Refuse matrices of another layer, and adapters with a layer of their own.

        Such a layer would compute one update and merge another.
        """
        check_fits(form, adapter)
        if type(adapter).forward is not LoRA.forward:
            kind = type(adapter).__name__
            raise InputError(f"the adapter is a {kind}; wrap it in a {kind}Linear.")

    def adapt(self, product: Product) -> Output:
        """Return the output; a single adapter with the share 1 adds to it itself."""
        if list(self.active.values()) != [1]:
            return super().adapt(product)
        ((_, adapter),) = self.shares()
        if type(adapter).forward is not LoRA.forward:
            return super().adapt(product)
        return cast(Tensor, adapter(product, product.y.dtype))

    def change(self, adapter: LoRA, W: Weight) -> Weight:
        r"""Return $\Delta W = s B A$."""
        return delta(adapter)


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA for the layers of a model; the arguments are those of `init` and `LoRA`."""

    r: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[LoRA]]] = LoRALinear
    stacked: ClassVar[type[Adapted[ExpertsLoRA]]] = LoRAExperts

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, LoRA | ExpertsLoRA]:
        """Return a new adapter for each layer, on the device of the layer.

        Raises:
            InputError: if r or dropout is out of range; the message names the layer.
        """
        adapters: dict[str, LoRA | ExpertsLoRA] = {}
        for name, layer in layers.items():
            with naming(name):
                adapters[name] = self._adapter(layer, generator)
        return adapters

    def _adapter(
        self, layer: nn.Module, generator: torch.Generator | None
    ) -> LoRA | ExpertsLoRA:
        check_dropout(self.dropout)
        found, hyper = weight_view(layer), (self.r, self.alpha, self.rank_stabilized)
        if isinstance(found, Stacked):
            return self._of_experts(layer, generator)
        form = found.form(layer)
        d, k = form.shape
        if isinstance(found, Lookup):
            # An embedding stores the transpose: A is zero and B random, so a token that
            # does not occur in training keeps its embedding.
            turned = init(generator, d, k, *hyper)
            A, B = (M.detach().T.contiguous() for M in (turned.B, turned.A))
            new = LoRA(A, B, turned.scaling)
        else:
            new = init(generator, k, d, *hyper)
        new.dropout = self.dropout
        return new.to(form.device, form.wide)

    def _of_experts(
        self, layer: nn.Module, generator: torch.Generator | None
    ) -> ExpertsLoRA:
        if self.dropout:
            raise InputError(
                f"dropout is {self.dropout}, and experts take none: x is gathered for "
                "several of them at once; set dropout to 0, or leave them out."
            )

        def start(
            source: torch.Generator | None, form: Form
        ) -> tuple[Tensor, Tensor, float]:
            d, k = form.shape
            one = init(source, k, d, self.r, self.alpha, self.rank_stabilized)
            return one.A, one.B, one.scaling

        return experts.init(generator, layer, start)


def check_dropout(p: float) -> None:
    """Refuse a probability of dropout below 0, or of 1 and more."""
    check_number("dropout", p)
    if not 0 <= p < 1:
        raise InputError(f"dropout is {p}; choose a chance in [0, 1).")
