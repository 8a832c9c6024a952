"""Cases of codebook_table, codebook_normal_float and codebook_dynamic_map."""

from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from minipeft.golden.cases import Alternative, File, Spec
from minipeft.golden.tensors import Array
from minipeft.golden.vectors import Note
from minipeft.reference.codebook import FP4, normal_float

F32 = np.float32
PUBLISHED_OFFSET = 0.9677083  # 929/960, as it is written where NF4 comes from
QLORA = "https://arxiv.org/abs/2305.14314"
NF4_ORIGIN = "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/938"
SINGLE = "those who take float32 quantiles at float32 points, as NF4's authors did"

NOTES = {
    "Literal": Note(
        "CONVENTION",
        "NF4 is the published table, literally. Its own formula, evaluated in float64, "
        "gives other last bits in most of the sixteen values.",
        "Weights decode to other bits than everybody else's; with a table of four "
        "decimals, to other values.",
        (QLORA, NF4_ORIGIN),
    ),
    "CodeOrder": Note(
        "CONVENTION",
        "Values stand in the order of their codes. That of FP4 is the order of its "
        "bits: 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, then the negative ones.",
        "A sorted table makes other weights of the same bytes.",
        (),
    ),
    "FP4TwoZeros": Note(
        "CONVENTION",
        "Code 8 of FP4 is zero as well, here without a sign.",
        "Only the sign of a zero.",
        (),
    ),
    "Quantiles": Note(
        "BASIC",
        "Quantiles of the normal distribution at evenly spaced probabilities, divided "
        "by the largest: float64, rounded once to float32.",
        "Middles of the intervals, or expectations, make another data type.",
        (QLORA,),
    ),
    "ExactZero": Note(
        "CONVENTION",
        "Zero is a value, so that a zero weight stays zero; the positive side has one "
        "value more than the negative one.",
        "A symmetric table has no zero, or wastes a code.",
        (QLORA,),
    ),
    "Offset": Note(
        "CONVENTION",
        "The outermost probability is a parameter; 929/960 for the published table, "
        "or 0.9677083 where it is written in seven digits.",
        "Another one shifts all values but -1, 0 and 1.",
        (NF4_ORIGIN,),
    ),
    "OutOfRange": Note(
        "EDGE_CASE",
        "A width below 2 or above 8 bits, an offset outside of (1/2, 1).",
        "A code is at most a byte, and one bit leaves no negative value. At 1/2 the "
        "divisor is zero, below it all signs turn, at 1 it is infinite.",
        (),
    ),
    "Signed": Note(
        "BASIC",
        "The dynamic map for values of both signs: 127 negative ones, zero, 128 "
        "positive ones. 1.0 has no counterpart.",
        "A mirrored map has 255 values, or zero twice, and all codes move.",
        ("https://arxiv.org/abs/2110.02861",),
    ),
    "Unsigned": Note(
        "BASIC",
        "The dynamic map for values that are never negative: the bit of the sign goes "
        "to the fraction.",
        "A second moment read with the signed map turns negative.",
        ("https://arxiv.org/abs/2110.02861",),
    ),
    "SingleSteps": Note(
        "NUMERICS",
        "As published, in float32: the step is rounded, then each point, start + i "
        "step or stop - i step from the nearer end, is rounded once, as a fused "
        "multiply-add does, then every other operation.",
        "In float64, 72 of the 256 signed and 100 of the unsigned values differ in the "
        "last bit, with the product rounded on its own 42 and 31: decoded states are "
        "not those of other libraries.",
        (),
    ),
}


