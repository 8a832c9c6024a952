"""The contract of every parametrization, in the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import linear
from tests.bounds import assert_both_within
from tests.exact import assert_gradients, equal
from tests.parametrizations import ROWS, Case, weight
from tests.strategies import integers, rationals, seeds, sizes
from tests.tolerance import assert_bits, assert_sums

pytestmark = pytest.mark.slow

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
rational_rows = pytest.mark.parametrize(
    "row", [row for row in ROWS if row.fractions], ids=lambda row: row.name
)


@rational_rows
@given(data=st.data())
def test_merged_is_the_same_function_over_the_rationals(row, data):
    case = row.case(data, "fractions")
    assert equal(case.merged_forward(), case.forward())


@rows
@given(data=st.data())
def test_merged_is_the_same_function_bit_for_bit(row, data):
    case = row.case(data, "integers")
    assert_sums(case.merged_forward(), case.forward())


@rows
@given(data=st.data())
def test_merged_is_the_same_function_up_to_rounding(row, data):
    case = row.case(data, "gaussians")
    sizes = case.counted()
    formulas = (sizes.merged_forward(), sizes.forward())
    assert_both_within(case.merged_forward(), case.forward(), *formulas)


@rows
@given(data=st.data())
def test_gradients_are_exact_differences(row, data):
    # The loss <G, y> is linear in x and in each trained array taken alone, so a central
    # difference is exact: over fractions, or on integers in float64.
    case = row.case(data, "fractions" if row.fractions else "integers")

    def loss(*values):
        y = case.at(*values).forward()
        return (case.grad_y.astype(object) * y.astype(object)).sum()

    steps = rationals if row.fractions else integers
    assert_gradients(loss, case.values(), case.backward(), data, steps)


@rows
@given(seed=seeds, s=sizes(), biased=st.booleans())
def test_a_new_adapter_changes_nothing(row, seed, s, biased):
    rng = np.random.default_rng(seed)
    W, x, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((s.d, s.k), (*s.lead, s.k), (s.d,))
    )
    base, frozen, new = row.start(rng, W, s.r)
    bias = b if biased else None
    plain = linear.forward(x, weight(base), bias)
    case = Case(row, row.module, x, base, bias, frozen, new, plain)
    assert_bits(case.forward(), plain)
    assert_bits(case.merged(), weight(base))
    assert bias is None or np.array_equal(case.merged_bias(), bias)
