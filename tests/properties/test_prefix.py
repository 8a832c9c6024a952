"""Laws of prefix tuning: its formula, its network, and why it cannot be merged."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minipeft.reference import attention, prefix
from minipeft.reference.attention import Head
from minipeft.reference.prefix import Prefix, Reparametrization
from tests.bounds import bound, counted
from tests.properties.test_attention import assert_slopes, heads, rounding
from tests.strategies import seeds
from tests.tolerance import assert_bits, assert_within, gamma

counts = st.integers(1, 4)


def prefix_for(head, count, seed):
    rng = np.random.default_rng(seed)
    shapes = (count, head.K.shape[-1]), (count, head.V.shape[-1])
    return Prefix(*(rng.standard_normal(s).astype(head.K.dtype) for s in shapes))


def test_a_prefix_of_real_keys_is_the_text_that_they_came_from():
    # A prefix of the keys and values of earlier tokens gives what these tokens give.
    rng = np.random.default_rng(0)
    Q, K, V = rng.standard_normal((3, 7, 4)).astype(np.float32)
    whole = attention.forward(Head(Q, K, V, attention.causal(7, 7)))
    head = Head(Q[3:], K[3:], V[3:], attention.causal(4, 4))
    assert_bits(prefix.forward(head, Prefix(K[:3], V[:3])), whole[3:])


@given(heads(), counts, seeds)
def test_every_query_sees_every_virtual_token(head, count, seed):
    attached = prefix.attach(head, prefix_for(head, count, seed))
    assert np.all(attention.weights(attached)[..., :count] > 0)
    if head.mask is not None:
        assert np.all(attached.mask[:, :count])
        assert_bits(np.ascontiguousarray(attached.mask[:, count:]), head.mask)


@given(heads(), counts, seeds)
def test_a_prefix_is_a_gate_that_depends_on_the_query(head, count, seed):
    p = prefix_for(head, count, seed)
    gate = prefix.gate(head, p)[..., None]
    assert np.all((gate > 0) & (gate < 1 + gamma(count)))
    alone = attention.forward(head)
    batch = head.Q.shape[:-2]
    K, V = (np.broadcast_to(a, (*batch, *a.shape)) for a in (p.K, p.V))
    virtual = attention.forward(Head(head.Q, K, V))
    blended = (1 - gate) * alone + gate * virtual
    attached = prefix.attach(head, p)
    # Let V be at most 1, and e the relative error of a share (`rounding` is twice e).
    # The left side errs by e + gamma(keys). `alone` and `virtual`, weighted by the
    # gate, err together by as much. The gate errs by e + gamma(count), and that error
    # is multiplied by the difference of `alone` and `virtual`, at most 2. The blend
    # rounds in 1 - gate, in a product and in the sum. The sum is 4 e and this many
    # roundings:
    roundings = 2 * attached.K.shape[-2] + 2 * count + 3
    off = 2 * rounding(attached) + gamma(roundings)
    assert_within(prefix.forward(head, p), blended, off * float(abs(attached.V).max()))


def test_no_constant_can_stand_for_the_prefix():
    # Two queries of one head: the gate is near 0 for the first and near 1 for the
    # second.
    K = V = np.array([[1.0, 0.0]], np.float32)
    p = Prefix(np.array([[-1.0, 0.0]], np.float32), np.array([[0.0, 1.0]], np.float32))
    gates = prefix.gate(Head(np.array([[9.0, 0], [-9.0, 0]], np.float32), K, V), p)
    assert gates[0] < 1e-5
    assert gates[1] > 1 - 1e-5


@st.composite
def networks(draw):
    rng = np.random.default_rng(draw(seeds))
    network = prefix.init_reparametrized(
        rng, draw(counts), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    )
    fields = [f + rng.standard_normal(f.shape) for f in vars(network).values()]
    return Reparametrization(*(f.astype(np.float64) for f in fields))


@given(networks(), seeds)
def test_gradients_of_the_network_are_central_differences(network, seed):
    rng = np.random.default_rng(seed)
    grad = Prefix(*rng.standard_normal((2, *prefix.expand(network).K.shape)))
    gradients = prefix.expand_backward(grad, network)

    def loss(*fields):
        p = prefix.expand(Reparametrization(*fields))
        return (grad.K * p.K).sum() + (grad.V * p.V).sum()

    values = tuple(vars(network).values())
    # A step moves a value by 2**-13 times a normal number, so by less than 2**-10.
    reach = (counted(abs(value) + 2.0**-10) for value in values)
    noise = float(bound(np.array(loss(*reach)), "float64"))
    assert_slopes(loss, values, tuple(vars(gradients).values()), noise, seed)


@given(heads(), seeds)
def test_after_training_the_network_can_be_thrown_away(head, seed):
    d = head.K.shape[-1]
    if head.V.shape[-1] != d:
        return
    network = prefix.init_reparametrized(np.random.default_rng(seed), 3, d, 8)
    kept = prefix.expand(network)
    with_network = prefix.forward(head, prefix.expand(network))
    assert_bits(
        prefix.forward(head, Prefix(kept.K.copy(), kept.V.copy())), with_network
    )


def test_starts_have_the_shape_that_was_asked_for():
    rng = np.random.default_rng(0)
    assert prefix.init(rng, 5, 4).K.shape == prefix.init(rng, 5, 4).V.shape == (5, 4)
    expanded = prefix.expand(prefix.init_reparametrized(rng, 5, 4, 16))
    assert expanded.K.shape == expanded.V.shape == (5, 4)
    assert expanded.K.dtype == np.float32
