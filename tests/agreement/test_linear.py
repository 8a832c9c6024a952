"""Torch's frozen layers, as adapters read them, against the reference's linear layer.

Every layer that a method can wrap is the same function of x and W, wherever it keeps
its weight: `nn.Linear`, GPT-2's `Conv1D` (transposed) and `nn.Embedding` (rows looked
up, which is a product with one-hot vectors).
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.reference import linear as reference
from minipeft.torch.linear import weight_of, weight_view
from tests.strategies import gaussian_layers, integer_layers, seeds
from tests.tolerance import assert_bits, assert_sums, assert_within, gamma


def tensor(array):
    return torch.from_numpy(np.array(array))


def numpy(value):
    return value.detach().numpy()


def dense(t):
    base = nn.Linear(t.W.shape[1], t.W.shape[0], t.bias is not None)
    base.weight = nn.Parameter(tensor(t.W))
    base.bias = None if t.bias is None else nn.Parameter(tensor(t.bias))
    return base


def conv1d(t):
    base = Conv1D(*t.W.shape)
    base.weight = nn.Parameter(tensor(t.W.T))
    base.bias = nn.Parameter(torch.zeros(len(t.W)))
    if t.bias is not None:
        base.bias = nn.Parameter(tensor(t.bias))
    return base


both = pytest.mark.parametrize("base", [dense, conv1d])


def run(layer, t, dtype=torch.float32):
    """Output, and autograd's gradients of <grad_y, y> for x, W and bias."""
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
    for ours, theirs in zip(run(base(t), t), expected(t), strict=False):
        assert_sums(numpy(ours), np.asarray(theirs))


@both
@given(t=integer_layers)
def test_the_layer_itself_computes_the_same_bits(base, t):
    y = base(t)(tensor(t.x))
    assert_sums(numpy(y), reference.forward(t.x, t.W, t.bias))


@both
@given(t=gaussian_layers)
def test_forward_and_gradients_differ_by_roundings_only(base, t):
    rows = t.x.size // t.x.shape[-1]
    bias = None if t.bias is None else abs(t.bias).astype(float)
    x, W, G = (abs(v).astype(float) for v in (t.x, t.W, t.grad_y))
    sizes = [reference.forward(x, W, bias), *reference.backward(G, x, W)]
    roundings = [t.W.shape[1] + 1, len(t.W), rows, rows]
    parts = zip(run(base(t), t), expected(t), sizes, roundings, strict=False)
    for ours, theirs, size, n in parts:
        assert_within(numpy(ours), theirs, 2 * gamma(n) * size)  # either side errs


@both
@given(t=integer_layers, seed=seeds)
def test_gradients_are_central_differences_in_float64(base, t, seed):
    # The loss is linear in x, in W and in the bias taken one at a time, and every
    # number is a small integer: the difference is the slope, exactly.
    rng, layer = np.random.default_rng(seed), base(t)
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
    layer = base(t)
    plain = weight_view(layer).plain(layer, tensor(2 * t.W))
    assert_sums(numpy(plain(tensor(t.x))), reference.forward(t.x, 2 * t.W, t.bias))
    assert not plain.weight.requires_grad


@both
@given(t=integer_layers)
def test_the_form_is_that_of_the_weight(base, t):
    layer = base(t).to(torch.bfloat16)
    form = weight_view(layer).form(layer)
    assert (form.out_features, form.in_features) == t.W.shape
    assert form.dtype is torch.bfloat16
    assert_bits(numpy(weight_of(layer).float()), t.W)
