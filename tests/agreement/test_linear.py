"""Torch's frozen layers, as adapters read them, against the reference's linear layer.

Every layer that a method can wrap is the same function of x and W, whatever its storage
of the weight: `nn.Linear`, GPT-2's `Conv1D` (transposed) and `nn.Embedding` (a row for
each index, which is a product with one-hot vectors).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from minipeft.reference import linear as reference
from minipeft.torch.linear import weight_of, weight_view
from tests.agreement.on_torch import conv1d, dense, numpy, tensor
from tests.bounds import assert_both_within, counted
from tests.strategies import gaussian_layers, integer_layers, seeds
from tests.tolerance import assert_bits, assert_sums

both = pytest.mark.parametrize("base", [dense, conv1d])


def run(layer, t, dtype=torch.float32):
    """Return the output, and autograd's gradients of <grad_y, y> for x, W and bias."""
    layer = layer.to(dtype)
    x = tensor(t.x).to(dtype).requires_grad_()
    y = layer(x)
    wanted = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    grad_x, grad_W, *rest = torch.autograd.grad(y, wanted, tensor(t.grad_y).to(dtype))
    return [y, grad_x, weight_view(layer).turn(grad_W), *rest]


def expected(t):
    return [
        reference.forward(t.x, t.W, t.bias),
        *reference.backward(t.grad_y, t.x, t.W),
    ]


@both
@given(t=integer_layers)
def test_forward_and_gradients_are_equal_in_bits(base, t):
    for ours, theirs in zip(run(base(t.W, t.bias), t), expected(t), strict=False):
        assert_sums(numpy(ours), np.asarray(theirs))


@both
@given(t=gaussian_layers)
def test_forward_and_gradients_differ_by_roundings_only(base, t):
    parts = {name: counted(getattr(t, name)) for name in ("x", "W", "grad_y")}
    bias = None if t.bias is None else counted(t.bias)
    sizes = expected(replace(t, **parts, bias=bias))
    for ours, theirs, size in zip(
        run(base(t.W, t.bias), t), expected(t), sizes, strict=False
    ):
        assert_both_within(numpy(ours), theirs, size, size)


@both
@given(t=integer_layers, seed=seeds)
def test_gradients_are_central_differences_in_float64(base, t, seed):
    # The loss is linear in x, in W and in the bias taken alone, and every number is a
    # small integer, so the difference is exactly the slope.
    rng, layer = np.random.default_rng(seed), base(t.W, t.bias)
    _, *gradients = run(layer, t, torch.float64)
    x, W = tensor(t.x).double(), weight_of(layer)
    grad_y = tensor(t.grad_y).double()
    with torch.no_grad():
        values = [x, W, *([] if layer.bias is None else [layer.bias])]
        for value, gradient in zip(values, gradients, strict=True):
            step = torch.from_numpy(rng.integers(-8, 9, value.shape).astype(float))
            losses = []
            for sign in (1, -1):
                value += sign * step
                losses.append((layer(x) * grad_y).sum())
                value -= sign * step
            assert (losses[0] - losses[1]) / 2 == (gradient * step).sum()


@given(t=integer_layers, seed=seeds)
def test_an_embedding_is_the_layer_on_one_hot_rows(t, seed):
    d, k = t.W.shape
    ids = np.random.default_rng(seed).integers(0, k, (2, 3))
    one_hot = np.eye(k, dtype=np.float32)[ids]
    base = nn.Embedding(k, d, _weight=tensor(t.W.T))
    y = base(tensor(ids))
    assert_sums(numpy(y), reference.forward(one_hot, t.W))
    grad_y = np.broadcast_to(t.grad_y.reshape(-1, d)[0], (2, 3, d)).copy()
    (grad_W,) = torch.autograd.grad(y, base.weight, tensor(grad_y))
    expected_W = reference.backward(grad_y, one_hot, t.W).W
    assert_sums(numpy(weight_view(base).turn(grad_W)), expected_W)


@both
@given(t=integer_layers)
def test_a_plain_layer_of_another_weight_computes_with_it(base, t):
    layer = base(t.W, t.bias)
    plain = weight_view(layer).plain(layer, tensor(2 * t.W))
    assert_sums(numpy(plain(tensor(t.x))), reference.forward(t.x, 2 * t.W, t.bias))
    assert not plain.weight.requires_grad


@both
@given(t=integer_layers)
def test_the_form_is_that_of_the_weight(base, t):
    layer = base(t.W, t.bias).to(torch.bfloat16)
    form = weight_view(layer).form(layer)
    assert (form.out_features, form.in_features) == t.W.shape
    assert form.dtype is torch.bfloat16
    assert_bits(numpy(weight_of(layer).float()), t.W)
