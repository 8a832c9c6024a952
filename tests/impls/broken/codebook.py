"""Bugs of the codebooks."""

from statistics import NormalDist

import numpy as np

from minipeft.golden.drivers.reference import codebook as right
from tests.impls.broken import bug

F32 = np.float32
quantile = NormalDist().inv_cdf


@bug("codebook_table", "Literal")
def evaluates_the_formula(name):
    if name != "nf4":
        return right.codebook_table(name)
    return right.codebook_normal_float(4, 929 / 960)


@bug("codebook_table", "Literal")
def writes_four_decimals(name):
    codebook = right.codebook_table(name)
    return np.round(codebook, 4) if name == "nf4" else codebook


@bug("codebook_table", "CodeOrder")
def sorts_every_table(name):
    return np.sort(right.codebook_table(name))


@bug("codebook_table", "FP4TwoZeros")
def gives_code_8_the_smallest_value(name):
    codebook = right.codebook_table(name).copy()
    if name == "fp4":
        codebook[8] = -np.finfo(F32).tiny
    return codebook


@bug("codebook_table", "Quantiles")
def drops_the_middle_of_nf3(name):
    if name != "nf3":
        return right.codebook_table(name)
    return right.codebook_table("nf4")[::2]


@bug("codebook_normal_float", "ExactZero")
def is_symmetric(bits, offset):
    if bits != 2:
        return right.codebook_normal_float(bits, offset)
    points = np.linspace(1 - offset, offset, 2**bits)
    return np.array([quantile(p) / quantile(offset) for p in points], F32)


@bug("codebook_normal_float", "Quantiles")
def takes_the_middles_of_intervals(bits, offset):
    if bits < 5:
        return right.codebook_normal_float(bits, offset)
    edges = right.codebook_normal_float(bits, offset)
    return np.append((edges[:-1] + edges[1:]) / 2, F32(1))


@bug("codebook_normal_float", "Offset")
def has_an_offset_of_its_own(bits, offset):
    default = 929 / 960
    right.codebook_normal_float(bits, offset)  # refuses bad input
    return right.codebook_normal_float(bits, default)


@bug("codebook_normal_float", "OutOfRange")
def divides_infinity_by_infinity(bits, offset):
    if offset != 1:
        return right.codebook_normal_float(bits, offset)
    return np.full(2**bits, np.nan, F32)


@bug("codebook_normal_float", "OutOfRange")
def knows_one_bit(bits, offset):
    if bits != 1:
        return right.codebook_normal_float(bits, offset)
    return np.array([-1, 1], F32)


@bug("codebook_dynamic_map", "SingleSteps")
def computes_in_float64(signed):
    if not signed:
        return right.codebook_dynamic_map(signed)
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        fractions = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*fractions, *-fractions]
    return np.sort(np.array(values)).astype(F32)


@bug("codebook_dynamic_map", "Signed")
def mirrors_the_map(signed):
    codebook = right.codebook_dynamic_map(signed)
    return np.where(codebook == 1, codebook[-2], codebook) if signed else codebook


@bug("codebook_dynamic_map", "Unsigned")
def has_one_map_for_both_moments(signed):
    return right.codebook_dynamic_map(True)
