"""Laws of MiSS alone: every r-th input has the same row of D."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import lora, miss
from tests.exact import equal
from tests.parametrizations import ROWS

ROW = next(row for row in ROWS if row.name == "miss")


@given(st.data())
def test_every_number_of_the_update_is_the_one_that_the_formula_names(data):
    adapter = ROW.case(data, "fractions").adapter
    k = data.draw(st.integers(1, 12))  # also r that does not divide in, or exceeds it
    update, r = miss.delta(adapter, k), len(adapter.D)
    assert update.shape == (adapter.D.shape[1], k)
    for (o, i), value in np.ndenumerate(update):
        assert value == adapter.D[i % r, o]


@given(st.data())
def test_it_is_lora_whose_frozen_a_holds_zeros_and_ones(data):
    case = ROW.case(data, "fractions")
    D, k = case.adapter.D, case.base.shape[1]
    A = np.eye(len(D), dtype=int).astype(object)[:, np.arange(k) % len(D)]
    equivalent = lora.LoRA(A, D.T, 1)
    assert equal(miss.delta(case.adapter, k), lora.delta(equivalent))
    assert equal(miss.fold(case.x, len(D)), case.x @ A.T)
    ours = case.backward()
    theirs = lora.backward(case.grad_y, case.x, case.base, equivalent)
    assert equal(ours.x, theirs.x)
    assert equal(ours.D, theirs.B.T)


@pytest.mark.parametrize("r", [0, -1, 4])
def test_more_rows_than_inputs_are_refused(r):
    with pytest.raises(InputError, match=rf"r is {r}; choose 1 to 3"):
        miss.init(3, 5, r)


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="r is 0"):
        miss.fold(np.ones(3, np.float32), 0)
