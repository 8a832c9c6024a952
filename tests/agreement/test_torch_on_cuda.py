"""The torch column on a CUDA device: the bytes and bits that it has on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.torch import blockwise
from minipeft.torch.adamw import AdamW
from minipeft.torch.codebook import FP4, NF3, NF4, dynamic_map
from minipeft.torch.lora import LoRA, LoRALinear
from tests.properties import modules
from tests.strategies import anything_finite, blocksizes, integer_layers, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
codebooks = st.sampled_from([NF4, FP4, NF3, dynamic_map()])


@given(weights() | anything_finite((70,)), codebooks, blocksizes)
def test_codecs_give_the_same_bytes(W, codebook, blocksize):
    W = torch.from_numpy(W)
    here = blockwise.quantize(W, codebook, blocksize)
    there = blockwise.quantize(W.cuda(), codebook, blocksize)
    assert torch.equal(there.packed.cpu(), here.packed)
    assert torch.equal(there.absmax.cpu(), here.absmax)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = blockwise.dequantize(there, dtype)
        assert torch.equal(values.cpu(), blockwise.dequantize(here, dtype))


@given(integer_layers)
def test_adapted_layers_give_the_same_sums(t):
    base = nn.Linear(t.W.shape[1], t.W.shape[0], bias=False)
    base.weight = nn.Parameter(torch.from_numpy(t.W))
    A, B = (torch.from_numpy(np.array(M)) for M in (t.A, t.B))
    layer, x = LoRALinear(base, LoRA(A, B, t.scaling)), torch.from_numpy(t.x)
    here, merged = layer(x), layer.merged()
    layer.cuda()
    assert torch.equal(layer(x.cuda()).cpu(), here)
    assert torch.equal(layer.merge()(x.cuda()).cpu(), here)
    assert torch.equal(layer.unmerge().merged().cpu(), merged)


BUILDS = [build for builds in modules.EXAMPLES.values() for build in builds]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_every_module_runs_there_and_exact_sums_have_the_same_bits(build):
    torch.manual_seed(0)
    here = modules.run(build("cpu"))
    torch.manual_seed(0)
    example = build("cuda")
    there = modules.run(example)
    for ours, theirs in zip(there, here, strict=True):
        assert ours.is_cuda
        assert ours.shape == theirs.shape
        assert not example.exact or torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("bits", [8, 32])
def test_steps_of_adamw_give_the_same_bits(bits):
    W, grads = torch.randn(70, 60), torch.randn(5, 70, 60)
    results = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(W.to(device, copy=True))
        optimizer = AdamW([p], bits=bits)
        for grad in grads:
            p.grad = grad.to(device)
            optimizer.step()
        results.append([p.detach(), *list(optimizer.state[p].values())[1:]])
    for here, there in zip(*results, strict=True):
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize(
    "build", [modules.quantized, modules.dora], ids=lambda build: build.__name__
)
def test_a_graph_repeats_forward_and_backward_on_other_inputs(build):
    torch.manual_seed(0)
    example, side = build("cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels
        modules.run(example)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = modules.run(example)
    for x in example.inputs.values():
        x.copy_(modules.integers(*x.shape))
    graph.replay()
    for ours, theirs in zip(captured, modules.run(example), strict=True):
        assert torch.equal(ours, theirs)
