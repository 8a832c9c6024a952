"""The torch column refuses operands that do not fit, from any caller."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.torch import (
    attention,
    blockwise,
    bottleneck,
    codebook,
    double_quant,
    inject,
    loftq,
    lora,
    pissa,
    prefix,
    prompt,
)
from minipeft.torch.attention import Head
from minipeft.torch.bottleneck import Bottleneck, BottleneckConfig, Parallel
from tests.operands import annotations_off
from tests.properties.ambient import STATES

W = torch.arange(12.0).view(3, 4)
Q = blockwise.quantize(W, blocksize=4)
NESTED = double_quant.quantize(W, blocksize=4, nested_blocksize=4)
HEAD = {"Q": torch.ones(2, 3, 4), "K": torch.ones(2, 5, 4), "V": torch.ones(2, 5, 6)}
PREFIX = prefix.Prefix(torch.ones(2, 4), torch.ones(2, 6))
DOWN, UP = torch.ones(2, 4), torch.ones(4, 2)
WIDE = lora.LoRA(torch.ones(2, 4), torch.ones(1, 2), 2.0)


def q(**changes):
    return blockwise.dequantize(replace(Q, **changes))


def nested(**changes):
    return double_quant.dequantize(replace(NESTED, **changes))


def attended(**changes):
    return attention.forward(Head(**{**HEAD, **changes}))


def with_parameter(name, value):
    """Return an adapter with one part replaced after it was built."""
    adapter = Bottleneck(DOWN, UP)
    setattr(adapter, name, nn.Parameter(value))
    return adapter(torch.ones(5, 4))


def beside(base):
    return Parallel(base, Bottleneck(DOWN, UP))(torch.ones(5, 4))


WRONG = {
    "complex W": (lambda: blockwise.quantize(W + 1j), "W has dtype complex64"),
    "whole W": (lambda: blockwise.quantize(W.int()), "W has dtype int32"),
    "square codebook": (
        lambda: blockwise.quantize(W, codebook.NF4.view(4, 4)),
        "the codebook has shape (4, 4)",
    ),
    "codebook of nan": (
        lambda: blockwise.quantize(W, codebook.NF4 / 0),
        "the codebook holds -inf at code 0",
    ),
    "result of integers": (
        lambda: blockwise.dequantize(Q, torch.int8),
        "the result has dtype torch.int8",
    ),
    "packed of floats": (lambda: q(packed=torch.ones(6)), "packed has dtype"),
    "packed, one more": (lambda: q(packed=Q.packed[:5]), "packed has 5 values"),
    "packed, square": (lambda: q(packed=Q.packed.view(2, 3)), "packed has dtype"),
    "one absmax": (lambda: q(absmax=Q.absmax[:1]), "absmax has 1 values"),
    "absmax, row": (lambda: q(absmax=Q.absmax[None]), "absmax has shape (1, 3)"),
    "absmax of bytes": (lambda: q(absmax=Q.absmax.byte()), "absmax has dtype uint8"),
    "shape below 0": (lambda: q(shape=(-3, -4)), "shape is (-3, -4)"),
    "two offsets": (
        lambda: nested(offset=torch.ones(2)),
        "offset has shape (2,); give one number",
    ),
    "nested absmax": (
        lambda: nested(nested_absmax=torch.ones(3)),
        "the scales: absmax has 3 values",
    ),
    "mask of numbers": (
        lambda: attended(mask=torch.ones(3, 5)),
        "the mask has dtype torch.float32; give booleans",
    ),
    "one row of a mask": (
        lambda: attended(mask=torch.ones(1, 5, dtype=torch.bool)),
        "the mask has shape (1, 5); these queries and keys need (3, 5)",
    ),
    "one batch of K": (lambda: attended(K=torch.ones(1, 5, 4)), "K has shape (1, 5"),
    "V of one key": (lambda: attended(V=torch.ones(2, 1, 6)), "V has shape (2, 1, 6)"),
    "no key": (
        lambda: attended(K=torch.ones(2, 0, 4), V=torch.ones(2, 0, 6)),
        "there are 0 keys",
    ),
    "prefix of another head": (
        lambda: prefix.forward(Head(**HEAD), prefix.Prefix(PREFIX.V, PREFIX.V)),
        "the prefix's K has shape (2, 6)",
    ),
    "prefix with fewer values": (
        lambda: prefix.forward(Head(**HEAD), prefix.Prefix(PREFIX.K, PREFIX.V[:1])),
        "the prefix's V has shape (1, 6)",
    ),
    "prompt of another width": (
        lambda: prompt.forward(torch.ones(2, 3, 4), prompt.Prompt(torch.ones(2, 1))),
        "the prompt's P has shape (2, 1)",
    ),
    "down turned": (lambda: Bottleneck(DOWN.T, UP), "up has shape (4, 2); it must be"),
    "one bias": (
        lambda: Bottleneck(DOWN, UP, 1.0, torch.ones(1)),
        "down_bias has shape (1,); it must be (2,)",
    ),
    "scaling": (lambda: Bottleneck(DOWN, UP, float("nan")), "scaling is nan"),
    "replaced bias": (
        lambda: with_parameter("up_bias", torch.ones(1)),
        "up_bias has shape (1,)",
    ),
    "replaced up": (
        lambda: with_parameter("up", torch.ones(1, 2)),
        "up has shape (1, 2)",
    ),
    "x of another width": (
        lambda: Bottleneck(DOWN, UP)(torch.ones(5, 1)),
        "x has shape (5, 1)",
    ),
    "a narrower sublayer": (
        lambda: beside(nn.Linear(4, 1)),
        "the sublayer returns shape (5, 1), and the adapter beside it (5, 4)",
    ),
    "one row of B": (lambda: pissa.residual(W, WIDE), "B has shape (1, 2)"),
    "alpha": (lambda: pissa.init(W, 2, float("inf")), "alpha is inf"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_operand_that_does_not_fit_is_refused(name):
    call, sentence = WRONG[name]
    with annotations_off(), pytest.raises(InputError, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize(
    "config",
    [
        pissa.PiSSAConfig(1, 2.0),
        loftq.LoftQConfig(1, 2.0, blocksize=4),
    ],
)
def test_a_weight_that_is_nan_is_named_by_its_layer_before_anything_changes(config):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    with torch.no_grad():
        model[1].weight[2, 1] = torch.nan
    before = list(model)
    with pytest.raises(InputError, match=r"^1: .*NaN"):
        inject.inject(model, config, ["0", "1"])
    assert list(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_what_stands_beside_a_sublayer_answers_for_it_but_for_its_weight():
    layer = nn.Linear(4, 4).eval()
    placed = Parallel(layer, Bottleneck(DOWN, UP))
    assert placed.in_features == 4
    assert not placed.training
    with pytest.raises(AttributeError, match="weight"):
        _ = placed.weight  # code that read the weight would lose the adapter


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_bottleneck_starts_and_computes_alike_under_every_state(state):
    def made(model):
        generator = torch.Generator().manual_seed(0)
        adapter = bottleneck.init(generator, 6, 3, 0.5)
        bottleneck.place_beside(model, BottleneckConfig(2), ["0"], 6, generator)
        return [*adapter.parameters(), *model[0].adapter.parameters()]

    bases = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2)]
    expected = made(bases[0])
    with state():
        found = made(bases[1])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
        assert not ours.is_inference()


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_start_and_compute_alike_under_every_state(state, kind):
    from tests.agreement.llama import TEXT, llama

    wrapper, config = {
        "prefix": (prefix.PrefixModel, prefix.PrefixConfig),
        "prompt": (prompt.PromptModel, prompt.PromptConfig),
    }[kind]
    model, starts = llama(), [config(tokens=[4, 9, 2]), config(3)]
    if kind == "prefix":
        starts.append(config(3, hidden=5))
    for start in starts:
        torch.manual_seed(0)
        expected = wrapper(model, start)
        torch.manual_seed(0)
        with state():
            found = wrapper(model, start)
        for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
            assert ours.requires_grad == theirs.requires_grad
            assert not ours.is_inference()
        found(TEXT, labels=TEXT).loss.backward()
        with state():
            out = found(TEXT).logits
        assert out.device.type == "cpu"
