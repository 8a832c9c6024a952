"""Laws of bottleneck adapters; ReLU maps fractions to fractions."""

from fractions import Fraction

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from minipeft.reference import bottleneck, linear
from tests.exact import equal
from tests.strategies import rationals, seeds
from tests.tolerance import assert_bits

HALF = Fraction(1, 2)


@st.composite
def adapters(draw, tensor=rationals, scaling=HALF):
    """Draw an input, an adapter narrower or wider than the input, and a gradient."""
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    assume(n != m)
    lead = draw(st.sampled_from([(), (3,), (2, 2)]))
    shapes = ((m, n), (m,), (n, m), (n,))
    parts = [draw(tensor(shape)) for shape in shapes]
    adapter = bottleneck.Bottleneck(*parts, scaling)
    return draw(tensor((*lead, n))), adapter, draw(tensor((*lead, n)))


def parts(adapter):
    return adapter.down, adapter.down_bias, adapter.up, adapter.up_bias


@given(adapters(), st.data())
def test_gradients_are_exact_differences_over_the_rationals(case, data):
    # Between its corners ReLU is linear. Fractions allow a step so small that no input
    # crosses a corner.
    x, adapter, grad = case
    before = linear.forward(x, adapter.down, adapter.down_bias)
    assume(np.all(before != 0))
    grads = bottleneck.backward(grad, x, adapter)

    def loss(x, *changed):
        moved = bottleneck.Bottleneck(*changed, adapter.scaling)
        return (grad * bottleneck.forward(x, moved)).sum()

    values = (x, *parts(adapter))
    for i, (value, gradient) in enumerate(zip(values, grads, strict=True)):
        step = data.draw(rationals(value.shape)) * Fraction(1, 10**9)
        up, down = list(values), list(values)
        up[i], down[i] = value + step, value - step
        assert (loss(*up) - loss(*down)) / 2 == (gradient * step).sum()


@given(adapters())
def test_where_every_unit_is_active_the_adapter_is_linear(case):
    x, a, _ = case
    high = a.down_bias + 10**6
    open_ = bottleneck.Bottleneck(a.down, high, a.up, a.up_bias, a.scaling)
    W = a.scaling * (a.up @ a.down)
    bias = a.scaling * (a.up @ high + a.up_bias)
    assert equal(bottleneck.forward(x, open_), linear.forward(x, W, bias))


@given(adapters())
def test_no_weight_does_the_same(case):
    # A layer is affine, so f(x) + f(-x) = 2 f(0) for every x. An adapter with one unit
    # and zero bias is not affine: ReLU(h) + ReLU(-h) = |h|.
    x, a, _ = case
    a = bottleneck.Bottleneck(a.down, 0 * a.down_bias, a.up, a.up_bias, a.scaling)
    both = bottleneck.forward(x, a) + bottleneck.forward(-x, a)
    bend = a.scaling * (abs(x @ a.down.T) @ a.up.T)
    assert equal(both - 2 * bottleneck.forward(0 * x, a), bend)
    assume(np.any(bend != 0))
    assert not equal(both, 2 * bottleneck.forward(0 * x, a))


@given(adapters(), st.data())
def test_each_placement_is_its_equation(case, data):
    x, a, _ = case
    n = x.shape[-1]
    W = data.draw(rationals((n, n)))

    def attention(x):
        return x @ W

    def feedforward(x):
        return np.maximum(x, 0) * 3

    def f(x):
        return bottleneck.forward(x, a)

    sub = (attention, feedforward)
    x1 = x + attention(x)
    h, h1 = attention(x), feedforward(x1)
    assert equal(bottleneck.pfeiffer(x, sub, a), x1 + h1 + f(h1))
    assert equal(bottleneck.beside(x, sub, a), x1 + h1 + f(x1))
    x2 = x + h + f(h)
    h2 = feedforward(x2)
    assert equal(bottleneck.houlsby(x, sub, (a, a)), x2 + h2 + f(h2))


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_a_new_adapter_changes_nothing(seed, features, width):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, features), np.float32)
    h = rng.standard_normal((3, features), np.float32)
    new = bottleneck.init(rng, features, width)
    assert_bits(bottleneck.serial(h, new), h)
    assert_bits(bottleneck.parallel(x, h, new), h)
    assert new.down.shape == (width, features)
    assert new.down.dtype == np.float32
    assert np.any(new.down != 0)


@given(adapters())
def test_a_unit_at_its_corner_passes_no_gradient(case):
    x, a, grad = case
    closed = bottleneck.Bottleneck(
        0 * a.down, 0 * a.down_bias, a.up, a.up_bias, a.scaling
    )
    grads = bottleneck.backward(grad, x, closed)
    assert not any(np.any(g != 0) for g in (grads.x, grads.down, grads.down_bias))
