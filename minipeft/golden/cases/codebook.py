"""Cases of codebook_table, codebook_normal_float and codebook_dynamic_map."""

from collections.abc import Iterator
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from minipeft.golden.cases import Alternative, File, Spec
from minipeft.golden.tensors import Array
from minipeft.reference.codebook import FP4, normal_float

F32 = np.float32
PUBLISHED_OFFSET = 0.9677083  # 929/960, as written in the source of NF4
QLORA = "https://arxiv.org/abs/2305.14314"
NF4_ORIGIN = "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/938"
SINGLE = "float32-quantiles"


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
            specs=[*cases[name]()],
        )


def _tables() -> Iterator[Spec]:
    yield _table("nf4", "Literal CodeOrder ExactZero")
    signed = np.where(np.arange(16) == 8, -FP4, FP4)
    spec = replace(_table("fp4", "CodeOrder FP4TwoZeros"), result="acceptable")
    ways = (Alternative("fp4-signed-zero", {"codebook": signed}),)
    yield replace(spec, alternatives=ways)
    for bits in (3, 2):
        spec = _table(f"nf{bits}", "Quantiles ExactZero Offset")
        seven = normal_float(bits, PUBLISHED_OFFSET)
        others = {
            SINGLE: single(bits, PUBLISHED_OFFSET),
            "float32-quantiles-929-960": single(bits, 929 / 960),
            "offset-in-seven-digits": seven,
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
