"""llama.cpp computes with our files what we compute."""

import json
import math
import os
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import gguf_format
from minipeft.interop.adapter import Adapter
from minipeft.interop.audit import EXACT, audit
from minipeft.interop.gguf_format import GgufTensors
from minipeft.interop.gguf_names import turn, turn_back
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import Update, merged
from minipeft.lab import models, reading_gguf
from tests.first_order import EXP, LOG, Recorded
from tests.interop.folders import InMemory
from tests.tolerance import gamma

CONFIG = json.loads((models.TINY / "config.json").read_text())
PROMPT = "It is a truth universally acknowledged, that"
# Rounding errors that are independent and of mean zero add up to more than this many
# times the root of the sum of their squared bounds with probability below 2^-40, for
# any of 50 tokens (Hoeffding).
DEVIATIONS = math.sqrt(2 * math.log(2 * 50 * 2**40))


@pytest.fixture(scope="module")
def base():
    return open_tensors(models.TINY)


@pytest.fixture(scope="module")
def adapter(base):
    """Return rank-stabilized LoRA with ranks and alphas that differ between layers."""
    draw = torch.Generator().manual_seed(0)
    updates = {}
    for name, about in base.about.items():
        if "proj" in name:
            r = 4 if "mlp" in name else 2
            A = torch.randn(r, about.shape[1], generator=draw) * 0.1
            B = torch.randn(about.shape[0], r, generator=draw) * 0.1
            updates[name] = Update(A, B, 8.0 if "q_proj" in name else 3.0, True)
    return Adapter(updates)


