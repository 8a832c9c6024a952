"""The values that a few bits stand for: NF4, FP4, NF3, NF2, the dynamic 8-bit map."""

from statistics import NormalDist

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Float, check_shapes
from minipeft.values import check_flag, check_integer, check_number

Codebook = Float[np.ndarray, " codes"]

# The published numbers: the published formula gives other last bits, because the
# numbers were computed from float32 probabilities (see `normal_float`).
NF4: Codebook = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)

# Sign, two exponent bits, one mantissa bit; divided by 12. The order is that of the
# bits, so the values are not sorted, and codes 0 and 8 are both zero.
FP4: Codebook = np.array(
    [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3],
    dtype=np.float32,
) / np.float32(12)


def normal_float(bits: int, offset: float = 929 / 960) -> Codebook:
    r"""Return quantiles of the standard normal distribution, divided by the largest.

    $q_i = \Phi^{-1}(p_i) / \Phi^{-1}(\delta)$ with $p$ evenly spaced from the offset
    $\delta$ to $1/2$: $2^{b-1}$ points on the positive side, $2^{b-1} - 1$ on the
    negative side, and an exact zero between them.

    Args:
        bits: width of a code, 2 to 8.
        offset: the outermost probability; 929/960 is the mean of 1 - 1/30 and 1 - 1/32.

    Returns:
        `2**bits` values in [-1, 1], ascending, float32.

    Raises:
        InputError: if `bits` or `offset` is out of range.

    Source: QLoRA (arXiv:2305.14314), section 3 and appendix E.
    """
    check_integer("bits", bits, 2, 8)
    check_number("offset", offset)
    if not 0.5 < offset < 1:
        raise InputError(f"offset is {offset}; choose a probability in (1/2, 1).")
    half = 2 ** (bits - 1)
    positive = [_quantile(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    negative = [-_quantile(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    values = np.array([*negative, 0.0, *reversed(positive)])
    return (values / values.max()).astype(np.float32)


def dynamic_map(signed: bool = True) -> Codebook:
    """Return the 256 values of the dynamic 8-bit data type, ascending.

    A code holds a decimal exponent i - 6 as a row of zero bits, and a linear fraction
    in the bits that remain. The values are $10^{i-6}$ times the midpoints of
    `linspace(0.1, 1, 2^i + 1)` for i = 0 … 6, positive and negative. The unsigned map
    uses the sign bit for the fraction, with $2^{i+1} + 1$ points. Both maps also hold 0
    and 1.0, but not -1.0, so the signed map is not symmetric.

    Args:
        signed: True: both signs, as for a first moment or centred scales; False: for a
            second moment, which is never negative.

    Returns:
        256 values, computed in float32 as published.

    Source: 8-bit optimizers (arXiv:2110.02861), sections 1.3 and 2.2.
    """
    check_flag("signed", signed)
    values = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = _linspace32(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        fractions = np.float32(10.0 ** (i - 6)) * means
        values += [*fractions, *(-fractions if signed else [])]
    return np.sort(np.array(values, dtype=np.float32))


def code_bits(codebook: Codebook) -> int:
    """Return the number of bits of a code.

    Raises:
        InputError: if the codebook is not one axis of 2, 4, 8, 16 … 256 finite floats.
    """
    check_shapes({"the codebook": (codebook, "codes")})
    bits = codebook.size.bit_length() - 1
    if codebook.size != 2**bits or not 1 <= bits <= 8:
        raise InputError(
            f"the codebook has {codebook.size} values; give 2, 4, 8, 16 … 256 of them."
        )
    bad = np.flatnonzero(~np.isfinite(codebook))
    if bad.size:
        raise InputError(
            f"the codebook holds {codebook[bad[0]]} at code {bad[0]}; give finite "
            "values."
        )
    return bits


def _quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)


def _linspace32(start: float, stop: float, points: int) -> Codebook:
    # From both ends, with a float32 step and one rounding (a fused multiply-add, here
    # by way of float64): any other order changes the last bit of up to 72 values.
    first, last = np.float64(np.float32(start)), np.float64(np.float32(stop))
    step = np.float64(np.float32((last - first) / (points - 1)))
    i = np.arange(points)
    rising, falling = first + step * i, last - step * (points - 1 - i)
    return np.where(i < points // 2, rising, falling).astype(np.float32)


NF3: Codebook = normal_float(3)
NF2: Codebook = normal_float(2)
