"""LoRA on experts is LoRA on the tokens of each expert, in the reference."""

from dataclasses import dataclass
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.errors import InputError
from minipeft.reference import experts, lora
from minipeft.reference.experts import ExpertsLoRA
from minipeft.reference.lora import LoRA
from tests.exact import assert_gradients, equal
from tests.strategies import POWERS_OF_TWO, integers, rationals, seeds, sizes
from tests.tolerance import assert_bits, assert_sums


@dataclass(frozen=True)
class Case:
    """A stack with its updates, and tokens; the number of experts is never the rank."""

    x: np.ndarray
    chosen: np.ndarray
    W: np.ndarray
    bias: np.ndarray
    adapter: ExpertsLoRA
    grad_y: np.ndarray


@st.composite
def cases(draw, tensor, scalings):
    s = draw(sizes(largest=6))
    n = draw(st.integers(1, 5).filter(lambda n: n != s.r))
    chosen = np.random.default_rng(draw(seeds)).integers(0, n, s.lead)
    A, B = draw(tensor((n, s.r, s.k))), draw(tensor((n, s.d, s.r)))
    return Case(
        x=draw(tensor((*s.lead, s.k))),
        chosen=np.asarray(chosen),
        W=draw(tensor((n, s.d, s.k))),
        bias=draw(tensor((n, s.d))),
        adapter=ExpertsLoRA(A, B, draw(scalings)),
        grad_y=draw(tensor((*s.lead, s.d))),
    )


rational_cases = cases(rationals, st.sampled_from([Fraction(2, 3), Fraction(-5, 7)]))
integer_cases = cases(integers, st.sampled_from(POWERS_OF_TWO))


def forward(case, **changed):
    parts = {"x": case.x, "W": case.W, "adapter": case.adapter} | changed
    return experts.forward(
        parts["x"], case.chosen, parts["W"], parts["adapter"], case.bias
    )


@given(integer_cases)
def test_each_expert_is_lora_on_its_own_tokens(case):
    y, gradients = forward(case), backward(case)
    merged = experts.merge(case.W, case.adapter)
    for e in range(len(case.W)):
        one = LoRA(case.adapter.A[e], case.adapter.B[e], case.adapter.scaling)
        own = case.chosen == e
        x, grad_y = case.x[own], case.grad_y[own]
        assert_sums(y[own], lora.forward(x, case.W[e], one, case.bias[e]))
        expected = lora.backward(grad_y, x, case.W[e], one)
        assert_sums(gradients.x[own], expected.x)
        assert_sums(gradients.A[e], expected.A)
        assert_sums(gradients.B[e], expected.B)
        assert_sums(merged[e], lora.merge(case.W[e], one))


def backward(case):
    return experts.backward(case.grad_y, case.x, case.chosen, case.W, case.adapter)


@given(rational_cases)
def test_merged_is_the_same_function_over_the_rationals(case):
    merged = experts.merge(case.W, case.adapter)
    none = ExpertsLoRA(0 * case.adapter.A, case.adapter.B, case.adapter.scaling)
    assert equal(forward(case, W=merged, adapter=none), forward(case))


@given(rational_cases, st.data())
def test_gradients_are_exact_differences(case, data):
    def loss(x, A, B):
        adapter = ExpertsLoRA(A, B, case.adapter.scaling)
        return (case.grad_y * forward(case, x=x, adapter=adapter)).sum()

    values = (case.x, case.adapter.A, case.adapter.B)
    assert_gradients(loss, values, backward(case), data)


@given(seeds, sizes(), st.booleans())
def test_a_new_adapter_changes_nothing_and_no_two_experts_start_alike(seed, s, stable):
    new = experts.init(np.random.default_rng(seed), (3, s.d, s.k), s.r, 16, stable)
    assert new.scaling == lora.scaling(16, s.r, stable)
    assert not experts.delta(new).any()
    assert (abs(new.A) <= 1 / np.sqrt(s.k)).all()
    W = np.random.default_rng(seed).standard_normal((3, s.d, s.k)).astype(np.float32)
    assert_bits(experts.merge(W, new), W)
    assert not np.array_equal(new.A[0], new.A[1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chosen": np.array([0, 2])}, "expert 2 is chosen; choose 0 to 1"),
        ({"chosen": np.array([-1, 0])}, "expert -1 is chosen"),
        ({"chosen": np.array([0.0, 1.0])}, "chosen has dtype float64"),
        ({"chosen": np.array([0])}, r"chosen has .* shape \(1,\); .* shape \(2,\)"),
        ({"bias": np.zeros((1, 5), np.float32)}, "bias has shape"),
        ({"A": np.zeros((1, 3, 4), np.float32)}, "A has shape"),
        ({"A": np.zeros((2, 0, 4)), "B": np.zeros((2, 5, 0))}, "r is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change, sentence, monkeypatch):
    # Without checks of annotations, as for a user, the functions themselves must
    # refuse.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    f = {n: np.zeros(s, np.float32) for n, s in {"x": (2, 4), "W": (2, 5, 4)}.items()}
    f |= {"A": np.zeros((2, 3, 4)), "B": np.zeros((2, 5, 3)), "bias": None}
    f |= {"chosen": np.array([0, 1])} | change
    adapter = ExpertsLoRA(f["A"], f["B"], 2.0)
    with pytest.raises(InputError, match=sentence):
        experts.forward(f["x"], f["chosen"], f["W"], adapter, f["bias"])
