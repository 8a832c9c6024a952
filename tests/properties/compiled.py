"""Checks inside one compiled graph: a program that test_torch_compile runs.

The program runs in a process of its own, because torch.compile cannot trace the checks
of shapes that the tests put around every function.
"""

import sys
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from minipeft.torch import blockwise, codebook, launches
from minipeft.torch.dora import DoRAConfig, DoRALinear
from minipeft.torch.experts import Experts
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.linear import frozen
from minipeft.torch.lora import LoRAConfig, LoRALinear
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from tests.agreement.test_dora import reversing, rows_of_length_two
from tests.properties import modules


def traced(function):
    """Capture without graph breaks and run the graph as captured; takes seconds."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def compiled(function):
    """Capture without graph breaks and generate code, which may round otherwise."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True)


def weights():
    """Return weights with a short last block, zeros, subnormals and an outlier."""
    W = torch.randn(45, 67)
    W[:2] = 0
    W[2:4] *= 1e-41
    W[9, 9] = 1e30
    return W


def same(q, p):
    return torch.equal(q.packed, p.packed) and torch.equal(q.absmax, p.absmax)


def the_compiler_is_not_imported_before_it_is_used():
    """It takes longer to import than all of the package."""
    assert "torch._dynamo" not in sys.modules


def quantize_nf4():
    W, run = weights(), compiled(blockwise.quantize)
    assert same(run(W), blockwise.quantize(W))
    W[3, 3] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        run(W)


def quantize_fp4_from_bfloat16():
    W = weights().bfloat16()
    q = traced(blockwise.quantize)(W, codebook.FP4, 32)
    assert same(q, blockwise.quantize(W, codebook.FP4, 32))


def quantize_three_bits():
    W = weights()
    q = traced(blockwise.quantize)(W, codebook.NF3, 256)
    assert same(q, blockwise.quantize(W, codebook.NF3, 256))


def quantize_eight_bits():
    W, values = weights(), codebook.dynamic_map()
    q = traced(blockwise.quantize)(W, values, 256)
    assert same(q, blockwise.quantize(W, values, 256))


def dequantize_nf4_to_bfloat16():
    q = blockwise.quantize(weights())
    W = compiled(blockwise.dequantize)(q, torch.bfloat16)
    assert torch.equal(W, blockwise.dequantize(q, torch.bfloat16))


def dequantize_three_bits():
    q = blockwise.quantize(weights(), codebook.NF3)
    assert torch.equal(traced(blockwise.dequantize)(q), blockwise.dequantize(q))


def gradients(layer, graph, x):
    """Return both outputs and gradients; small integers, so that all sums are exact."""
    results = []
    for run in (layer, graph):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.sum().backward()
        trained = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y.detach(), x.grad, *(g.clone() for g in trained)])
    return results


def integers(*shape):
    return torch.randint(-8, 9, shape).float()


def lora_layer(base):
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(integers(*parameter.shape))
    layer = LoRALinear(base, LoRAConfig(3, 6.0).adapters({"": base})[""])
    layer.add("other", LoRAConfig(2, 1.0).adapters({"": base})[""])
    layer.activate({"default": 1.0, "other": 0.5})
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.copy_(integers(*parameter.shape))
    return layer


def lora_forward_and_backward():
    layer, x = lora_layer(nn.Linear(12, 7)), integers(5, 12).requires_grad_()
    for ours, theirs in zip(*gradients(layer, compiled(layer), x), strict=True):
        assert torch.equal(ours, theirs)


def lora_merged_and_switched():
    layer, x = lora_layer(nn.Linear(12, 7)), integers(5, 12)
    adapted, graph = layer(x), traced(layer)
    for change in (layer.merge, layer.unmerge, lambda: layer.activate({})):
        assert torch.equal(graph(x), adapted)
        change()
    assert torch.equal(graph(x), layer.base(x))


def lora_on_an_embedding_with_dropout():
    layer, ids = lora_layer(nn.Embedding(12, 7)), torch.arange(12)
    for lora in layer.adapters.values():
        lora.dropout = 0.5
    graph = traced(layer.eval())
    assert torch.equal(graph(ids), layer(ids))
    layer.train()
    assert not torch.equal(graph(ids), layer.eval()(ids))


