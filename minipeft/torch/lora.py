"""LoRA: a frozen weight plus a trained product of two thin matrices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped
from minipeft.torch.linear import Adapted, Form, Lookup, layout, naming


class LoRA(nn.Module):
    """The update of one weight: scaling * B A.

    Args:
        A: float32 over a base of 16 bits, if small steps are not to be rounded away.
        B: in the dtype of A.
        scaling: a constant; not part of the state dict.
        dropout: the chance, in training, that an entry of x is dropped on the way to A.
    """

    def __init__(
        self,
        A: Float[Tensor, "r in_features"],
        B: Float[Tensor, "out_features r"],
        scaling: float,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scaling, self.dropout = scaling, dropout


def scaling(alpha: float, r: int, rank_stabilized: bool = False) -> float:
    r"""Return $\alpha / r$, or rsLoRA's $\alpha / \sqrt r$.

    With $\alpha / \sqrt r$ the update and its gradient keep their size as r grows.

    Source: LoRA (arXiv:2106.09685), section 4.1; rsLoRA (arXiv:2312.03732),
    theorem 3.2.
    """
    return alpha / sqrt(r) if rank_stabilized else alpha / r


def init(
    generator: torch.Generator | None,
    in_features: int,
    out_features: int,
    r: int,
    alpha: float,
    rank_stabilized: bool = False,
) -> LoRA:
    r"""Start at zero update: A random, B zero.

    $A \sim U(-1/\sqrt{k}, 1/\sqrt{k})$ with k = in_features, the Kaiming-uniform choice
    of every implementation in use (the paper writes a Gaussian); $B = 0$.

    Args:
        generator: the source of A, on the CPU, so that a seed means the same on every
            device; None for torch's own.
        in_features: columns of W.
        out_features: rows of W.
        r: rank of the update, 1 to min(in_features, out_features).
        alpha: numerator of the scaling.
        rank_stabilized: divide by sqrt(r) instead of r.

    Raises:
        InputError: if r is out of range.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """
    check_rank(r, in_features, out_features)
    bound = 1 / sqrt(in_features)
    A = torch.empty(r, in_features, device="cpu")
    B = torch.zeros(out_features, r, device="cpu")
    A.uniform_(-bound, bound, generator=generator)
    return LoRA(A, B, scaling(alpha, r, rank_stabilized))


def delta(lora: LoRA) -> Float[Tensor, "out_features in_features"]:
    r"""Return the update itself: $\Delta W = s B A$, in float32 or wider."""
    wide = torch.promote_types(lora.A.dtype, torch.float32)
    return lora.scaling * (lora.B.to(wide) @ lora.A.to(wide))


class LoRALinear(Adapted[LoRA]):
    r"""A frozen layer and its updates: $y = x W^T + b + s (x A^T) B^T$.

    The update is computed in the dtype of A and B and added to the base's output there;
    the sum is rounded once, to the dtype of the base's output. Several active adapters
    add up, each times its share.

    Source: LoRA (arXiv:2106.09685), equation 3.
    """

    def add(self, name: str, adapter: LoRA) -> None:
        """Hold another adapter, inactive at first; refuse one of another layer."""
        check_fits(self.layout.form(self.base), adapter)
        super().add(name, adapter)

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "... out_features"]:
        """Apply the adapted layer; two thin products cost O((in + out) r) a row."""
        if self.merged_weight is not None:
            return self.layout.forward(self.base, x, self.merged_weight)
        y = total = self.base(x)
        for share, lora in self.shares():
            p = lora.dropout if self.training else 0.0
            h = self.layout.project(self.base, x, lora.A, p)
            total = total + linear(share * lora.scaling * h, lora.B)
        return total.to(y.dtype)

    def delta(self) -> Float[Tensor, "out_features in_features"]:
        r"""Return the active update, $\Delta W = s B A$, in float32 or wider."""
        form = self.layout.form(self.base)
        total = torch.zeros(form.out_features, form.in_features, device=form.device)
        for share, lora in self.shares():
            total = total + share * delta(lora)
        return total

    def merged(self) -> Float[Tensor, "out_features in_features"]:
        r"""Return $W' = W + s B A$, rounded once to the dtype of W."""
        W = self.W
        return (W + self.delta()).to(W.dtype)


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA for the layers of a model; the arguments are those of `init` and `LoRA`."""

    r: int
    alpha: float
    rank_stabilized: bool = False
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[LoRA]]] = LoRALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, LoRA]:
        """Return a new adapter for each layer, where the layer lives.

        Raises:
            InputError: if r or dropout is out of range; the sentence names the layer.
        """
        adapters = {}
        for name, layer in layers.items():
            with naming(name):
                adapters[name] = self._adapter(layer, generator)
        return adapters

    def _adapter(self, layer: nn.Module, generator: torch.Generator | None) -> LoRA:
        check_dropout(self.dropout)
        found, hyper = layout(layer), (self.r, self.alpha, self.rank_stabilized)
        d, k, dtype, device = found.form(layer)
        if isinstance(found, Lookup):
            # Turned around, as its weight is: with A zero and B random, a token that
            # training never meets keeps its embedding.
            turned = init(generator, d, k, *hyper)
            A, B = (M.detach().T.contiguous() for M in (turned.B, turned.A))
            lora = LoRA(A, B, turned.scaling)
        else:
            lora = init(generator, k, d, *hyper)
        lora.dropout = self.dropout
        return lora.to(device, torch.promote_types(dtype, torch.float32))


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Refuse a rank that no update of this weight can have."""
    if not 1 <= r <= min(in_features, out_features):
        raise InputError(
            f"r is {r}; choose 1 to {min(in_features, out_features)} for a weight of "
            f"shape ({out_features}, {in_features})."
        )


def check_fits(form: Form, lora: LoRA) -> None:
    """Refuse matrices of another layer: one row of B would broadcast in silence."""
    r, shape = len(lora.A), (form.out_features, form.in_features)
    if lora.A.shape != (r, shape[1]) or lora.B.shape != (shape[0], r):
        raise InputError(
            f"A has shape {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}; for a "
            f"weight of shape {shape} they must be (r, {shape[1]}) and ({shape[0]}, r)."
        )


def check_dropout(p: float) -> None:
    """Refuse a chance that leaves nothing, or is none."""
    if not 0 <= p < 1:
        raise InputError(f"dropout is {p}; choose a chance in [0, 1).")
