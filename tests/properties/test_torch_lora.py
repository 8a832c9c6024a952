"""Laws of adapted layers in torch: exact unmerging, saved state, named adapters."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.torch.lora import LoRA, LoRAConfig, LoRALinear, delta
from minipeft.torch.qlora import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYERS = {
    "linear": lambda: nn.Linear(12, 7),
    "linear without bias": lambda: nn.Linear(12, 7, bias=False),
    "Conv1D": lambda: Conv1D(7, 12),
    "embedding": lambda: nn.Embedding(12, 7, padding_idx=3),
    "4 bits": lambda: QuantizedLinear.from_linear(nn.Linear(12, 7), blocksize=8),
}
each_layer = pytest.mark.parametrize("kind", list(LAYERS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def start(base, dropout=0.0):
    config = LoRAConfig(r=3, alpha=2.0, dropout=dropout)
    return LoRALinear(base, config.adapters({"layer": base})["layer"])


def train(layer, name="default"):
    """Give A and B values as after training: neither is zero."""
    for parameter in layer.adapters[name].parameters():
        nn.init.normal_(parameter)
    return layer


def inputs(layer, dtype=torch.float32):
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[1, 3, 5], [11, 0, 1]])
    return torch.randn(2, 3, 12, dtype=dtype)


@each_dtype
@each_layer
def test_a_new_adapter_changes_nothing(kind, dtype):
    base = LAYERS[kind]().to(dtype)
    x = inputs(base, dtype)
    layer = start(base)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.merged(), layer.W)
    assert torch.equal(layer.merge()(x), base(x))


ROUNDS = [(kind, dtype, 3) for kind in LAYERS for dtype in DTYPES]
ROUNDS.append(("linear", torch.bfloat16, 1000))  # no state is kept between two rounds


@pytest.mark.parametrize(("kind", "dtype", "rounds"), ROUNDS, ids=str)
def test_unmerging_gives_the_base_back_a_thousand_times(kind, dtype, rounds):
    base = LAYERS[kind]().to(dtype)
    x, before = inputs(base, dtype), copy.deepcopy(base.state_dict())
    layer = train(start(base)).eval()
    adapted = layer(x)
    for _ in range(rounds):
        layer.merge()
        merged = layer.weight
        layer.unmerge()
    assert not torch.equal(merged, base.weight)
    assert torch.equal(layer(x), adapted)
    plain = layer.unload()
    assert plain is base
    after = plain.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@each_dtype
@each_layer
def test_the_plain_layer_does_what_the_merged_one_did(kind, dtype):
    base = LAYERS[kind]().to(dtype)
    x, layer = inputs(base, dtype), train(start(base)).eval()
    weight, merged = layer.weight, layer.merge()(x)
    plain = layer.unload()
    assert torch.equal(plain(x), merged)
    assert torch.equal(plain.weight, weight)
    assert not isinstance(plain, LoRALinear)


@each_layer
def test_everything_lives_where_the_layer_lives(kind):
    base = LAYERS[kind]().to("meta")  # torch mixes meta tensors with no other device
    layer, x = start(base), inputs(base).to("meta")
    assert layer(x).is_meta
    assert layer.delta().is_meta
    assert layer.merge()(x).is_meta


def test_merging_twice_is_merging_once():
    layer = train(start(nn.Linear(12, 7)))
    once = layer.merge().weight.clone()
    assert torch.equal(layer.merge().weight, once)


@each_layer
def test_only_a_and_b_are_trained(kind):
    base = LAYERS[kind]()
    layer = train(start(base))
    layer(inputs(base)).sum().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == {"adapters.default.A", "adapters.default.B"}
    assert all(p.grad.any() for p in layer.adapters["default"].parameters())


def test_a_token_that_training_never_meets_keeps_its_embedding():
    base = nn.Embedding(12, 7)
    layer = start(base)
    optimizer = torch.optim.SGD(layer.adapters.parameters(), lr=1.0)
    layer(torch.tensor([2, 5])).sum().backward()
    optimizer.step()
    changed = (layer.weight != base.weight).any(dim=1)
    assert changed.nonzero()[:, 0].tolist() == [2, 5]


def test_padding_is_not_trained():
    layer = start(nn.Embedding(12, 7, padding_idx=3))
    layer(torch.tensor([2, 3])).sum().backward()
    met = layer.adapters["default"].A.grad.any(dim=0)
    assert met.nonzero()[:, 0].tolist() == [2]


# --- what is saved, loaded, copied ---------------------------------------------------


@each_layer
def test_a_merged_layer_saves_its_base_and_its_adapters(kind):
    layer = train(start(LAYERS[kind]()))
    before = copy.deepcopy(layer.state_dict())
    after = layer.merge().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@each_layer
def test_what_is_loaded_into_a_merged_layer_is_merged(kind):
    source, layer = (train(start(LAYERS[kind]())) for _ in range(2))
    layer.merge().load_state_dict(source.state_dict())
    assert torch.equal(layer.weight, source.weight)
    x = inputs(source.base)
    assert torch.equal(layer.unmerge()(x), source(x))


def test_a_copy_lives_by_itself():
    layer = train(start(nn.Linear(12, 7))).merge()
    x, twin = inputs(layer.base), copy.deepcopy(layer)
    expected = layer(x)
    train(layer)
    layer.merge()
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin.unmerge().weight, twin.merged())
    assert not torch.equal(layer(x), expected)


# --- dropout and modes ---------------------------------------------------------------


@each_layer
def test_dropout_is_for_training_and_for_the_adapter(kind):
    base = LAYERS[kind]()
    layer, x = train(start(base, dropout=0.5)), inputs(base)
    quiet = layer.eval()(x)
    assert torch.equal(quiet, layer(x))
    dropped = layer.train()(x)
    assert not torch.equal(dropped, quiet)
    layer.activate({})
    assert torch.equal(layer(x), base(x))


def test_dropping_an_embedding_is_dropping_the_token():
    layer = train(start(nn.Embedding(12, 7, _weight=torch.zeros(12, 7)), dropout=0.5))
    ids = torch.arange(12)
    update, dropped = layer.eval()(ids), layer.train()(ids)
    survives = dropped.any(dim=1)
    assert survives.any()
    assert not survives.all()
    assert torch.equal(dropped[survives], 2 * update[survives])


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_dropout_that_is_no_chance_is_refused(p):
    with pytest.raises(InputError, match=f"layer: dropout is {p}"):
        start(nn.Linear(12, 7), dropout=p)


# --- several adapters ----------------------------------------------------------------


@pytest.fixture
def two():
    layer = train(start(nn.Linear(12, 7)))
    layer.add("other", LoRA(torch.randn(2, 12), torch.randn(7, 2), scaling=0.5))
    return layer


def test_another_adapter_waits_to_be_activated(two):
    x = inputs(two.base)
    one = start(two.base)
    one.adapters["default"] = two.adapters["default"]
    assert torch.equal(two(x), one(x))


def test_a_weighted_sum_is_the_sum_of_the_updates(two):
    two.activate({"default": 0.5, "other": -2.0})
    parts = two.adapters
    update = 0.5 * delta(parts["default"]) - 2 * delta(parts["other"])
    assert torch.equal(two.delta(), update)
    assert torch.equal(two.merged(), two.base.weight + update)


def test_a_weighted_sum_computes_what_its_merged_weight_computes(two):
    for parameter in two.parameters():
        with torch.no_grad():
            parameter.uniform_(-8, 8).round_()  # small integers, so every sum is exact
    two.activate({"default": 0.5, "other": -2.0})
    two.adapters["default"].scaling = 4.0
    x = torch.randint(-8, 9, (5, 12)).float()
    assert torch.equal(two(x), two.merge()(x))


@pytest.mark.parametrize("share", [2.0, 0.5, -1.0])
def test_a_share_scales_the_update_of_a_single_adapter(two, share):
    for parameter in two.parameters():
        with torch.no_grad():
            parameter.uniform_(-8, 8).round_()  # small integers, so every sum is exact
    two.adapters["default"].scaling = 4.0
    x = torch.randint(-8, 9, (5, 12)).float()
    base, once = two.base(x), two(x)
    two.activate({"default": share})
    assert torch.equal(two(x), base + share * (once - base))


def test_switching_back_is_exact(two):
    x = inputs(two.base)
    first = two(x)
    two.activate({"other": 1.0})
    assert not torch.equal(two(x), first)
    two.activate({"default": 1.0})
    assert torch.equal(two(x), first)


def test_a_merged_layer_follows_the_switch(two):
    before = two.merge().weight
    two.activate({"other": 1.0})
    after = two.weight
    assert not torch.equal(after, before)
    assert torch.equal(after, two.unmerge().merged())


def test_removing_an_adapter_takes_it_out_of_the_sum(two):
    two.activate({"default": 1.0, "other": 1.0})
    two.remove("default")
    assert torch.equal(two.delta(), delta(two.adapters["other"]))
    assert list(two.active) == ["other"]


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys"])
def test_a_name_that_cannot_be_a_key_is_refused(two, name):
    with pytest.raises(InputError, match=r"other than default, other\."):
        two.add(name, LoRA(torch.zeros(1, 12), torch.zeros(7, 1), 1.0))


def test_an_unknown_name_is_refused_and_the_choices_are_named(two):
    with pytest.raises(InputError, match=r"no adapter 'x'; choose from default, other"):
        two.activate({"x": 1.0})
    with pytest.raises(InputError, match=r"no adapter 'x'; choose from default, other"):
        two.remove("x")


# --- who reads the weight, and what cannot be wrapped --------------------------------


def test_attention_that_reads_the_weight_meets_the_adapter():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    layer = attention.out_proj = train(start(attention.out_proj))
    x = torch.randn(2, 3, 16)
    y = attention(x, x, x)[0]
    y.sum().backward()
    assert all(p.grad.any() for p in layer.adapters["default"].parameters())
    layer.merge()
    assert torch.equal(attention(x, x, x)[0], y)


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 3, 1), "Conv2d has no weight matrix"),
        (nn.LayerNorm(3), "LayerNorm has no weight matrix"),
        (Scaled(5, 4), "Scaled is a Embedding with a forward of its own"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm 1.0"),
    ],
)
def test_a_layer_that_would_not_merge_faithfully_is_refused(layer, reason):
    with pytest.raises(InputError, match=reason):
        LoRALinear(layer, LoRA(torch.zeros(1, 5), torch.zeros(4, 1), 2.0))
    assert all(p.requires_grad for p in layer.parameters())
