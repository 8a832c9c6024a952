"""The layers that targets name: full names, last parts, patterns, "all-linear"."""

import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from minipeft.errors import InputError
from minipeft.torch.inject import adapted, inject
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear, quantize_linears, unquantized
from minipeft.torch.targets import all_linear, chosen, tied

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
EXPERTS = {
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(llama()), ATTENTION | GATED),
    "llama with a classifier": (
        lambda: AutoModelForSequenceClassification.from_config(llama()),
        ATTENTION | GATED,
    ),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(**SIZES)),
        {"query", "key", "value", "dense"},
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)),
        ATTENTION,
    ),
    "qwen with experts": (
        lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS)),
        ATTENTION | GATED,
    ),
}


def llama():
    return LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_linear_layer_is_meant_but_no_head_and_no_router(kind):
    make, parts = MODELS[kind]
    model = make()
    found = all_linear(model)
    assert {name.rpartition(".")[2] for name in found} == parts
    inside = [name.split(".") for name in found]
    assert not any({"lm_head", "score", "cls", "gate"} & set(name) for name in inside)
    inject(model, LoRAConfig(2, 4.0), "all-linear")
    assert set(adapted(model)) == set(found)


@pytest.mark.parametrize("kind", ["mixtral", "qwen with experts"])
def test_experts_in_four_bits_are_no_linear_layers_either(kind):
    make, parts = MODELS[kind]
    found = all_linear(quantize_linears(make(), blocksize=8))
    assert {name.rpartition(".")[2] for name in found} == parts


def said(caplog, model, targets):
    caplog.clear()
    inject(model, LoRAConfig(2, 4.0), targets)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("kind", ["mixtral", "qwen with experts"])
def test_experts_that_stay_as_they_are_are_counted_with_the_remedy(kind, bits, caplog):
    make, _ = MODELS[kind]

    def model():
        return quantize_linears(make(), blocksize=8) if bits == 4 else make()

    weights = sum(p.numel() for n, p in make().named_parameters() if ".experts." in n)
    (sentence,) = said(caplog, model(), "all-linear")
    assert f"leaves experts as they are, {weights} weights (modules: 1, " in sentence
    assert sentence.endswith("the targets ['all-linear', 'experts']")
    whole = model()
    assert said(caplog, whole, ["all-linear", "experts"]) == []  # the remedy
    assert any(name.endswith("experts") for name in adapted(whole))
    assert said(caplog, model(), ["q_proj"]) == []
    later = model()
    assert said(caplog, later, ["experts"]) == []
    assert said(caplog, later, "all-linear") == []  # they are adapted already
    assert said(caplog, MODELS["llama"][0](), "all-linear") == []


def test_a_layer_that_is_tied_to_an_embedding_is_a_head():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "up": nn.Linear(4, 4)})
    model["out"] = nn.Linear(4, 8, bias=False)
    model["out"].weight = model["embed"].weight
    assert list(all_linear(model)) == ["up"]
    assert tied(model) == {"embed": ["out"], "out": ["embed"]}


def test_all_linear_on_adapted_layers_says_what_to_do():
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(2, 4.0), ["0"])
    with pytest.raises(InputError, match=r"0: already adapted.*use add\(\)"):
        inject(model, LoRAConfig(2, 4.0), "all-linear")


def test_names_are_chosen_in_their_order_and_misses_are_named():
    names = ["a.up", "a.down", "b.up"]
    assert chosen(names, ["b.*", "down"]) == ["a.down", "b.up"]
    with pytest.raises(InputError, match="'upp' matches nothing; choose from down, up"):
        chosen(names, ["upp"])


# --- quantization walks the same way --------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.a = self.b = nn.Linear(64, 64)
        self.c = nn.Sequential(self.a)
        self.out = nn.Linear(64, 16, bias=False)
        self.out.weight = self.embed.weight


def test_a_layer_that_serves_twice_is_quantized_once_and_a_tied_one_stays():
    model = quantize_linears(Shared())
    assert type(model.a) is QuantizedLinear
    assert model.a is model.b is model.c[0]
    assert type(model.out) is nn.Linear
    assert unquantized(model) == {"embed.weight": 16 * 64 * 4}


@pytest.mark.parametrize(
    ("skip", "sentence"),
    [
        ("lm_head", r"skip is the string 'lm_head'; give a list: \['lm_head'\]"),
        (["lm_haed"], "skip: the target 'lm_haed' matches nothing; choose from down"),
    ],
)
def test_a_skip_that_skips_nothing_is_refused(skip, sentence):
    model = LlamaForCausalLM(llama())
    with pytest.raises(InputError, match=sentence):
        quantize_linears(model, skip)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_what_stays_is_said_with_its_bytes(caplog):
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS))
    with caplog.at_level(logging.INFO):
        quantize_linears(model, blocksize=8)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING  # most of the model stays unchanged
    left = unquantized(model)
    assert {name.rpartition("layers.0.")[2] for name in left} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "mlp.gate.weight",
    }
    assert f"{sum(left.values())} bytes" in record.message
    assert f"model.embed_tokens.weight ({32 * 16 * 4} bytes)" in record.message


def test_a_weight_that_is_not_finite_is_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="1: the weight is not finite"):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear


class TiedElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mixing = self.a.weight


def test_a_weight_that_another_module_holds_by_another_name_is_tied_too():
    with pytest.raises(InputError, match=r"^a shares its weight with mixing, and"):
        inject(TiedElsewhere(), LoRAConfig(2, 4.0), ["a"])
    model = quantize_linears(TiedElsewhere())
    assert model.a.weight is model.mixing
    assert type(model.b) is QuantizedLinear


def test_a_bias_that_is_not_finite_is_not_called_the_weight():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].bias.data[0] = torch.nan
    with pytest.raises(InputError, match="0: the bias is not finite"):
        quantize_linears(model)


def test_a_layer_without_a_weight_yet_is_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(InputError, match="1 has no weight yet: call the model once"):
        quantize_linears(model)
    assert type(model[0]) is nn.Linear


def test_a_model_with_nothing_to_quantize_hears_why():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(InputError, match=r"every layer is skipped.*\(0\)"):
        quantize_linears(model, skip=["0"])
    quantize_linears(model)
    for skip in ([], ["0"], ["*"]):
        with pytest.raises(InputError, match=r"^the model is quantized already \(0\)"):
            quantize_linears(model, skip)


def test_what_an_earlier_call_has_skipped_is_quantized_by_a_later_one():
    model = LlamaForCausalLM(llama())
    quantize_linears(model, ["mlp.*", "lm_head"], blocksize=8)
    with pytest.raises(InputError, match=r"'upp' matches nothing; choose from down"):
        quantize_linears(model, ["upp"], blocksize=8)
    quantize_linears(model, ["q_proj"], blocksize=8)
    again = ["lm_head"]  # a layer that could still be skipped
    with pytest.raises(InputError, match=r"^the model is quantized already"):
        quantize_linears(model, again, blocksize=8)


@pytest.mark.parametrize("depth", [1, 2])
def test_heads_are_known_where_a_model_of_transformers_is_a_part(depth):
    model = AutoModelForSequenceClassification.from_config(llama())
    expected = set(all_linear(model))
    around = model
    for _ in range(depth):
        around = nn.ModuleDict({"part": around, "own": nn.Linear(4, 4)})
    found = {n for n in all_linear(around) if not n.endswith("own")}
    assert found == {"part." * depth + name for name in expected}


def test_an_adapted_model_is_not_quantized():
    model = inject(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(2, 4.0), ["0"])
    with pytest.raises(InputError, match="0 has adapters; quantize first, then inject"):
        quantize_linears(model)
