"""Models from files: equal to what transformers reads, or refused by name."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.lab import models, reading
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear
from tests.lab import architectures

IDS = torch.arange(1, 13)[None]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def linears(model):
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and "gate" not in name.rpartition(".")[2].replace("gate_", "")
    ]


@pytest.mark.parametrize("name", architectures.CAUSAL)
def test_an_architecture_loads_takes_adapters_and_a_step(tmp_path, name):
    model = architectures.build(name)
    model.save_pretrained(tmp_path)
    loaded = reading.read(tmp_path, torch.float32, "cpu")
    assert type(loaded) is type(model)
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(loaded(IDS).logits, logits)
    targets, config = linears(loaded), LoRAConfig(r=2, alpha=4)
    inject(loaded, config, targets)
    loss = loaded(IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for p in trainable_parameters(loaded) if p.grad is not None]
    assert any(float(g.abs().sum()) for g in gradients)
    torch.optim.SGD(trainable_parameters(loaded), lr=0.1).step()
    with torch.no_grad():
        assert not torch.equal(loaded(IDS).logits, logits)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM"])
@pytest.mark.parametrize("quantize", reading.QUANTIZERS)
def test_layers_are_quantized_as_they_are_read(tmp_path, name, quantize):
    model = architectures.build(name)
    model.save_pretrained(tmp_path)
    quantizer = reading.QUANTIZERS[quantize]
    loaded = reading.read(tmp_path, torch.bfloat16, "cpu", quantizer)
    expected = reading.quantized(model, quantizer)
    own, other = loaded.state_dict(), expected.state_dict()
    assert own.keys() == other.keys()
    assert any(isinstance(m, QuantizedLinear) for m in loaded.modules())
    assert type(loaded.get_output_embeddings()) is nn.Linear
    for key, tensor in own.items():
        if "packed" in key or "absmax" in key:
            assert tensor.dtype == other[key].dtype, key
    assert loaded(IDS).logits.dtype == torch.bfloat16


def saved(tmp_path, change):
    architectures.build("LlamaForCausalLM").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path


UP = "model.layers.1.mlp.up_proj.weight"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.pop(UP),
            "up_proj.weight is not in the files, and would be random",
        ),
        (
            lambda t: t.update({UP: t[UP][:4].clone()}),
            r"up_proj.weight has shape \(4, 32",
        ),
        (
            lambda t: t.update({"other.weight": torch.zeros(2)}),
            "other.weight is in the",
        ),
        (
            lambda t: t[UP].fill_(float("nan")),
            "up_proj.weight holds values that are not",
        ),
        (lambda t: t[UP][0, 0].fill_(float("inf")), "holds values that are not finite"),
        (
            lambda t: t.update({"norm.weight": torch.zeros(32)}),
            r"norm\.weight twice, as model\.norm\.weight and as norm\.weight; leave",
        ),
        (lambda t: t.update({UP: t[UP].char()}), "has dtype torch.int8 in the files"),
        (
            lambda t: t.update({NORM: t[NORM].double() * 1e300}),
            "norm.weight holds values beyond the range of torch.float32; choose",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, sentence):
    folder = saved(tmp_path, change)
    with pytest.raises(InputError, match=sentence) as caught:
        models.load(str(folder))
    assert "\n" not in str(caught.value)


def test_an_encoder_has_no_head(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert type(reading.read(tmp_path, torch.float32, "cpu")).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"dtype": "float8"}, "there is no dtype 'float8'; choose float32, bfloat16"),
        (
            {"quantize": "int4"},
            "there is no quantization 'int4'; choose nf4",
        ),
    ],
)
def test_unknown_words_are_refused(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        models.load("tiny", **fields)


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tmp_path):
    loaded = models.load("tiny")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["pad_token"]
    path.write_text(json.dumps(fields))
    tokenizer = models.load(str(tmp_path)).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    del fields["eos_token"]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="neither a pad nor an end token"):
        models.load(str(tmp_path))


PEAK = """
import resource, sys, torch
from pathlib import Path
from minipeft.lab import reading
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reading.read(Path(sys.argv[2]), torch.bfloat16, "cpu", reading.nf4_double)
before = peak()
model = reading.read(Path(sys.argv[1]), torch.bfloat16, "cpu", reading.nf4_double)
size = sum(t.nbytes for t in model.state_dict().values())
largest = max(m.in_features * m.out_features for m in model.modules()
              if hasattr(m, "packed"))