def lora_on_four_bits():
    linear = nn.Linear(12, 7)
    linear.weight.data = codebook.NF4[torch.randint(0, 16, (7, 12))]
    layer = lora_layer(QuantizedLinear.from_linear(linear, blocksize=4).bfloat16())
    x = integers(5, 12).bfloat16().requires_grad_()
    for ours, theirs in zip(*gradients(layer, traced(layer), x), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def example(build):
    """Return a check: a module in a graph has the bits that it has without one.

    Output and all gradients are compared. The graph runs the same kernels as the module
    without a graph, so sums need not be exact.
    """

    def check():
        made = build("cpu")
        eager = modules.run(made)
        for ours, theirs in zip(
            modules.run(made, traced(made.module)), eager, strict=True
        ):
            assert torch.equal(ours, theirs)

    check.__name__ = f"module_{build.__name__}"
    return check


# A module that starts from a text differs only in its start, so one start is enough.
EXAMPLES = [
    example(build)
    for builds in modules.EXAMPLES.values()
    for build in builds
    if not build.__name__.endswith("from_text")
]


def lora_on_experts():
    """The graph breaks at a stack of experts, and every value stays the same."""
    holder = nn.ModuleDict({"experts": Experts(torch.randn(3, 5, 8))})
    layer = inject(holder, LoRAConfig(2, 4.0), ["experts"])["experts"]
    with torch.no_grad():
        for p in layer.adapters.parameters():
            p.normal_()
    x, chosen = torch.randn(4, 8), torch.tensor([0, 2, 1, 2])
    torch.compiler.reset()
    run = torch.compile(layer, backend="aot_eager")
    y, expected = run(x, chosen), layer(x, chosen)
    assert torch.equal(y, expected)
    ours, right = (
        torch.autograd.grad(out.sum(), list(layer.adapters.parameters()))
        for out in (y, expected)
    )
    assert all(map(torch.equal, ours, right))


def lora_on_the_experts_of_mixtral():
    """Inside of them a graph breaks, and there torch would lose its function modes."""
    from tests.lab.architectures import build

    block = build("MixtralForCausalLM").model.layers[0].mlp
    inject(block, LoRAConfig(2, 4.0), ["experts"])
    x = torch.linspace(-1, 1, 160).reshape(1, 5, -1)
    with torch.no_grad():
        for parameter in trainable_parameters(block):
            parameter += 0.1
    found = []
    torch.compiler.reset()
    for call in (block, torch.compile(block, backend="eager")):
        block.zero_grad()
        y = call(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in trainable_parameters(block))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def dora_on_layers_in_a_row():
    """Chain layers whose weights have rows of length two: every norm is exact."""
    weights = [rows_of_length_two(*shape) for shape in ((4, 8), (6, 4))]
    layers = [frozen(W, torch.arange(-2.0, len(W) - 2)) for W in weights]
    adapters = [reversing(W, 2) for W in weights]
    model = nn.Sequential(*map(DoRALinear, layers, adapters))
    x = integers(3, 8).requires_grad_()
    for ours, theirs in zip(*gradients(model, traced(model), x), strict=True):
        assert torch.any(theirs != 0)
        assert torch.equal(ours, theirs)


def dora_on_four_bits_of_a_gpu():
    """The graph of a GPU, captured here, calls the operators that launch kernels."""
    model, called = nn.Sequential(nn.Linear(64, 24)), []
    inject(quantize_linears(model), DoRAConfig(2, 4), "all-linear")

    def noting(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend=noting)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(launches, "GPUS", {"cpu"})
        patch.setattr(launches, "_compiler_is_here", lambda: True)
        assert run(integers(3, 64)).shape == (3, 24)
    for name in ("dequantize", "dora_row_norm"):
        assert any(f"minipeft.{name}" in target for target in called), called


def dora_recorded_by_jit():
    """torch.jit.trace holds its record against another one, without derivatives."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), integers(2, 8)
    inject(model, DoRAConfig(2, 4), ["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trace is deprecated; checks are no part
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))


CHECKS: list[Callable[[], None]] = [
    the_compiler_is_not_imported_before_it_is_used,
    quantize_nf4,
    quantize_fp4_from_bfloat16,
    quantize_three_bits,
    quantize_eight_bits,
    dequantize_nf4_to_bfloat16,
    dequantize_three_bits,
    lora_forward_and_backward,
    lora_merged_and_switched,
    lora_on_an_embedding_with_dropout,
    lora_on_four_bits,
    lora_on_experts,
    lora_on_the_experts_of_mixtral,
    dora_on_layers_in_a_row,
    dora_on_four_bits_of_a_gpu,
    dora_recorded_by_jit,
    *EXAMPLES,
]


def main():
    torch.set_num_threads(1)
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
        except Exception:
            traceback.print_exc(file=sys.stdout)
        else:
            print(f"passed {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
