"""LoftQ: choose a quantized base and a LoRA whose sum is near the weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact
from minipeft.torch import blockwise, pissa
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import NF2, NF4
from minipeft.torch.linear import check_no_forward, full_precision, weight_view
from minipeft.torch.lora import LoRA, LoRALinear, check_dropout
from minipeft.torch.operands import check_tensor
from minipeft.torch.qlora import QuantizedLinear
from minipeft.values import check_integer, check_kind, check_number


def init(
    W: Inexact[Tensor, "out_features in_features"],
    r: int,
    alpha: float,
    codebook: Float[Tensor, " codes"] = NF4,
    blocksize: int = 64,
    steps: int = 5,
) -> tuple[Blockwise, LoRA]:
    r"""Find a quantized base and an adapter with $Q + s B A \approx W$.

    Arguments and choice of the best pair: `reference.loftq.init`. Here the SVD is the
    randomized one. One step is still at least as good as plain quantization, because a
    projection never makes the error larger.

    Raises:
        InputError: if a number is out of range, or a value of W is not finite.

    Source: LoftQ (arXiv:2310.08659), algorithm 1.
    """
    check_integer("steps", steps)
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
    """Yield $Q_t = q(W - s B_{t-1} A_{t-1})$, then $s B_t A_t = SVD_r(W - Q_t)$.

    The SVD is the randomized one. The singular values of a quantizer's error fall
    slowly, as those of a random matrix do, so r approximate directions remove almost as
    much as the r exact ones.
    Quantizing is no projection, so the error may rise from one step to the next.
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
    r"""Return $\|W - Q - s B A\|_F$, with the scaling of the adapter in training."""
    check_tensor("W", W)
    restored = blockwise.dequantize(q)
    if restored.shape != W.shape:
        raise InputError(
            f"q has shape {tuple(restored.shape)}, and W {tuple(W.shape)}; give the "
            "codes of this weight."
        )
    return float(pissa.residual(W - restored, initial).norm())


def plan(
    weights: Mapping[str, Inexact[Tensor, "..."]],
    mean_bits: float,
    blocksize: int = 64,
) -> dict[str, int]:
    """Give each layer 4 bits or 2, so that a value costs `mean_bits` on average.

    Rule and arguments: `reference.loftq.plan`.

    Source: LoftQ (arXiv:2310.08659), section 4.3, mixed precision.
    """
    check_number("mean_bits", mean_bits)
    check_kind("weights", weights, Mapping)
    for name, W in weights.items():
        check_tensor(f"weights[{name!r}]", W)
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
    """An adapter and the quantized base that was computed together with it."""

    def __init__(self, q: Blockwise, initial: LoRA, dropout: float = 0.0):
        blockwise.check_parts(q)
        check_kind("initial", initial, LoRA)
        A, B = initial.A.detach(), initial.B.detach()
        super().__init__(A, B, initial.scaling, dropout)
        self.q = q  # LoftQLinear makes it its base


class LoftQLinear(LoRALinear):
    """LoRA on the quantized base; the layer does not keep the original weight.

    `unload` returns the quantized layer, because the quantized layer is the base.
    """

    def __init__(self, base: nn.Module, adapter: LoRA, name: str = "default"):
        found = base
        if isinstance(adapter, LoftQ):
            bias, form = cast(Any, base.bias), weight_view(base).form(base)
            new = QuantizedLinear(adapter.q, bias, form.dtype)
            found = new.in_place_of(base)
            del adapter.q
        super().__init__(found, adapter, name)


@dataclass(frozen=True)
class LoftQConfig:
    """LoftQ for the linear layers of a model; the arguments are those of `init`.

    codebooks: the codebooks of single layers by name, for mixed precision; every other
    layer takes `codebook`.
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
        """Return a quantized base and an adapter for each layer, on the layer's device.

        Raises:
            InputError: if a number is out of range, a weight is not finite, or a layer
                is not linear; the message names the layer.
        """
        adapters = {}
        for name, layer in layers.items():
            with naming(name):
                adapters[name] = self._adapter(name, layer)
        return adapters

    def _adapter(self, name: str, layer: nn.Module) -> LoftQ:
        check_dropout(self.dropout)
        check_kind("codebooks", self.codebooks, Mapping)
        view = weight_view(layer)
        if isinstance(layer, QuantizedLinear):
            raise InputError(
                "this layer is quantized, and LoftQ chooses the codes together with "
                "the adapter; inject it into the original model, and once."
            )
        if not view.linear:
            raise InputError(
                f"{type(layer).__name__} cannot be quantized; leave it out."
            )
        codebook = self.codebooks.get(name, self.codebook)
        W = view.turn(cast(Tensor, layer.weight)).detach().contiguous()
        check_no_forward(layer, "a quantized one")
        with full_precision(W.device):
            found = init(W, self.r, self.alpha, codebook, self.blocksize, self.steps)
        return LoftQ(*found, self.dropout)


def _gain(W: Inexact[Tensor, "..."], blocksize: int) -> float:
    two, four = (
        float((W - blockwise.dequantize(q)).double().square().mean())
        for q in (blockwise.quantize(W, codebook, blocksize) for codebook in (NF2, NF4))
    )
    return two - four