def log_probabilities(model, lora=None):
    """Return llama.cpp's log-probabilities of the token after the prompt, by id."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 64, False, 1
    params.verbosity = -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # Scores, softmax and sums one after another, as `explained` counts them.
    off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = off
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    question = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "n_probs": 50}
    answer = xllamacpp.Server(params).handle_completions(question)
    first = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in first}


def filled(tensors, adapter=None):
    """Return the tiny model with the weights of a file, merged with an adapter."""
    loaded = models.load("tiny")
    state = loaded.model.state_dict()
    with torch.no_grad():
        for name in tensors.about:
            W = tensors.read(name).float()
            update = adapter.updates.get(name) if adapter else None
            state[name].copy_(merged(W, update) if update else W)
    return loaded.model, loaded.tokenizer(PROMPT, return_tensors="pt").input_ids


@torch.no_grad()
def ours(tensors, adapter=None):
    """Return our log-probabilities of the same token, with the weights of a file."""
    model, ids = filled(tensors, adapter)
    return model(ids).logits[0, -1].log_softmax(-1)


def slack(x, kind):
    """Bound llama.cpp's rounding of a layer's input, to the dtype of the weights."""
    if kind == "Q8_0":  # half a code of the largest value, and the scale in float16
        blocks = x.abs().reshape(*x.shape[:-1], -1, 32)
        half = blocks.amax(-1, keepdim=True) / 254 * (1 + 2**-10)
        return half.expand_as(blocks).reshape(x.shape) + x.abs() * 2**-11
    return x.abs() * {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}[kind]


def explained(tensors, kind, tokens, adapter=None):
    """Bound the difference of log-probabilities that roundings explain.

    All roundings of float32 are counted at their worst, on both sides: llama.cpp has
    the operations of transformers, and sums in another order. The inputs of linear
    layers are also rounded to the dtype of the file. Slopes carry both errors to the
    result, to first order.
    """
    model, ids = filled(tensors, adapter)
    model.set_attn_implementation("eager")
    model.get_input_embeddings().weight.requires_grad_(True)
    record, inputs = Recorded(), []
    model.model.rotary_emb.register_forward_hook(
        lambda m, x, y: turned_by(m, torch.arange(ids.shape[1]), y, record)
    )
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
            if adapter and (update := adapter.updates.get(f"{name}.weight")):
                W = tensors.read(f"{name}.weight").float()
                module.register_forward_hook(apart(W, update, record))
    with record:
        found = model(ids).logits[0, -1].log_softmax(-1)
    errors, largest = [slack(x, kind) for x in inputs], 0.0
    for token in tokens:
        slopes = torch.autograd.grad(found[token], inputs, retain_graph=True)
        pairs = zip(slopes, errors, strict=True)
        total = sum(float((g * e.detach()).double().square().sum()) for g, e in pairs)
        together, squares = record.carried(found[token])
        single = DEVIATIONS * math.sqrt(total + 2 * squares)
        largest = max(largest, single + 2 * together)
    return largest


def turned_by(rotary, positions, found, record):
    """Count the roundings of cosines and sines, which have no gradients of their own.

    transformers computes an angle as p / base^(2k/d), llama.cpp as p times a power of
    base, multiplied k times. The rounded exponent is worth log(base) roundings of
    either power. A power is as accurate as exp.
    """
    k = torch.arange(len(rotary.inv_freq)).repeat(2)
    base = CONFIG["rope_parameters"]["rope_theta"]
    count = math.ceil(math.log(base)) + EXP + 2 + k * (EXP + 1)
    angles = positions[..., None] * rotary.inv_freq.repeat(2)
    off = torch.tensor([gamma(int(n)) for n in count]) * angles
    cos, sin = (value.abs() for value in found)
    kept = [value.clone().requires_grad_() for value in found]
    record.note(kept[0], gamma(LOG) * cos + off * sin, together=True)
    record.note(kept[1], gamma(LOG) * sin + off * cos, together=True)
    return tuple(kept)


def apart(W, update, record):
    """Count that one side adds s B (A x) to W x, where the other adds s B A to W.

    Each term has a rounding for the scaled B, one for each of r products and one for
    each of n, and two sums.
    """
    size = W.abs() + abs(update.scaling) * update.B.abs() @ update.A.abs()
    n, r = W.shape[1], update.r

    def hook(module, x, y):
        record.note(y, gamma(1 + r + n + 2) * (x[0].detach().abs() @ size.T))

    return hook


def differs(theirs, ours):
    return max(abs(value - float(ours[token])) for token, value in theirs.items())


def test_llama_cpp_and_we_compute_the_same_base(tmp_path, base):
    path = tmp_path / "base.gguf"
    gguf_format.write_model(path, base, models.TINY, kind="F32")
    theirs = log_probabilities(path)
    assert differs(theirs, ours(base)) < explained(base, "F32", theirs)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_llama_cpp_computes_our_merge(tmp_path, base, adapter, kind):
    path = tmp_path / "merged.gguf"
    gguf_format.write_model(path, base, models.TINY, adapter, kind)
    theirs = log_probabilities(path)
    # Our weights are those read back from the file.
    found = GgufTensors(path)
    bound = explained(found, kind, theirs)
    assert differs(theirs, ours(found)) < bound
    assert differs(theirs, ours(base)) > bound  # the control: not merged


def test_llama_cpp_applies_our_lora(tmp_path, base, adapter):
    path, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    gguf_format.write_model(path, base, models.TINY, kind="F32")
    gguf_format.write_lora(lora, adapter, CONFIG)
    theirs = log_probabilities(path, lora)
    bound = explained(base, "F32", theirs, adapter)
    assert differs(theirs, ours(base, adapter)) < bound
    # The control: with the scale of plain LoRA the results differ.
    plain = {n: replace(u, rank_stabilized=False) for n, u in adapter.updates.items()}
    assert differs(theirs, ours(base, Adapter(plain))) > bound


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_model_reads_back_as_it_was_rounded(tmp_path, base, adapter, kind):
    path = tmp_path / "model.gguf"
    gguf_format.write_model(path, base, models.TINY, adapter, kind)
    found = GgufTensors(path)
    assert found.about.keys() == base.about.keys()
    for name in base.about:
        W = base.read(name)
        if name in adapter.updates:
            W = merged(W, adapter.updates[name])
        rounded = W.numpy()
        if W.ndim > 1:
            type_ = gguf_format.TYPES[kind]
            assert found.kind(name) == type_
            turned = gguf.dequantize(gguf.quantize(rounded, type_), type_)
            rounded = np.asarray(turned, np.float32)
        assert np.array_equal(found.read(name).numpy(), rounded), name
    if kind == "F32":
        findings = list(audit(base, adapter, found))
        assert {f.verdict for f in findings} == {EXACT}


def test_turning_the_rows_of_heads_is_undone():
    rows = torch.randn(24, 5)
    assert torch.equal(torch.from_numpy(turn_back(turn(rows, 3).numpy(), 3)), rows)
    assert not torch.equal(turn(rows, 3), rows)


def test_an_adapter_holds_every_scale_in_B(tmp_path, adapter):
    path = tmp_path / "lora.gguf"
    gguf_format.write_lora(path, adapter, CONFIG)
    reader = gguf.GGUFReader(path)
    assert reader.fields["adapter.lora.alpha"].contents() == 0
    assert reader.fields["general.type"].contents() == "adapter"
    tensors = {t.name: np.asarray(t.data) for t in reader.tensors}
    update = adapter.updates["model.layers.1.mlp.up_proj.weight"]
    B = tensors["blk.1.ffn_up.weight.lora_b"]
    assert np.array_equal(B, (update.scaling * update.B).numpy())
    assert np.array_equal(tensors["blk.1.ffn_up.weight.lora_a"], update.A.numpy())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"biases": {"model.norm.bias": torch.ones(2)}},
            "a bias .*merged",
        ),
        ({"saved": {"lm_head.weight": torch.ones(2, 2)}}, "a saved module .*merged"),
    ],
)
def test_what_an_adapter_file_cannot_hold_is_refused(
    tmp_path, adapter, change, sentence
):
    path = tmp_path / "lora.gguf"
    with pytest.raises(InputError, match=sentence):
        gguf_format.write_lora(path, replace(adapter, **change), CONFIG)
    assert not list(tmp_path.iterdir())


def test_dora_is_refused_with_the_alternative(tmp_path, adapter):
    name, update = next(iter(adapter.updates.items()))
    dora = replace(update, magnitude=torch.ones(len(update.B)))
    with pytest.raises(InputError, match=r"magnitude .DoRA.*merged model"):
        gguf_format.write_lora(tmp_path / "a", Adapter({name: dora}), CONFIG)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "MixtralForCausalLM, which cannot be",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "rotary embeddings of type 'yarn'",
        ),
    ],
)
def test_another_architecture_is_refused(tmp_path, base, change, sentence):
    folder = shutil.copytree(models.TINY, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(InputError, match=sentence):
        gguf_format.write_model(tmp_path / "x.gguf", base, folder)
    assert not list(tmp_path.glob("*.gguf"))


def test_an_unknown_split_of_texts_is_refused(tmp_path, base):
    folder = shutil.copytree(models.TINY, tmp_path / "model")
    tokenizer = json.loads((models.TINY / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"splits a text in a way .Whitespace. for"):
        gguf_format.write_model(tmp_path / "x.gguf", base, folder)


def test_llama_3_factors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    fields = {"num_attention_heads": 32, "hidden_size": 4096}
    config = LlamaConfig(rope_parameters=parameters, **fields)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = gguf_format.rope_factors({**fields, "rope_parameters": parameters})
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    # They compute in float32. A power counts as 4 roundings: 5 for the inverse, 2 more
    # for the wavelength, 8 for the quotient q of the length and it. q is at most 4, so
    # q - 1 has 4 * 8 + 3 units of 1, and (q - 1) / 3 about 13. The frequency lies
    # between an eighth and all of the inverse, so it has 7 * 13 + 5 + 4 of its own.
    assert np.max(np.abs(plain / factors / theirs.numpy() - 1)) < gamma(100)
    assert gguf_format.rope_factors(CONFIG) is None


@pytest.mark.parametrize(("kind", "value"), [("F16", 1e5), ("Q8_0", 1e7)])
def test_a_value_that_would_become_infinite_is_refused(tmp_path, base, kind, value):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {n: base.read(n).float() for n in base.about}
    tensors[name][0, 0] = value
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"up_proj.* beyond float16; choose a wider"):
        gguf_format.write_model(path, InMemory(tensors), models.TINY, kind=kind)
    assert not list(tmp_path.iterdir())
    gguf_format.write_model(path, InMemory(tensors), models.TINY, kind="BF16")


@pytest.mark.parametrize("keep", [0, 3, 40, 3000])
def test_a_damaged_file_is_one_sentence(tmp_path, base, keep):
    path = tmp_path / "model.gguf"
    gguf_format.write_model(path, base, models.TINY, kind="F16")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is damaged or no GGUF file") as caught:
        GgufTensors(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no file"):
        GgufTensors(tmp_path / "none.gguf")


def test_more_layers_than_llama_cpp_loads_are_refused(tmp_path, base):
    path = tmp_path / "model.gguf"
    gguf_format.write_model(path, base, models.TINY, kind="F16")
    key, stored = b"llama.block_count", path.read_bytes()
    at = stored.index(key) + len(key) + 4  # the number follows its kind in 4 bytes
    layers = int.from_bytes(stored[at : at + 4], "little")
    assert layers == CONFIG["num_hidden_layers"]
    path.write_bytes(stored[:at] + (8193).to_bytes(4, "little") + stored[at + 4 :])
    with pytest.raises(InputError, match=r"'8193' for llama\.block_count, .* 512"):
        GgufTensors(path)


@pytest.mark.parametrize("name", ["blk.9.attn_q.weight", "rope_freqs.weight"])
def test_a_tensor_that_a_loaded_model_has_no_place_for_is_refused(tmp_path, name):
    path = tmp_path / "model.gguf"
    with gguf_format._writing(path, "llama") as writer:
        gguf_format._hyperparameters(writer, CONFIG)
        writer.add_tensor(name, np.ones((4, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    with pytest.raises(InputError, match=r"holds blk\.9|scales its rotary frequencies"):
        reading_gguf.read(path, torch.float32, "cpu")


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path, base, adapter, monkeypatch
):
    done = []
    for call in ("fsync", "replace"):
        original = getattr(os, call)

        def noted(first, *more, call=call, original=original):
            size = os.fstat(first).st_size if call == "fsync" else 0
            done.append((call, size))
            return original(first, *more)

        monkeypatch.setattr(os, call, noted)
    path = tmp_path / "lora.gguf"
    gguf_format.write_lora(path, adapter, CONFIG)
    assert done == [("fsync", path.stat().st_size), ("replace", 0)]
