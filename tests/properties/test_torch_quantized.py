"""Laws of the frozen 4-bit layer in torch."""

import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch import bins, codebook
from minipeft.torch.bins import MEMORY
from minipeft.torch.blockwise import dequantize, quantize
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_with_the_dequantized_weight(bias, dtype):
    base = nn.Linear(48, 20, bias=bias).to(dtype)
    layer = QuantizedLinear.from_linear(base)
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    W = dequantize(quantize(base.weight), dtype)
    plain = nn.functional.linear(x, W, base.bias)
    assert torch.equal(layer.weight, W)
    assert torch.equal(layer(x), plain)
    grad_y = torch.randn(5, 20, dtype=dtype)
    ours, theirs = (torch.autograd.grad(y, x, grad_y)[0] for y in (layer(x), plain))
    assert torch.equal(ours, theirs)


def test_nothing_of_the_size_of_the_weight_waits_for_backward():
    layer = QuantizedLinear.from_linear(nn.Linear(256, 128))
    x = torch.randn(2, 256, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        layer(x)
    assert all(t is None or t.numel() < layer.packed.numel() for t in kept)


def stacked():
    """Return quantized layers of several shapes, and layers with their weights."""
    bases = [nn.Linear(a, b) for a, b in pairwise([64, 128, 64, 192])]
    ours = nn.Sequential(*map(QuantizedLinear.from_linear, bases))
    plain = nn.Sequential(*map(copy.deepcopy, bases))
    for layer, base in zip(ours, plain, strict=True):
        base.weight.data = layer.dequantize(torch.float32)
    return ours, plain.requires_grad_(False)


def test_layers_that_decode_to_the_same_memory_do_not_disturb_each_other():
    ours, plain = stacked()
    x = torch.randn(5, 64, requires_grad=True)
    with torch.inference_mode():  # training must be able to use it, too
        assert torch.equal(ours(x), plain(x))
    y, z = ours(x), plain(x)
    assert torch.equal(y, z)
    own, theirs = (torch.autograd.grad(out.sum(), x)[0] for out in (y, z))
    assert torch.equal(own, theirs)


def test_a_graph_of_the_gradient_keeps_its_own_weights():
    def twice(model):
        x = torch.linspace(-1, 1, 128).view(2, 64).requires_grad_()
        slope = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), x)[0]

    ours, plain = map(twice, stacked())
    assert torch.equal(ours, plain)


def test_each_thread_decodes_to_memory_of_its_own():
    ours, plain = stacked()
    inputs = [torch.randn(40, 64) for _ in range(32)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: ours(x).detach(), inputs))
    assert all(torch.equal(y, plain(x)) for x, y in zip(inputs, found, strict=True))
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(MEMORY.weight, (4, 4), torch.float32).result()
    assert theirs.data_ptr() != MEMORY.weight((4, 4), torch.float32).data_ptr()


def test_memory_is_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(bins, "KEPT", 4 * 16)
    kept, again = (MEMORY.weight((4, 4), torch.float32) for _ in range(2))
    large, larger = (MEMORY.weight((4, 5), torch.float32) for _ in range(2))
    assert kept.data_ptr() == again.data_ptr()
    assert large.data_ptr() != larger.data_ptr()


def test_only_the_input_gets_a_gradient():
    layer = QuantizedLinear.from_linear(nn.Linear(48, 20))
    assert not any(p.requires_grad for p in layer.parameters())
    with torch.no_grad():
        assert not layer(torch.randn(2, 48)).requires_grad
    assert not layer(torch.randn(2, 48)).requires_grad


@each_dtype
def test_a_cast_leaves_scales_and_codes_alone(dtype):
    layer = QuantizedLinear.from_linear(nn.Linear(48, 20))
    exact = layer.q
    layer.to(dtype)
    assert torch.equal(layer.absmax, exact.absmax)
    assert torch.equal(layer.codebook, exact.codebook)
    assert layer.absmax.dtype == torch.float32
    assert layer.bias.dtype == layer.weight.dtype == layer.dtype == dtype
    assert torch.equal(layer.weight, dequantize(exact, dtype))


def test_state_dicts_and_copies_carry_everything():
    layer = QuantizedLinear.from_linear(nn.Linear(48, 20))
    twin = QuantizedLinear.from_linear(nn.Linear(48, 20))
    x = torch.randn(3, 48)
    assert not torch.equal(twin(x), layer(x))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_layer_can_be_made_without_memory_and_filled():
    layer = QuantizedLinear.from_linear(nn.Linear(48, 20)).bfloat16()
    empty = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight, layer.weight)


def test_loading_into_a_layer_does_not_reach_the_table_it_began_with():
    layer = QuantizedLinear.from_linear(nn.Linear(48, 20))
    other = QuantizedLinear.from_linear(nn.Linear(48, 20), codebook.FP4)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)
    assert codebook.NF4[0] == -1
    assert codebook.NF4[15] == 1


@pytest.mark.parametrize("values", [codebook.NF4, codebook.NF3, codebook.NF2])
def test_the_codes_may_have_other_widths(values):
    base = nn.Linear(48, 20)
    layer = QuantizedLinear.from_linear(base, values, blocksize=16)
    assert torch.equal(layer.weight, dequantize(quantize(base.weight, values, 16)))
    assert layer.packed.numel() == 48 * 20 * (len(values).bit_length() - 1) // 8


def test_under_autocast_it_computes_in_the_dtype_that_a_linear_layer_would():
    base = nn.Linear(48, 20)
    layer = QuantizedLinear.from_linear(base)
    x = torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == base(x).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone_here_as_in_a_linear_layer():
    base = nn.Linear(48, 20).double()
    layer, x = QuantizedLinear.from_linear(base), torch.randn(3, 48).double()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert base(x).dtype == torch.float64
        assert torch.equal(layer(x), expected)


def test_a_rank_is_checked_without_decoding_the_weight():
    layer = QuantizedLinear.from_linear(nn.Linear(48, 20))
    layer.dequantize = None
    with pytest.raises(InputError, match="q: r is 21; choose 1 to 20"):
        LoRAConfig(21, 2.0).adapters({"q": layer})


def test_it_says_what_it_is():
    text = "in_features=48, out_features=20, bias=True, codes=16, blocksize=64"
    assert text in repr(QuantizedLinear.from_linear(nn.Linear(48, 20)))
