"""Laws of HiRA alone: its update depends on the weight, and its rank may exceed r."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import hira, lora
from tests.exact import equal
from tests.parametrizations import ROWS
from tests.strategies import rationals

ROW = next(row for row in ROWS if row.name == "hira")


@given(st.data())
def test_the_update_is_linear_in_the_weight(data):
    case = ROW.case(data, "fractions")
    W, adapter = case.base, case.adapter
    other = data.draw(rationals(W.shape))
    apart = hira.delta(W, adapter) + hira.delta(other, adapter)
    assert equal(hira.delta(W + other, adapter), apart)
    assert equal(hira.delta(0 * W, adapter), 0 * W)


@given(st.data())
def test_on_a_weight_of_ones_it_is_lora(data):
    case = ROW.case(data, "fractions")
    a = case.adapter
    ones = np.ones(case.base.shape, int).astype(object)
    assert equal(hira.delta(ones, a), lora.delta(lora.LoRA(a.A, a.B, a.scaling)))


@given(st.data())
def test_the_update_of_the_merged_weight_does_not_lead_back(data):
    case = ROW.case(data, "fractions")
    merged, a = case.merged(), case.adapter
    back = hira.merge(merged, replace(a, scaling=-a.scaling))
    # Each weight is multiplied by (1 + c)(1 - c) = 1 - c^2.
    c = a.scaling * (a.B @ a.A)
    assert equal(back, case.base * (1 - c * c))


def test_a_factor_of_rank_one_gives_an_update_of_full_rank():
    W, ones = np.eye(5, dtype=np.float32), np.ones((5, 1), np.float32)
    update = hira.delta(W, hira.HiRA(ones.T, ones, 2.0))
    assert np.linalg.matrix_rank(update) == 5


@pytest.mark.parametrize(("r", "scaling"), [(0, 1.0), (4, 1.0), (2, np.inf)])
def test_a_start_out_of_range_is_refused(r, scaling):
    with pytest.raises(InputError, match=r"r is|scaling is"):
        hira.init(np.random.default_rng(0), 3, 5, r, scaling)
