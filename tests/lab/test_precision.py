"""Training in 16 bits with float32 adapters: plain, under autocast, checkpointed."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipeft.errors import InputError
from minipeft.lab.text import consecutive, windows
from minipeft.lab.train import TrainConfig, loss, train
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear, prepare, quantize_linears

TEXT = torch.arange(400) * 7 % 29 + 2
BATCHES = windows(TEXT, (4, 12), bos=1, seed=3)
HALF = windows(TEXT, (2, 12), bos=1, seed=3)
VALIDATION = consecutive(TEXT, (4, 12), bos=1)[:2]


def adapted(model, method=LoRAConfig):
    torch.manual_seed(0)
    return inject(model, method(r=4, alpha=8), "all-linear")


def gradients(model, batches=(0,), enable=lambda model: None):
    """Return the sum of the gradients of some batches."""
    model.train()
    enable(model)
    for index in batches:
        model(**BATCHES(index)).loss.backward()
    return [p.grad for p in trainable_parameters(model)]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("method", [LoRAConfig, DoRAConfig])
def test_a_base_in_bfloat16_trains_adapters_in_float32(toy, method, quantized):
    base = toy.to(torch.bfloat16)
    model = adapted(quantize_linears(base) if quantized else base, method)
    before = loss(model, VALIDATION)
    fixed = {k: v.clone() for k, v in model.state_dict().items() if "adapter" not in k}
    history = train(model, BATCHES, TrainConfig(5, lr=3e-2), VALIDATION)
    assert history.validation[-1][1] < before
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in fixed.items())


def test_an_update_below_the_steps_of_bfloat16_is_kept(toy):
    """Near 1 the next bfloat16 is 2^-7 away; the next float32 is much nearer."""
    model = adapted(toy.to(torch.bfloat16), DoRAConfig)
    named = model.named_parameters()
    before = {n: p.detach().clone() for n, p in named if p.requires_grad}
    train(model, BATCHES, TrainConfig(2, lr=1e-5))
    for name, parameter in model.named_parameters():
        if name in before and "magnitude" in name:
            moved = parameter != before[name]
            unseen = parameter.bfloat16() == before[name].bfloat16()
            assert (moved & unseen).any()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("method", [LoRAConfig, DoRAConfig])
def test_under_autocast_a_model_in_float32_trains(toy, method, quantized):
    model = adapted(quantize_linears(toy) if quantized else toy, method)
    before = loss(model, VALIDATION)
    seen = []
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        train(model, BATCHES, TrainConfig(5, lr=3e-2))
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    assert loss(model, VALIDATION) < before
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}


def test_accumulation_in_bfloat16_adds_up_in_float32(toy):
    """The gradients of accumulated batches are the sum of each batch's gradients."""
    model = adapted(toy.to(torch.bfloat16))
    apart = [gradients(copy.deepcopy(model), [index]) for index in (0, 1)]
    together = gradients(model, (0, 1))
    for one, other, both in zip(*apart, together, strict=True):
        assert both.dtype == torch.float32
        assert torch.equal(one + other, both)


def test_accumulation_in_bfloat16_trains(toy):
    model = adapted(toy.to(torch.bfloat16))
    before = loss(model, VALIDATION)
    history = train(model, HALF, TrainConfig(4, lr=3e-2, accumulate=2), VALIDATION)
    assert len(history.losses) == 4
    assert history.validation[-1][1] < before


def checkpointed(model, reentrant):
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": reentrant}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit_of_a_gradient(toy, dtype, quantized, reentrant):
    base = toy.to(dtype)
    base = quantize_linears(base) if quantized else base
    plain = gradients(adapted(copy.deepcopy(base)))
    enable = partial(checkpointed, reentrant=reentrant)
    again = gradients(adapted(base), enable=enable)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class Blocks(nn.Module):
    """A checkpointed block between an embedding and a trained head."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(31, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.head, self.unused = nn.Linear(8, 31), nn.Linear(8, 8)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        self.unused(x)
        x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        self.logits = self.head(x)
        self.loss = nn.functional.cross_entropy(
            self.logits.flatten(0, 1), labels.flatten()
        )
        return self


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's
def test_checkpointing_that_would_train_nothing_is_refused():
    """The head is trained, so neither the loss nor torch would stop the run."""
    model = inject(Blocks(True), LoRAConfig(2, 4.0), "all-linear")
    sentence = r"^block\.0\.adapters.* as do 1 more: .* pass use_reentrant=False"
    before = [p.clone() for p in trainable_parameters(model)]
    with pytest.raises(InputError, match=sentence):
        train(model, BATCHES, TrainConfig(2))
    assert all(map(torch.equal, before, trainable_parameters(model)))
    assert all(p.grad is None for p in trainable_parameters(model))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_nothing_depends_on_does_not_stop_a_run():
    model = inject(Blocks(False), LoRAConfig(2, 4.0), "all-linear")
    other = inject(Blocks(True), LoRAConfig(2, 4.0), "all-linear")
    other.load_state_dict(model.state_dict())
    other.embed.register_forward_hook(lambda *given: given[-1].requires_grad_())
    histories = [train(m, BATCHES, TrainConfig(2)) for m in (model, other)]
    assert histories[0].losses == histories[1].losses


def test_preparing_keeps_in_float32_what_is_not_quantized(toy):
    model = quantize_linears(toy.to(torch.bfloat16))
    codes = [
        m.packed.clone() for m in model.modules() if isinstance(m, QuantizedLinear)
    ]
    norm = model.model.norm.weight.detach().clone()
    assert prepare(model) is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.model.norm.weight, norm.float())
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(torch.equal(m.packed, c) for m, c in zip(layers, codes, strict=True))
    assert {m.weight.dtype for m in layers} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = adapted(model)
    before = loss(model, VALIDATION)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, BATCHES, TrainConfig(5, lr=3e-2))
    assert loss(model, VALIDATION) < before


def test_preparing_is_refused_where_there_is_nothing_to_prepare(toy):
    with pytest.raises(InputError, match="no layer is quantized"):
        prepare(toy)
    with pytest.raises(InputError, match=r"trains parameters; prepare first"):
        prepare(adapted(quantize_linears(toy)))
