"""Virtual tokens and bottlenecks in programs: global states, modes, copies."""

import copy
import pickle
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch

from minipeft.errors import InputError
from minipeft.torch.bottleneck import BottleneckConfig, place_beside
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import adapted, inject, merge, trainable_parameters, unload
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import prepare, quantize_linears
from tests.agreement.llama import TEXT, llama
from tests.properties.test_torch_programs import AMBIENT, ROWS


def beside(model):
    seed = torch.Generator().manual_seed(2)
    return place_beside(model, BottleneckConfig(3), ["mlp"], 32, seed)


WORDS = (4, 9, 2)
KINDS = {
    "prefix": lambda m: PrefixModel(m, PrefixConfig(3)),
    "prefix with a network": lambda m: PrefixModel(m, PrefixConfig(3, hidden=5)),
    "prefix from words": lambda m: PrefixModel(m, PrefixConfig(tokens=WORDS)),
    "prompt": lambda m: PromptModel(m, PromptConfig(3)),
    "prompt from words": lambda m: PromptModel(m, PromptConfig(tokens=WORDS)),
    "bottleneck beside": beside,
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_state = pytest.mark.parametrize("state", list(AMBIENT))


def make(kind, model=None):
    model = llama() if model is None else model
    torch.manual_seed(3)
    return KINDS[kind](model)


def trained(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@each_state
@each_kind
def test_they_start_as_if_nothing_were_ambient_and_can_be_trained(kind, state):
    expected, base = make(kind), llama()
    with AMBIENT[state]():
        found = make(kind, base)
    ours, right = (dict(m.named_parameters()) for m in (found, expected))
    assert ours.keys() == right.keys()
    assert all(torch.equal(ours[name], right[name]) for name in right)
    assert {p.dtype for p in trainable_parameters(found)} == {torch.float32}
    found(TEXT, labels=TEXT).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(found))


@pytest.mark.parametrize("state", [s for s in AMBIENT if s != "autocast"])
@each_kind
def test_the_forward_is_the_same(kind, state):
    model = trained(make(kind))
    y = model(TEXT).logits
    with AMBIENT[state]():
        assert torch.equal(model(TEXT).logits, y)


@each_kind
def test_under_autocast_they_follow_the_model(kind):
    model = trained(make(kind))
    exact = model(TEXT).logits
    with torch.autocast("cpu", torch.bfloat16):
        y = model(TEXT).logits
        assert y.dtype == llama()(TEXT).logits.dtype
    assert not torch.equal(y.float(), exact)
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("training", [True, False])
@each_kind
def test_the_mode_is_the_model_s_and_follows(kind, training):
    """To start from words, the model is run once: without dropout, in any mode."""
    model = make(kind, llama().train(training))
    assert {m.training for m in model.modules()} == {training}
    for mode in (not training, training):
        model.train(mode)
        assert {m.training for m in model.modules()} == {mode}
    assert {m.training for m in model.eval().modules()} == {False}


COPIES = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", list(COPIES))
@each_kind
def test_copies_compute_alike_and_apart(kind, way):
    model = trained(make(kind))
    y = model(TEXT).logits
    twin = COPIES[way](model)
    assert torch.equal(twin(TEXT).logits, y)
    trained(twin)
    assert not torch.equal(twin(TEXT).logits, y)
    assert torch.equal(model(TEXT).logits, y)


@each_kind
def test_a_base_in_16_bits_keeps_what_is_trained_in_32(kind):
    model = make(kind, llama().bfloat16())
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}
    out = model(TEXT, labels=TEXT)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {p.grad.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["prefix", "prefix with a network", "prompt"])
def test_a_tied_weight_is_in_a_file_once_and_comes_back(kind, assign):
    tied, other = (llama(), llama())
    for model in (tied, other):
        model.lm_head.weight = model.model.embed_tokens.weight
    model, again = trained(make(kind, tied)), make(kind, other)
    file = safetensors.torch.save(model.state_dict())
    again.load_state_dict(safetensors.torch.load(file), assign=assign)
    assert torch.equal(again(TEXT).logits, model(TEXT).logits)
    whole = {**model.state_dict(), "model.lm_head.weight": tied.lm_head.weight}
    again.load_state_dict(whole)  # a file with both names
    with pytest.raises(RuntimeError, match=r"Missing key.*embed_tokens"):
        again.load_state_dict({k: v for k, v in whole.items() if "embed" not in k})


