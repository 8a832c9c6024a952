"""A run that cannot train is stopped with its true cause."""

import re
import warnings

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab.train import GrowthWarning, TrainConfig, train
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import activate, adapted, adapters_of, add, inject
from minipeft.torch.lora import LoRAConfig
from tests.lab.architectures import build
from tests.lab.test_train import (
    BATCHES,
    assert_same,
    freeze_all_but,
    settings,
    weights,
)


def merged(toy):
    inject(toy, LoRAConfig(2, 4), ["q_proj", "v_proj"])
    list(adapted(toy).values())[1].merge()


def idle(toy):
    activate(inject(toy, LoRAConfig(2, 4), ["q_proj"]), {})


def of_no_share(toy):
    activate(inject(toy, LoRAConfig(2, 4), ["q_proj"]), {"default": 0.0})


def another(toy):
    add(inject(toy, LoRAConfig(2, 4), ["q_proj"]), LoRAConfig(2, 4), "two")
    for part in adapters_of(toy).values():
        part.requires_grad_(False)


def frozen(toy):
    inject(toy, LoRAConfig(2, 4), ["q_proj"]).requires_grad_(False)


def plain_and_frozen(toy):
    toy.requires_grad_(False)


def detached(toy):
    freeze_all_but(toy, "q_proj")
    toy.model.register_forward_hook(lambda _, __, out: detach(out))


def detach(out):
    out.last_hidden_state = out.last_hidden_state.detach()
    return out


def not_called(toy):
    toy.requires_grad_(False)
    toy.spare = torch.nn.Linear(2, 2)


def reentrant(toy):
    freeze_all_but(toy, "q_proj")
    toy.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": True}
    )
    toy.disable_input_require_grads()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (merged, "layers.0.self_attn.v_proj is merged: .* call unmerge(model) first"),
        (idle, "'default' is not active, .* call activate(model, 'default') first"),
        (of_no_share, "'default' has share 0, .* call activate(model, 'default')"),
        (another, "the adapter 'two' is not active, so nothing would train; call acti"),
        (frozen, "the adapters of the model are frozen, .* adapters_of(model).values"),
        (plain_and_frozen, "no parameter requires gradients; inject an adapter first"),
        (detached, "model.layers.0.self_attn.q_proj is called; look for detach()"),
        (not_called, "spare.weight belongs to no module that is called; train what"),
        (
            reentrant,
            "gets no gradient, as do .* under reentrant checkpointing, .* pass",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_why_nothing_would_train_is_said(toy, change, sentence):
    change(toy)
    before = weights(toy)
    pattern = re.escape(sentence).replace(re.escape(" .* "), " .* ")
    with pytest.raises(InputError, match=pattern):
        train(toy, BATCHES, settings(toy))
    assert_same(weights(toy), before)
    assert all(p.grad is None for p in toy.parameters())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_where_gradients_are_off_is_refused(toy, off):
    with off(), pytest.raises(InputError, match="gradients are off here; call train o"):
        train(toy, BATCHES, settings(toy))


def test_adapters_that_are_idle_in_part_train(toy):
    add(inject(toy, LoRAConfig(2, 4), ["q_proj"]), LoRAConfig(2, 4), "two")
    before = weights(toy)
    train(toy, BATCHES, settings(toy))
    moved = {n for n, w in weights(toy).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if ".adapters.default." in n}


@pytest.mark.parametrize("rate", [1e10, 1e30, 1e37])
@pytest.mark.parametrize("with_adapters", [True, False], ids=["lora", "full"])
def test_an_absurd_rate_is_named_as_the_cause(rate, with_adapters):
    model = build("LlamaForCausalLM", vocab_size=64)
    if with_adapters:
        inject(model, LoRAConfig(4, 8), ["q_proj", "v_proj"])
    cause = r"the largest trained weight went from [\d.]+ to [\d.]+e\+\d+; lower the l"
    with pytest.raises(
        InputError, match=rf"{cause}.* \(it is {re.escape(format(rate, 'g'))}\)"
    ):
        train(model, BATCHES, TrainConfig(4, lr=rate))


@pytest.mark.parametrize("rate", [3.4e38, 1e39, 1e300])
def test_a_rate_beyond_float32_changes_nothing(toy, rate):
    before = weights(toy)
    with pytest.raises(InputError, match=r"is beyond what float32 can step by; lower"):
        train(toy, BATCHES, TrainConfig(4, lr=rate))
    assert_same(weights(toy), before)


def test_the_rate_is_not_blamed_before_the_first_step(toy):
    toy.lm_head.register_forward_hook(lambda _, __, y: y / 0)
    with pytest.raises(InputError, match="before anything was trained, and every w"):
        train(toy, BATCHES, settings(toy))


def test_a_trained_weight_that_starts_as_nan_is_named(toy):
    with torch.no_grad():
        toy.model.norm.weight[0] = float("nan")
    with pytest.raises(
        InputError, match=r"norm\.weight is not finite; it was so before"
    ):
        train(toy, BATCHES, settings(toy))


@pytest.mark.parametrize(("lr", "said"), [(1e4, 1), (1e-2, 0)])
def test_weights_that_grow_beyond_sense_are_told_once_though_the_loss_is_finite(
    toy, lr, said
):
    """The norms of a Llama keep the loss finite at rates that are far too large."""
    inject(toy, IA3Config(("down_proj",)), ["k_proj", "v_proj", "down_proj"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(toy, BATCHES, TrainConfig(6, lr, validate_every=2), ())
    found = [w for w in caught if issubclass(w.category, GrowthWarning)]
    sentence = (
        r"^by step 2 the largest trained weight went from 1 to [\d.e+]+; lower the "
        r"learning rate \(it is 10000\)$"
    )
    assert len(found) == said
    assert all(re.match(sentence, str(w.message)) for w in found)
