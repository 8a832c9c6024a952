"""The torch column's LoRA against the reference: bits on integers, derived bounds."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference import lora as reference
from minipeft.torch import lora
from minipeft.torch.qlora import QuantizedLinear
from tests.strategies import gaussian_layers, integer_layers, seeds, sizes
from tests.tolerance import assert_sums, assert_within, gamma, matmul_bound


def adapter(t):
    return reference.LoRA(t.A, t.B, t.scaling)


def tensor(array):
    return None if array is None else torch.from_numpy(np.array(array))


def numpy(tensor):
    return tensor.detach().numpy()


def on_torch(t, base=None):
    """The same layer as a module; B is not zero, so it is not at its start."""
    parts = lora.LoRA(tensor(t.A), tensor(t.B), t.scaling)
    return lora.LoRALinear(base or dense(t), parts)


def dense(t):
    base = nn.Linear(t.W.shape[1], t.W.shape[0], t.bias is not None)
    base.weight = nn.Parameter(tensor(t.W))
    base.bias = None if t.bias is None else nn.Parameter(tensor(t.bias))
    return base


def conv1d(t):
    base = Conv1D(*t.W.shape)
    base.weight = nn.Parameter(tensor(t.W.T))
    base.bias = nn.Parameter(tensor(np.zeros(len(t.W), np.float32)))
    if t.bias is not None:
        base.bias = nn.Parameter(tensor(t.bias))
    return base


def run(layer, t):
    """Output and gradients of <grad_y, y>, in the order of the reference."""
    x = tensor(t.x).requires_grad_()
    y = layer(x)
    y.backward(tensor(t.grad_y))
    parts = layer.adapters["default"]
    return [numpy(y), *(numpy(p.grad) for p in (x, parts.A, parts.B))]


def expected(t):
    y = reference.forward(t.x, t.W, adapter(t), t.bias)
    return [y, *reference.backward(t.grad_y, t.x, t.W, adapter(t))]


@pytest.mark.parametrize("base", [dense, conv1d])
@given(t=integer_layers)
def test_forward_and_gradients_are_equal_in_bits(base, t):
    layer = on_torch(t, base(t))
    for ours, theirs in zip(run(layer, t), expected(t), strict=True):
        assert_sums(ours, np.asarray(theirs))


@given(integer_layers)
def test_update_and_merged_weight_are_equal_in_bits(t):
    layer = on_torch(t)
    assert_sums(
        numpy(lora.delta(layer.adapters["default"])), reference.delta(adapter(t))
    )
    assert_sums(numpy(layer.delta()), reference.delta(adapter(t)))
    assert_sums(numpy(layer.merged()), reference.merge(t.W, adapter(t)))


@given(integer_layers)
def test_merged_forward_is_equal_in_bits(t):
    merged = linear.forward(t.x, reference.merge(t.W, adapter(t)), t.bias)
    for base in (dense(t), conv1d(t)):
        layer = on_torch(t, base).merge()
        assert_sums(numpy(layer(tensor(t.x))), merged)


@given(integer_layers, seeds)
def test_an_embedding_is_a_layer_on_one_hot_rows(t, seed):
    d, k = t.W.shape
    ids = np.random.default_rng(seed).integers(0, k, (2, 3))
    one_hot = np.eye(k, dtype=np.float32)[ids]
    layer = on_torch(t, nn.Embedding(k, d, _weight=tensor(t.W.T)))
    grad_y = np.broadcast_to(t.grad_y.reshape(-1, d)[0], (2, 3, d)).copy()
    y = layer(tensor(ids))
    y.backward(tensor(grad_y))
    assert_sums(numpy(y), reference.forward(one_hot, t.W, adapter(t)))
    gradients = reference.backward(grad_y, one_hot, t.W, adapter(t))
    parts = layer.adapters["default"]
    assert_sums(numpy(parts.A.grad), gradients.A)
    assert_sums(numpy(parts.B.grad), gradients.B)
    assert_sums(numpy(layer.merge()(tensor(ids))), numpy(y))


@given(gaussian_layers)
def test_forward_and_gradients_differ_by_roundings_only(t):
    (d, k), r, s = t.W.shape, t.A.shape[0], abs(t.scaling)
    rows = max(1, t.x.size // k)
    x, G = t.x.reshape(-1, k), t.grad_y.reshape(-1, d)
    bias = 0 if t.bias is None else abs(t.bias)
    # Each side errs by at most its roundings: inner dimensions, scaling, additions.
    sides = 2
    bounds = [
        matmul_bound(x, t.W.T, roundings=k + r + 4)
        + s * matmul_bound(x, t.A.T, t.B.T, roundings=k + r + 4)
        + gamma(k + r + 4) * bias,
        matmul_bound(G, t.W, roundings=d + r + 4)
        + s * matmul_bound(G, t.B, t.A, roundings=d + r + 4),
        s * matmul_bound(t.B.T, G.T, x, roundings=d + rows + 4),
        s * matmul_bound(G.T, x, t.A.T, roundings=k + rows + 4),
    ]
    layer = on_torch(t)
    for ours, theirs, bound in zip(run(layer, t), expected(t), bounds, strict=True):
        assert_within(ours, theirs, sides * bound.reshape(np.shape(theirs)))


@given(gaussian_layers)
def test_merged_weights_differ_by_roundings_only(t):
    roundings = t.A.shape[0] + 3
    update = abs(t.scaling) * matmul_bound(t.B, t.A, roundings=roundings)
    bound = update + gamma(roundings) * abs(t.W)
    ours, theirs = numpy(on_torch(t).merged()), reference.merge(t.W, adapter(t))
    assert_within(ours, theirs, 2 * bound)


@given(integer_layers, seeds)
def test_gradients_are_central_differences_in_float64(t, seed):
    # The loss is linear in x, in A and in B taken one at a time, and every number is a
    # small integer times a power of two: the difference is the slope, exactly.
    layer, rng = on_torch(t).double(), np.random.default_rng(seed)
    x, grad_y = tensor(t.x).double().requires_grad_(), tensor(t.grad_y).double()
    parts = layer.adapters["default"]
    (layer(x) * grad_y).sum().backward()
    for value in (x, parts.A, parts.B):
        step = torch.from_numpy(rng.integers(-8, 9, value.shape).astype(np.float64))
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                value += sign * step
                losses.append((layer(x) * grad_y).sum())
                value -= sign * step
        assert (losses[0] - losses[1]) / 2 == (value.grad * step).sum()


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)],
)
@given(t=integer_layers)
def test_a_base_of_16_bits_is_merged_with_one_rounding(dtype, kind, t):
    # Every bit that W can have, and more than 16 bits hold in the update.
    W, A = (t.W / 3).astype(kind).astype(np.float32), 37 * t.A
    t = replace(t, W=W, A=A)
    layer = on_torch(t)
    layer.base.to(dtype)
    merged = layer.merged()
    assert merged.dtype == dtype
    rounded = reference.merge(W, adapter(t)).astype(kind)
    assert_sums(numpy(merged.float()), rounded.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(t=integer_layers)
def test_over_a_base_of_16_bits_the_sum_is_rounded_once(dtype, t):
    layer = on_torch(t, dense(t).to(dtype))
    x = tensor(t.x).to(dtype)  # small integers: exact
    update = t.scaling * ((t.x @ t.A.T) @ t.B.T)
    y = (layer.base(x).float() + tensor(update)).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), y)


@given(gaussian_layers)
def test_a_quantized_base_is_the_reference_on_the_dequantized_weight(t):
    base = QuantizedLinear.from_linear(dense(t), blocksize=4)
    W, layer = numpy(base.weight), on_torch(t, base)
    plain = on_torch(t, dense(t))
    plain.base.weight = nn.Parameter(tensor(W), requires_grad=False)
    for ours, theirs in zip(run(layer, t), run(plain, t), strict=True):
        assert_sums(ours, theirs)
    assert_sums(numpy(layer.merged()), numpy(plain.merged()))


@given(seeds, sizes(), st.booleans())
def test_init_starts_where_the_reference_does(seed, s, rank_stabilized):
    generator = torch.Generator().manual_seed(seed)
    new = lora.init(generator, s.k, s.d, s.r, 16, rank_stabilized)
    theirs = reference.init(
        np.random.default_rng(0), s.k, s.d, s.r, 16, rank_stabilized
    )
    assert new.scaling == theirs.scaling
    assert new.A.shape == theirs.A.shape
    assert_sums(numpy(new.B), theirs.B)
    assert (new.A.abs() <= 1 / np.sqrt(s.k)).all()
    again = lora.init(generator.manual_seed(seed), s.k, s.d, s.r, 16)
    assert torch.equal(new.A, again.A)


@pytest.mark.parametrize("r", [0, -1, 4])
def test_a_rank_out_of_range_is_refused_in_the_same_words(r):
    with pytest.raises(InputError) as theirs:
        reference.init(np.random.default_rng(0), 3, 5, r, alpha=8)
    with pytest.raises(InputError) as ours:
        lora.init(None, 3, 5, r, alpha=8)
    assert str(ours.value) == str(theirs.value)
