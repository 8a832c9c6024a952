"""LoftQ: quantize and start LoRA together, so that they sum to the weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact
from minipeft.torch import blockwise, pissa
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import NF2, NF4
from minipeft.torch.lora import LoRA, LoRALinear, check_dropout
from minipeft.torch.qlora import QuantizedLinear


def init(
    W: Inexact[Tensor, "out_features in_features"],
    r: int,
    alpha: float,
    codebook: Float[Tensor, " codes"] = NF4,
    blocksize: int = 64,
    steps: int = 5,
) -> tuple[Blockwise, LoRA]:
    r"""Find a quantized base and an adapter with $Q + s B A \approx W$.

    Of the first `steps` pairs of `alternate`, the one with the smallest error. So more
    steps never make it worse, and one is already at least as good as plain
    quantization: even a randomized SVD projects, and a projection only takes away.

    Args:
        W: the weight, every value finite.
        r: rank of the adapter, 1 to min(in_features, out_features).
        alpha: numerator of the scaling $s = \alpha / r$, positive.
        codebook: of the base, such as NF4, NF3 or NF2.
        blocksize: values that share a scale, a power of two.
        steps: alternations, at least 1; the paper takes 5.

    Raises:
        InputError: if a number is out of range, or a value of W is not finite.

    Source: LoftQ (arXiv:2310.08659), algorithm 1.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; take at least one.")
    pairs = islice(alternate(W, r, alpha, codebook, blocksize), steps)
    return min(pairs, key=lambda pair: error(W, *pair))


@torch.no_grad()
def alternate(
    W: Inexact[Tensor, "out_features in_features"],
    r: int,
    alpha: float,
    codebook: Float[Tensor, " codes"],
    blocksize: int,
) -> Iterator[tuple[Blockwise, LoRA]]:
    r"""Yield $Q_t = q(W - s B_{t-1} A_{t-1})$, then $s B_t A_t = SVD_r(W - Q_t)$.

    The SVD is the randomized one: the residual of a quantizer has a flat spectrum, of
    which the r exact directions are worth no more than r nearly exact ones. The first
    half is no projection, so the error may rise on the way.
    """
    s = pissa.checked_scaling(W, r, alpha)
    target = W
    while True:
        q = blockwise.quantize(target, codebook, blocksize)
        initial = pissa.principal_randomized(W - blockwise.dequantize(q), r, s)
        yield q, initial
        target = pissa.residual(W, initial)


@torch.no_grad()
def error(
    W: Inexact[Tensor, "out_features in_features"], q: Blockwise, initial: LoRA
) -> float:
    r"""Return $\|W - Q - s B A\|_F$, with the scaling that training will use."""
    return float(pissa.residual(W - blockwise.dequantize(q), initial).norm())


def plan(
    weights: Mapping[str, Inexact[Tensor, "..."]],
    mean_bits: float,
    blocksize: int = 64,
) -> dict[str, int]:
    r"""Give each layer 4 bits or 2, so that a value costs `mean_bits` on average.

    Four bits go first to the layers where they take the most squared error off a
    value, $(\|W - q_2(W)\|^2 - \|W - q_4(W)\|^2) / n$, until the next does not fit.
    (The paper gives them to the first layers of the model.)

    Args:
        weights: the layers by name.
        mean_bits: of the codes, 2 to 4; the scales come on top.
        blocksize: values that share a scale.

    Source: LoftQ (arXiv:2310.08659), section 4.3, mixed precision.
    """
    if not 2 <= mean_bits <= 4:
        raise InputError(f"mean_bits is {mean_bits}; choose 2 to 4.")
    gains = {name: _gain(W, blocksize) for name, W in weights.items()}
    spare = (mean_bits - 2) * sum(W.numel() for W in weights.values())
    bits = dict.fromkeys(weights, 2)
    for name in sorted(gains, key=gains.__getitem__, reverse=True):
        spare -= 2 * weights[name].numel()
        if spare < 0:
            break
        bits[name] = 4
    return bits


class LoftQ(LoRA):
    """An adapter, and the quantized base that it was found with."""

    def __init__(self, q: Blockwise, initial: LoRA, dropout: float = 0.0):
        A, B = initial.A.detach(), initial.B.detach()
        super().__init__(A, B, initial.scaling, dropout)
        self.q = q  # the layer takes it over as its base


class LoftQLinear(LoRALinear):
    """LoRA on the quantized base; the weight that was given is not kept.

    `unload` returns the quantized layer: that is the base here.
    """

    def __init__(self, base: nn.Linear, adapter: LoRA, name: str = "default"):
        found: nn.Module = base
        if isinstance(adapter, LoftQ):
            found = QuantizedLinear(adapter.q, base.bias, base.weight.dtype)
            del adapter.q
        super().__init__(found, adapter, name)


@dataclass(frozen=True)
class LoftQConfig:
    """LoftQ for the linear layers of a model; the arguments are those of `init`.

    codebooks: for the layers named here, instead of `codebook`: a mixed plan.
    """

    r: int
    alpha: float
    codebook: Float[Tensor, " codes"] = field(default=NF4, repr=False)
    blocksize: int = 64
    steps: int = 5
    codebooks: Mapping[str, Float[Tensor, " codes"]] = field(default_factory=dict)
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[LoRA]]] = LoftQLinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, LoftQ]:
        """Return a quantized base and an adapter for each layer, where it lives.

        Raises:
            InputError: if a number is out of range, a weight is not finite, or a layer
                is not linear; the sentence names the layer.
        """
        adapters = {}
        for name, layer in layers.items():
            with naming(name):
                adapters[name] = self._adapter(name, layer)
        return adapters

    def _adapter(self, name: str, layer: nn.Module) -> LoftQ:
        check_dropout(self.dropout)
        if not isinstance(layer, nn.Linear):
            raise InputError(
                f"{type(layer).__name__} cannot be quantized; leave it out."
            )
        codebook = self.codebooks.get(name, self.codebook)
        W = layer.weight.detach()
        found = init(W, self.r, self.alpha, codebook, self.blocksize, self.steps)
        return LoftQ(*found, self.dropout)


def _gain(W: Inexact[Tensor, "..."], blocksize: int) -> float:
    two, four = (
        float((W - blockwise.dequantize(q)).double().square().mean())
        for q in (blockwise.quantize(W, codebook, blocksize) for codebook in (NF2, NF4))
    )
    return two - four
