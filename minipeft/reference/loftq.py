"""LoftQ: choose a quantized base and a LoRA whose sum is near the weight."""

from collections.abc import Iterator, Mapping
from itertools import islice

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import blockwise, lora, pissa
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import NF2, NF4, Codebook
from minipeft.reference.lora import LoRA
from minipeft.shapes import Float
from minipeft.values import check_integer, check_kind, check_number

Weight = Float[np.ndarray, "out_features in_features"]


def init(
    W: Weight,
    r: int,
    alpha: float,
    codebook: Codebook = NF4,
    blocksize: int = 64,
    steps: int = 5,
) -> tuple[Blockwise, LoRA]:
    r"""Find a quantized base and an adapter with $Q + s B A \approx W$.

    Returns the pair with the smallest error among the first `steps` pairs of
    `alternate`. So more steps never make the error larger. One step is at least as
    good as plain quantization, because the nearest matrix of rank r to the error is
    never worse than zero.

    Args:
        W: the weight, every value finite.
        r: rank of the adapter, 1 to min(in_features, out_features).
        alpha: numerator of the scaling $s = \alpha / r$, positive.
        codebook: of the base, such as NF4, NF3 or NF2.
        blocksize: values that share a scale, a power of two.
        steps: alternations, at least 1; the paper compares 1, 5 and 10.

    Raises:
        InputError: if a number is out of range, or a value of W is not finite.

    Source: LoftQ (arXiv:2310.08659), algorithm 1.
    """
    check_integer("steps", steps, 1)
    pairs = islice(alternate(W, r, alpha, codebook, blocksize), steps)
    return min(pairs, key=lambda pair: error(W, *pair))


def alternate(
    W: Weight, r: int, alpha: float, codebook: Codebook, blocksize: int
) -> Iterator[tuple[Blockwise, LoRA]]:
    r"""Yield $Q_t = q(W - s B_{t-1} A_{t-1})$, then $s B_t A_t = SVD_r(W - Q_t)$.

    For a given Q, the SVD finds the best adapter. For a given adapter, quantization
    does not find the best Q: a larger absmax in a block makes all its steps coarser.
    So the error may rise from one step to the next.
    """
    s = pissa.checked_scaling(W, r, alpha)
    target = W
    while True:
        q = blockwise.quantize(target, codebook, blocksize)
        initial = pissa.principal(W - blockwise.dequantize(q), r, s)
        yield q, initial
        target = W - lora.delta(initial)


def error(W: Weight, q: Blockwise, initial: LoRA) -> float:
    r"""Return $\|W - Q - s B A\|_F$, with the scaling that training will use.

    Raises:
        InputError: if the base or the adapter has another layer's shape.
    """
    lora.check_fits(W, initial)
    blockwise.check_parts(q)
    if q.shape != W.shape:
        raise InputError(f"the base has shape {q.shape}; W has {W.shape}: give W's.")
    return float(np.linalg.norm(W - blockwise.dequantize(q) - lora.delta(initial)))


def plan(
    weights: Mapping[str, Float[np.ndarray, "..."]],
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

    Raises:
        InputError: if `mean_bits` is out of range, or a layer cannot be quantized.

    Source: LoftQ (arXiv:2310.08659), section 4.3, mixed precision.
    """
    check_number("mean_bits", mean_bits)
    check_kind("weights", weights, Mapping)
    if not 2 <= mean_bits <= 4:
        raise InputError(f"mean_bits is {mean_bits}; choose 2 to 4.")
    gains = {name: _gain(W, blocksize) for name, W in weights.items()}
    spare = (mean_bits - 2) * sum(W.size for W in weights.values())
    bits = dict.fromkeys(weights, 2)
    for name in sorted(gains, key=gains.__getitem__, reverse=True):
        spare -= 2 * weights[name].size
        if spare < 0:
            break
        bits[name] = 4
    return bits


def _gain(W: Float[np.ndarray, "..."], blocksize: int) -> float:
    two, four = (
        float(np.square(W - blockwise.dequantize(q)).mean(dtype=np.float64))
        for q in (blockwise.quantize(W, codebook, blocksize) for codebook in (NF2, NF4))
    )
    return two - four
