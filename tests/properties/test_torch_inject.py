"""Laws of injection: it works on any model, refuses in words, and is undone exactly."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from minipeft.errors import InputError
from minipeft.torch.inject import (
    activate,
    adapted,
    adapter_state_dict,
    add,
    inject,
    load_adapter_state_dict,
    merge,
    remove,
    trainable_parameters,
    unload,
    unmerge,
)
from minipeft.torch.lora import LoRAConfig, LoRALinear

CONFIG = LoRAConfig(r=3, alpha=2.0)
IDS = torch.tensor([[1, 5, 9, 2, 11, 7, 3], [4, 4, 8, 1, 0, 6, 10]])
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(tied=True):
    config = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def bert():
    return BertForMaskedLM(BertConfig(**SIZES))


def gpt2():
    sizes = {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


MODELS = {  # maker, targets, number of layers that the targets name
    "llama": (llama, ["q_proj", "v_proj", "layers.*.mlp.*"], 10),
    "bert": (bert, ["query", "value", "position_embeddings"], 5),
    "gpt2": (gpt2, ["c_attn", "mlp.c_fc", "wpe"], 5),
}
each_model = pytest.mark.parametrize("kind", list(MODELS))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(kind):
    maker, targets, _ = MODELS[kind]
    return maker().eval(), targets


def trained(model):
    """Give A and B values as after training: neither is zero."""
    for parameter in trainable_parameters(model):
        nn.init.normal_(parameter)
    return model


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


# --- whole models --------------------------------------------------------------------


@each_model
def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(kind):
    model, targets = make(kind)
    before = outputs(model)
    assert inject(model, CONFIG, targets) is model
    assert torch.equal(outputs(model), before)
    layers = adapted(model)
    assert len(layers) == MODELS[kind][2]
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{n}.adapters.default.{M}" for n in layers for M in "AB"}
    assert len(trainable_parameters(model)) == len(names)


@each_model
def test_unmerging_and_unloading_give_the_model_back(kind):
    model, targets = make(kind)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    trained(inject(model, CONFIG, targets))
    with_adapters = outputs(model)
    assert not torch.equal(with_adapters, before)
    unmerge(merge(model))
    assert torch.equal(outputs(model), with_adapters)
    assert unload(model) is model
    assert not adapted(model)
    assert torch.equal(outputs(model), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)


def test_a_model_without_adapters_has_nothing_to_merge():
    plain = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(InputError, match="has no adapters to merge"):
        merge(plain)
    with pytest.raises(InputError, match="has no adapters to merge"):
        merge(unload(merge(inject(plain, CONFIG, ["0"]))))


@each_model
def test_unloading_a_merged_model_leaves_a_plain_model_that_does_the_same(kind):
    model, targets = make(kind)
    names = list(model.state_dict())
    merge(trained(inject(model, CONFIG, targets)))
    merged = outputs(model)
    unload(model)
    assert not adapted(model)
    assert list(model.state_dict()) == names
    assert torch.equal(outputs(model), merged)
    twin, _ = make(kind)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(twin), merged)


@each_model
def test_copies_and_state_dicts_carry_everything(kind):
    model, targets = make(kind)
    trained(inject(model, CONFIG, targets))
    expected = outputs(model)
    assert torch.equal(outputs(copy.deepcopy(model)), expected)
    twin = inject(make(kind)[0], CONFIG, targets)
    twin.load_state_dict(merge(model).state_dict())
    assert torch.equal(outputs(twin), expected)


@each_model
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, targets = make(kind)
    trained(inject(model, LoRAConfig(r=3, alpha=2.0, dropout=0.1), targets)).train()
    for module in model.modules():  # dropout of the base would draw other numbers
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for enable in (None, model.activation_checkpointing_enable):
        if enable:
            enable()
        torch.manual_seed(1)
        model.zero_grad()
        model(IDS, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad.clone() for p in trainable_parameters(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        assert torch.equal(plain, checkpointed)


# --- targets -------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer in two places, one nested deep, and a decoder tied by its weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.deep = nn.ModuleList([nn.Sequential(nn.Linear(4, 6), nn.ReLU())])
        self.head = nn.Linear(6, 12, bias=False)
        self.decode = nn.Linear(4, 12, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids):
        h = self.again(self.first(self.embed(ids)))
        return self.head(self.deep[0](h)) + self.decode(h)


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("head", ["head"]),
        ("deep.0.0", ["deep.0.0"]),
        ("0.0", ["deep.0.0"]),
        ("deep.*", ["deep.0.0"]),
        ("[hf]*", ["first", "again", "head"]),
        ("fir?t", ["first", "again"]),
        ("again", ["first", "again"]),
    ],
)
def test_targets(target, names):
    model = inject(Shared(), CONFIG, [target])
    everywhere = dict(model.named_modules(remove_duplicate=False))
    found = [n for n, m in everywhere.items() if isinstance(m, LoRALinear)]
    assert found == names


def test_one_string_is_one_target():
    assert list(adapted(inject(Shared(), CONFIG, "head"))) == ["head"]


def test_a_layer_that_serves_twice_is_adapted_once():
    model = inject(Shared(), CONFIG, ["first"])
    assert model.first is model.again
    ids = torch.arange(5)
    before = model(ids)
    trained(model)
    assert not torch.equal(model(ids), before)
    unload(model)
    assert model.first is model.again
    assert torch.equal(model(ids), before)


REFUSED = {
    "nothing": "'nothing' matches no layer; choose from 0, again, decode, embed, first",
    "rst": "'rst' matches no layer",
    "x*": r"'x\*' matches no layer",
    "deep": "deep: ModuleList has no weight matrix",
    "deep.0.1": r"deep\.0\.1: ReLU has no weight matrix",
    "decode": "decode shares its weight with embed",
    "embed": "embed shares its weight with decode",
    "*": "shares its weight",
}


@pytest.mark.parametrize("target", list(REFUSED))
def test_a_target_that_cannot_be_adapted_is_refused_before_anything_changes(target):
    model = Shared()
    with pytest.raises(InputError, match=REFUSED[target]):
        inject(model, CONFIG, ["head", target])
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("r", [0, -1, 5])
def test_a_rank_out_of_range_names_the_layer(r):
    model = Shared()
    with pytest.raises(InputError, match=rf"first: r is {r}; choose 1 to 4"):
        inject(model, LoRAConfig(r, 2.0), ["first"])
    with pytest.raises(InputError, match=r"cannot be used"):
        inject(model, CONFIG, ["first"], name="a.b")
    assert not adapted(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("target", ["first", "*rst", "again"])
def test_a_second_injection_into_a_layer_is_refused(target):
    model = inject(Shared(), CONFIG, ["first"])
    with pytest.raises(InputError, match=r"already adapted by default; use add\(\)"):
        inject(model, CONFIG, [target])
    with pytest.raises(InputError, match="matches no layer"):
        inject(model, CONFIG, ["first.base"])


def test_a_second_injection_elsewhere_leaves_the_first_trainable():
    model = inject(inject(Shared(), CONFIG, ["first"]), CONFIG, ["head"])
    assert len(trainable_parameters(model)) == 4


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_refused_and_untied_ones_are_not(target):
    with pytest.raises(InputError, match="tie_word_embeddings = False"):
        inject(llama(), CONFIG, [target])
    model = llama(tied=False).eval()
    before = outputs(model)
    trained(inject(model, CONFIG, [target]))
    assert not torch.equal(outputs(model), before)


def test_the_same_seed_gives_the_same_adapters():
    models = [
        inject(Shared(), CONFIG, ["head", "first"], generator=torch.manual_seed(5))
        for _ in range(2)
    ]
    first, second = (adapter_state_dict(model) for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_class_is_no_config():
    with pytest.raises(InputError, match=r"the class LoRAConfig; give one, such as"):
        inject(nn.Sequential(nn.Linear(2, 2)), LoRAConfig, ["0"])


def test_a_layer_by_itself_is_told_what_to_do():
    layer = LoRALinear(nn.Linear(5, 4), CONFIG.adapters({"": nn.Linear(5, 4)})[""])
    with pytest.raises(InputError, match=r"call its own unload\(\)"):
        unload(layer)


# --- several adapters ----------------------------------------------------------------


@pytest.fixture
def model():
    model = inject(Shared(), CONFIG, ["first", "head"], name="one")
    inject(model, CONFIG, ["deep.0.0"], name="three")
    return trained(add(model, LoRAConfig(r=2, alpha=6.0), "two"))


def run(model):
    with torch.no_grad():
        return model(torch.arange(12))


def test_adapters_are_switched_summed_and_put_away(model):
    one, base = run(activate(model, "one")), run(activate(model, {}))
    summed = run(activate(model, {"one": 0.5, "two": 2.0}))
    merged = [layer.merged() for layer in adapted(model).values()]
    assert not torch.equal(one, summed)
    assert torch.equal(run(activate(model, "one")), one)
    assert torch.equal(run(activate(model, {})), base)
    merge(activate(model, {"one": 0.5, "two": 2.0}))
    for layer, weight in zip(adapted(model).values(), merged, strict=True):
        assert torch.equal(layer.weight, weight)
    assert torch.equal(run(unload(unmerge(model))), base)


def test_an_adapter_acts_only_where_it_was_injected(model):
    activate(model, "three")
    assert [list(layer.active) for layer in adapted(model).values()].count([]) == 2


def test_removing_the_last_adapter_removes_the_wrapper(model):
    base = run(activate(model, {}))
    remove(remove(model, "one"), "two")
    assert list(adapted(model)) == ["deep.0.0"]
    remove(model, "three")
    assert not adapted(model)
    assert torch.equal(run(model), base)


def test_names_that_are_taken_or_unknown_are_refused(model):
    with pytest.raises(InputError, match=r"first: the adapter name 'one'"):
        add(model, CONFIG, "one")
    for attempt in (activate, remove, adapter_state_dict):
        with pytest.raises(InputError, match="'four'; choose from one, three, two"):
            attempt(model, "four")


def test_where_there_is_no_adapter_the_remedy_is_to_make_one():
    plain = nn.Sequential(nn.Linear(4, 4))
    first = "the model has no adapters: inject or load one first"
    for attempt in (
        lambda: load_adapter_state_dict(plain, {}),
        lambda: adapter_state_dict(plain),
        lambda: activate(plain, "default"),
        lambda: remove(plain, "default"),
    ):
        with pytest.raises(InputError, match=rf"no .* adapter 'default'; {first}\.$"):
            attempt()
    with pytest.raises(
        InputError, match=r"'a\.b' cannot be .* choose one without a dot\.$"
    ):
        inject(plain, CONFIG, ["0"], "a.b")
    with pytest.raises(
        InputError, match=r"no layer; the model has no layer that can be"
    ):
        inject(nn.Sequential(nn.ReLU()), CONFIG, ["q_proj"])
    assert not adapted(plain)


# --- files ---------------------------------------------------------------------------


def test_an_adapter_alone_carries_over(model):
    tensors = adapter_state_dict(model, "two")
    assert set(tensors) == {f"{n}.{M}" for n in adapted(model) for M in "AB"}
    twin = copy.deepcopy(model)
    expected = run(activate(model, "two"))
    merge(activate(trained(twin), "two"))
    load_adapter_state_dict(twin, tensors, "two")
    assert torch.equal(run(twin), run(merge(model)))
    assert torch.equal(run(unmerge(twin)), expected)


def test_tensors_that_do_not_fit_are_refused_whole(model):
    tensors = {k: t + 1 for k, t in adapter_state_dict(model, "one").items()}
    before = copy.deepcopy(adapter_state_dict(model, "one"))
    key = next(iter(tensors))
    damaged = {
        "is missing": {k: t for k, t in tensors.items() if k != key},
        "is unexpected": tensors | {f"{key}.x": tensors[key]},
        r"has shape \(1,\)": tensors | {key: torch.ones(1)},
        "is not finite": tensors | {key: tensors[key].double() * 0 + 1e300},
        "is torch.sparse_coo": tensors | {key: tensors[key].to_sparse()},
    }
    for reason, attempt in damaged.items():
        with pytest.raises(InputError, match=f"'one': {key}.*{reason}"):
            load_adapter_state_dict(model, attempt, "one")
    last = list(tensors)[-1]  # the layers before it must not have been written
    with pytest.raises(InputError, match=f"'one': {last} is on the device meta"):
        load_adapter_state_dict(
            model, tensors | {last: tensors[last].to("meta")}, "one"
        )
    after = adapter_state_dict(model, "one")
    assert all(torch.equal(after[k], before[k]) for k in before)