# --- together with adapters of other rows --------------------------------------------


OTHERS = {row: (config, ["o_proj"]) for row, config in ROWS.items()} | {
    "ia3": (IA3Config(["down_proj"]), ["k_proj", "down_proj"]),
    "lora on every layer": (LoRAConfig(2, 4.0), "all-linear"),
    "bottleneck beside": (None, []),
}


def adapt(model, row):
    config, targets = OTHERS[row]
    if row == "bottleneck beside":
        return beside(model)
    if "bits" in row:
        quantize_linears(model, blocksize=8)
    return inject(model, config, targets, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("row", list(OTHERS))
@pytest.mark.parametrize("kind", ["prefix with a network", "prompt"])
def test_virtual_tokens_and_adapters_train_together_in_either_order(kind, row):
    alone = {n for n, p in make(kind).named_parameters() if p.requires_grad}
    adapters = {
        f"model.{n}"
        for n, p in adapt(llama(), row).named_parameters()
        if p.requires_grad
    }
    first, second = adapt(make(kind), row), make(kind, adapt(llama(), row))
    for model in (first, second):
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        assert wanted == alone | adapters
        trained(model)(TEXT, labels=TEXT).loss.backward()
        grads = {n for n, p in model.named_parameters() if p.grad is not None}
        assert grads == wanted
        assert not any("lm_head" in name for name in adapted(model))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(TEXT).logits, second(TEXT).logits)


@pytest.mark.parametrize("kind", ["prefix with a network", "prompt"])
def test_virtual_tokens_are_not_frozen_by_a_late_preparation(kind):
    model = make(kind, quantize_linears(llama(), blocksize=8))
    with pytest.raises(InputError, match=r"^P\w+Model trains parameters; prepare firs"):
        prepare(model)
    assert trainable_parameters(model)


@pytest.mark.parametrize("kind", ["prefix with a network", "prompt"])
def test_virtual_tokens_answer_as_the_model_does_or_refuse(kind, tmp_path):
    model = make(kind)
    assert model.config is model.model.config
    with pytest.raises(InputError, match="virtual tokens have no place in a model"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    text = model.generate(TEXT, max_new_tokens=3)
    assert torch.equal(model.generate(inputs=TEXT, max_new_tokens=3), text)
    for texts, where in (
        ({}, "nowhere"),
        ({"input_ids": TEXT, "inputs": TEXT}, "twic"),
    ):
        with pytest.raises(InputError, match=f"^the text is given {where}"):
            model.generate(**texts)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with pytest.raises(Exception, match=r"load_state_dict|type `minipeft`"):
        type(model.model).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["prefix with a network", "prompt"])
def test_the_remedy_of_save_pretrained_works_with_adapters_inside(kind, tmp_path):
    def refused(model, remedy):
        with pytest.raises(InputError, match=f"or PrefixModel; {remedy}"):
            model.save_pretrained(tmp_path)
        assert not [*tmp_path.iterdir()]

    alone = r"model\.model\.save_pretrained"
    few_bits = make(kind, quantize_linears(llama(), blocksize=8))
    refused(few_bits, f"{alone}, .* refused too")
    low = LoRAConfig(r=2, alpha=4), ["q_proj"]
    for model, remedy in (
        (make(kind, inject(llama(), *low)), lambda m: unload(merge(m))),
        (inject(make(kind), *low), lambda m: unload(merge(m))),
        (inject(make(kind), *low), unload),
        (make(kind, inject(llama(), BottleneckConfig(2), ["o_proj"])), unload),
    ):
        both = r"after unload\(merge\(model\.model\)\), or unload\(model\.model\)"
        refused(model, both)
        remedy(model.model)
        refused(model, f"{alone} saves")
        with TemporaryDirectory() as folder:
            model.model.save_pretrained(folder)
            again = type(model.model).from_pretrained(folder)
            assert torch.equal(again(TEXT).logits, model.model(TEXT).logits)