print((peak() - before) * 1024, size, largest)
"""


def test_the_peak_is_the_quantized_model_and_one_layer(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    architectures.build("LlamaForCausalLM").save_pretrained(tmp_path / "small")
    model = architectures.build("LlamaForCausalLM", **shape).bfloat16()
    model.save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large")]
    done = subprocess.run(
        [*command, str(tmp_path / "small")], capture_output=True, text=True, check=True
    )
    grown, size, largest = map(int, done.stdout.split())
    # Each stored form of a layer takes 16 bytes: as read, in float32, scaled, as codes.
    assert grown < 1.3 * size + 16 * largest
    whole = sum(p.numel() for p in model.parameters()) * 2
    assert grown < whole, "the 16-bit model was never whole in memory"


def changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_dtype_that_is_too_narrow_is_named(tmp_path):
    folder = saved(tmp_path, lambda t: t[NORM].mul_(1e6))
    with pytest.raises(InputError, match=r"norm.weight .* the range of torch\.float16"):
        reading.read(folder, torch.float16, "cpu")
    assert reading.read(folder, torch.bfloat16, "cpu").dtype == torch.bfloat16


def test_a_weight_in_8_bits_is_a_weight(tmp_path):
    narrow = {}

    def store(tensors):
        tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
        narrow[UP] = tensors[UP].float()

    found = reading.read(saved(tmp_path, store), torch.float32, "cpu")
    assert torch.equal(found.get_parameter(UP), narrow[UP])


def test_tied_weights_that_differ_in_the_files_are_refused(tmp_path):
    """Another program unties such a pair: to keep one of the two would be a guess."""
    architectures.build("LlamaForCausalLM").save_pretrained(tmp_path)
    changed(tmp_path, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tok"):
        reading.read(tmp_path, torch.float32, "cpu")
    folder = saved(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBED].clone()}))
    changed(folder, tie_word_embeddings=True)
    model = reading.read(folder, torch.float32, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


ODD_FIELDS = {
    "num_attention_heads": (0, 3, "x", None),
    "num_key_value_heads": (0,),
    "hidden_size": (-1, 2**60),
    "vocab_size": (-5,),
    "hidden_act": ("nothing",),
    "rope_parameters": (5, {"rope_type": "nothing"}),
    "architectures": (5,),
    "model_type": ("nothing", 5),
    "dtype": ("nothing",),
    "pad_token_id": (10**9,),
    "quantization_config": (5,),
}
ODD_TEXTS = ("", "3", "null", "[]", "[" * 100_000, '{"model_type": "lla', "\0")


@pytest.mark.filterwarnings("ignore")  # transformers warns before it fails
def test_a_config_that_makes_no_model_is_one_sentence(tmp_path):
    architectures.build("LlamaForCausalLM").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    texts = [
        json.dumps({**good, key: value})
        for key, values in ODD_FIELDS.items()
        for value in values
    ]
    for text in (*texts, *ODD_TEXTS):
        path.write_text(text)
        with pytest.raises(InputError, match="transformers makes no model of") as said:
            reading.read(tmp_path, torch.float32, "cpu")
        assert "\n" not in str(said.value)


def test_a_pickle_that_is_no_weights_is_refused_without_its_own_remedy(tmp_path):
    architectures.build("LlamaForCausalLM").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="a pickle is damaged, or holds more than ten"):
        reading.read(tmp_path, torch.float32, "cpu")


def test_an_adapter_beside_a_model_or_alone_is_named(tmp_path):
    architectures.build("LlamaForCausalLM").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter .*which would be left out"):
        models.load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="holds an adapter and no model; load its"):
        models.load(str(tmp_path))


def test_two_models_in_one_folder_are_refused(tmp_path):
    model = architectures.build("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert torch.equal(
        reading.read(tmp_path, torch.float32, "cpu")(IDS).logits, model(IDS).logits
    )
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"holds two models, model\.safetensors and"):
        reading.read(tmp_path, torch.float32, "cpu")