HEADERS = {
    "table": ("The values of a named data type, in the order of their codes.",),
    "normal_float": (
        "q_i = Q(p_i) / Q(offset), Q the inverse normal distribution; p goes from",
        "offset to 1/2 in 2^(bits-1) even steps on the positive side, in one step",
        "less on the negative side; and 0.",
    ),
    "dynamic_map": (
        "10^(i-6) times the midpoints of even steps from 0.1 to 1, i = 0 to 6: 2^i",
        "steps and both signs, or 2^(i+1) steps; 0; 1. Ascending.",
    ),
}


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    cases = {"table": _tables, "normal_float": _quantiles, "dynamic_map": _maps}
    for name, header in HEADERS.items():
        module = "minipeft.reference.codebook"
        yield File(
            operation=f"codebook_{name}",
            header=header,
            source=module if name == "table" else f"{module}.{name}",
            notes=NOTES,
            specs=[*cases[name]()],
        )


def _tables() -> Iterator[Spec]:
    yield _table("nf4", "Literal CodeOrder ExactZero")
    signed = np.where(np.arange(16) == 8, -FP4, FP4)
    spec = replace(_table("fp4", "CodeOrder FP4TwoZeros"), result="acceptable")
    ways = (Alternative("those who give code 8 a sign", {"codebook": signed}),)
    yield replace(spec, alternatives=ways)
    for bits in (3, 2):
        spec = _table(f"nf{bits}", "Quantiles ExactZero Offset")
        seven = normal_float(bits, PUBLISHED_OFFSET)
        others = {
            SINGLE: single(bits, PUBLISHED_OFFSET),
            f"{SINGLE}, from 929/960": single(bits, 929 / 960),
            "those who write the offset in seven digits": seven,
        }
        yield _either(spec, others)


def _table(name: str, flags: str) -> Spec:
    return Spec(name.upper(), tuple(flags.split()), {}, {"name": name})


def _quantiles() -> Iterator[Spec]:
    for bits in range(2, 9):
        yield _normal_float(f"{bits} bits", "Quantiles ExactZero", bits, 929 / 960)
    comment = "the offset in seven digits"
    yield _normal_float(comment, "Offset", 4, PUBLISHED_OFFSET)
    for offset in (0.75, 0.995):
        yield _normal_float(f"offset {offset}", "Offset Quantiles", 4, offset)
    for bits, offset in ((1, 0.9), (0, 0.9), (9, 0.9), (4, 0.5), (4, 1.0), (4, 0.25)):
        comment = f"{bits} bits, offset {offset}"
        parameters = {"bits": bits, "offset": offset}
        yield Spec(comment, ("OutOfRange",), {}, parameters, result="invalid")


def _maps() -> Iterator[Spec]:
    yield Spec("both signs", ("Signed", "SingleSteps"), {}, {"signed": True})
    yield Spec("one sign", ("Unsigned", "SingleSteps"), {}, {"signed": False})


def _normal_float(comment: str, flags: str, bits: int, offset: float) -> Spec:
    parameters = {"bits": bits, "offset": offset}
    spec = Spec(comment, tuple(flags.split()), {}, parameters)
    return _either(spec, {SINGLE: single(bits, offset)})


def _either(spec: Spec, ways: dict[str, Array]) -> Spec:
    others = tuple(Alternative(name, {"codebook": ways[name]}) for name in ways)
    return replace(spec, result="acceptable", alternatives=others)


def single(bits: int, offset: float) -> Array:
    """Return the quantiles as NF4's authors computed them: every step in float32."""
    half = 2 ** (bits - 1)
    positive, negative = _single_side(offset, half), -_single_side(offset, half - 1)
    values = np.sort(np.concatenate([positive, negative, np.zeros(1, F32)]))
    return values / values.max()


def _single_side(offset: float, steps: int) -> Array:
    first, last = np.float64(F32(offset)), np.float64(0.5)
    step, i = np.float64(F32((last - first) / steps)), np.arange(steps + 1)
    falling, rising = first + step * i, last - step * (steps - i)
    points = np.where(i < (steps + 1) // 2, falling, rising).astype(F32)
    return np.array([NormalDist().inv_cdf(p) for p in points[:-1]], F32)
