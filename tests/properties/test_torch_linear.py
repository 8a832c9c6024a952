"""Over a 16-bit base an adapter computes in float32 and keeps only x for backward."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.torch.linear import (
    Product,
    Stacked,
    WeightView,
    _Added,
    frozen,
    has_forward,
    of_experts,
)
from minipeft.torch.lora import LoRA, LoRALinear
from tests.strategies import gaussian_layers
from tests.tolerance import assert_within, gamma

HALF = [torch.bfloat16, torch.float16]
each_half = pytest.mark.parametrize("dtype", HALF)


def plain(x, A):
    return linear(x.to(A.dtype), A)


def ours(x, A):
    return WeightView().project(None, x, A, 0.0)


def gradients(project, x, A, grad_h):
    x, A = x.clone().requires_grad_(), A.clone().requires_grad_()
    h = project(x, A)
    return h.detach(), *torch.autograd.grad(h, (x, A), grad_h)


@each_half
@given(t=gaussian_layers)
def test_no_bit_differs_from_autograd_s_own(dtype, t):
    x, A = torch.from_numpy(t.x).to(dtype), torch.from_numpy(t.A)
    grad_h = torch.from_numpy(np.asarray(t.x @ t.A.T))
    for mine, right in zip(
        gradients(ours, x, A, grad_h), gradients(plain, x, A, grad_h), strict=True
    ):
        assert mine.dtype == right.dtype
        assert torch.equal(mine, right)


@each_half
@pytest.mark.parametrize("shape", [(64, 96), (3, 40, 96), (0, 96), (2, 0, 96)])
def test_no_bit_differs_at_sizes_of_many_sums(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    A = torch.randn(8, 96, generator=generator)
    grad_h = torch.randn(*shape[:-1], 8, generator=generator)
    for mine, right in zip(
        gradients(ours, x, A, grad_h), gradients(plain, x, A, grad_h), strict=True
    ):
        assert torch.equal(mine, right)


def three_layers(dtype):
    """Queries, keys and values: three adapted layers with the same input x."""
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        base = nn.Linear(48, 32, dtype=dtype)
        layers.append(LoRALinear(base, LoRA(torch.randn(4, 48), torch.randn(32, 4), 2)))
    return layers


@each_half
def test_layers_that_share_an_input_remember_it_once_and_in_16_bits(dtype):
    layers, kept = three_layers(dtype), []
    x = torch.randn(7, 48).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        for layer in layers:
            layer(x)
    copies = [t for t in kept if t is not None and t.numel() == x.numel()]
    assert copies
    assert {t.data_ptr() for t in copies} == {x.data_ptr()}


@each_half
def test_what_is_frozen_gets_no_gradient(dtype):
    x = torch.randn(5, 48).to(dtype)
    A = torch.randn(4, 48, requires_grad=True)
    ours(x, A).sum().backward()
    assert A.grad is not None
    assert x.grad is None
    leaf, frozen = x.requires_grad_(), torch.randn(4, 48)
    ours(leaf, frozen).sum().backward()
    assert leaf.grad.dtype == dtype
    assert frozen.grad is None


def test_gradients_of_gradients_are_those_of_autograd():
    x, A = torch.randn(5, 6).bfloat16(), torch.randn(3, 6)

    def penalty(project):
        leaf, weight = x.clone().requires_grad_(), A.clone().requires_grad_()
        h = project(leaf, weight).square().sum()
        (first,) = torch.autograd.grad(h, leaf, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), weight)[0]

    assert torch.equal(penalty(ours), penalty(plain))


def test_gradients_of_single_samples_are_those_of_autograd():
    x, A = torch.randint(-4, 5, (5, 6)).bfloat16(), torch.randint(-4, 5, (3, 6)) / 2

    def slopes(project):
        def one(x, weight):
            return project(x, weight).square().sum()

        return torch.func.vmap(torch.func.grad(one, 1), (0, None))(x, A)

    assert torch.equal(slopes(ours), slopes(plain))


def test_autocast_computes_in_its_own_precision():
    x = torch.randn(5, 6).bfloat16()
    A = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = ours(x, A)
    assert h.dtype == torch.bfloat16
    h.sum().backward()
    assert A.grad.dtype == torch.float32


# --- which call is the product, and what is frozen -----------------------------------


def test_a_hook_that_reads_the_weight_computes_no_product():
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    layer = LoRALinear(base, LoRA(torch.randn(2, 6), torch.randn(5, 2), 1))
    expected = layer(x)

    def look(base, inputs):
        torch.mul(torch.ones(5, 6), base.weight)  # where a product has its weight
        linear(*inputs, weight=base.weight)

    base.register_forward_pre_hook(look)
    assert torch.equal(layer(x), expected)


def test_a_bias_is_the_third_argument_or_a_keyword():
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    two = [x, base.weight]
    assert Product(WeightView(), base, [*two, base.bias], {}).bias is base.bias
    assert Product(WeightView(), base, two, {"bias": base.bias}).bias is base.bias
    assert Product(WeightView(), base, two, {}).bias is None


class Held(nn.Module):
    """A module with one parameter and a number of experts."""

    def __init__(self, *shape, num_experts=3):
        super().__init__()
        self.W, self.num_experts = nn.Parameter(torch.randn(shape)), num_experts


def test_a_router_and_a_convolution_hold_no_experts():
    assert of_experts(Held(3, 8)) is None
    assert of_experts(Held(16, 8, 4)) is None
    with pytest.raises(InputError, match="does not say whether its stacks are"):
        of_experts(Held(3, 8, 4))
    plain = Stacked(False).plain(Held(3, 8, 4), {"W": torch.ones(3, 8, 4)})
    assert torch.equal(plain.W, torch.ones(3, 8, 4))
    assert not plain.W.requires_grad


def test_its_own_forward_is_none_that_a_program_set_on_a_layer():
    layer, other = nn.Linear(6, 5), nn.Linear(6, 5)
    assert not has_forward(layer)
    layer.forward = layer.forward  # as accelerate leaves it behind
    assert not has_forward(layer)
    layer.forward = other.forward
    assert has_forward(layer)


def test_a_frozen_layer_holds_the_tensors_and_trains_none():
    W, bias = torch.randn(5, 6), torch.randn(5)
    layer = frozen(W, bias)
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.weight.data_ptr() == W.data_ptr()
    assert layer.bias.data_ptr() == bias.data_ptr()
    plain = WeightView().plain(nn.Linear(6, 5), W)
    assert torch.equal(plain.weight, W)
    assert not plain.weight.requires_grad


# --- the sum of the frozen output and the change --------------------------------------


def sums(dtype, to):
    """Return operands, and two ways to compute $y + s (x A^T) B^T$ from them."""
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.randn(3, 4, n, generator=generator).to(dtype) for n in (9, 6))
    A, B = (torch.randn(*s, generator=generator) for s in ((2, 6), (9, 2)))

    def one_node(y, x, A, B):
        return _Added.apply(y, x, A, B, 0.3, to)

    def by_autograd(y, x, A, B):
        return (y + linear(0.3 * linear(x.to(A.dtype), A), B)).to(to)

    return (y, x, A, B), one_node, by_autograd


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("wide", [False, True], ids=["rounded", "wide"])
def test_no_bit_of_a_sum_in_one_node_differs_from_autograd_s_own(dtype, wide):
    to = torch.float32 if wide else dtype
    operands, *ways = sums(dtype, to)
    found = []
    for way in ways:
        leaves = [t.clone().requires_grad_() for t in operands]
        z = way(*leaves)
        grad = torch.linspace(-1, 1, z.numel()).view(z.shape).to(to)
        found.append([z.detach(), *torch.autograd.grad(z, leaves, grad)])
    for mine, right in zip(*found, strict=True):
        assert mine.dtype == right.dtype
        assert torch.equal(mine, right)


def test_gradients_of_gradients_of_a_sum_are_those_of_autograd():
    operands, *ways = sums(torch.float64, torch.float64)
    found = []
    for way in ways:
        leaves = [t.double().requires_grad_() for t in operands]
        z = way(*leaves).square().sum()
        first = torch.autograd.grad(z, leaves, create_graph=True)
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, leaves))
    for mine, right in zip(*found, strict=True):
        # A float64 has 2**29 times the resolution of a float32, so the roundings of a
        # few hundred additions are less than one of a float32.
        bound = gamma(1) * float(right.abs().max())
        assert_within(mine.numpy(), right.numpy(), bound)


def test_what_is_frozen_in_a_sum_gets_no_gradient():
    (y, x, A, B), one_node, _ = sums(torch.bfloat16, torch.bfloat16)
    B.requires_grad_()
    one_node(y, x, A, B).sum().backward()
    assert B.grad is not None
    assert y.grad is x.grad is A.grad is None
