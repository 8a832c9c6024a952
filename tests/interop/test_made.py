"""The program that made a file, and the base that the file belongs to."""

import json
import shutil

import gguf
import pytest
import torch
import transformers

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import (
    combine,
    fingerprint,
    made,
    peft_folder,
    peft_format,
    peft_model,
)
from minipeft.interop.made import Made
from minipeft.interop.merging import check_base
from minipeft.interop.opening import open_model
from minipeft.interop.tensors import open_tensors
from minipeft.lab import models
from minipeft.torch import inject
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.lora import LoRAConfig
from tests.agreement.llama import llama
from tests.interop import peers
from tests.interop.folders import adapter_of_tiny, write_adapter

TARGETS = ["q_proj", "down_proj"]
LORA = LoRAConfig(r=3, alpha=7)


def adapted(config=LORA):
    model = inject.inject(llama(), config, TARGETS)
    for parameter in inject.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_file_says_what_made_it(tmp_path):
    given = Made(data="0badcafe", seed=7)
    peft_model.save(adapted(), tmp_path / "adapter", made=given)
    found = peft_folder.read(tmp_path / "adapter").metadata
    assert found["format"] == "pt"
    assert found[made.METHOD] == "LORA"
    assert found[made.DATA] == "0badcafe"
    assert found[made.SEED] == "7"
    constants = json.loads(found[made.CONSTANTS])
    assert set(constants.values()) == {7 / 3}
    assert json.loads(found[made.VERSIONS]).keys() == {
        "minipeft",
        "torch",
        "safetensors",
    }


def test_the_base_in_a_file_is_the_base_in_its_own_files(tmp_path):
    peft_model.save(adapted(), tmp_path / "adapter")
    with peers.quiet():
        llama().save_pretrained(tmp_path / "base")
    own = fingerprint.of_files(open_tensors(tmp_path / "base"))
    adapter = peft_format.read(tmp_path / "adapter")
    assert "is the one" in check_base(adapter, own)


def test_another_base_is_refused_by_its_first_tensor(tmp_path):
    peft_model.save(adapted(), tmp_path / "adapter")
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-7
    said = []
    with pytest.raises(
        InputError, match=r"layers\.1\.mlp\.up_proj\.weight differs"
    ) as e:
        peft_model.load(other, tmp_path / "adapter", say=said.append)
    assert str(e.value).endswith("or pass allow_base_mismatch=True if you mean it")
    assert "--" not in str(e.value)
    assert not inject.adapted(other)
    assert said == []
    peft_model.load(
        other, tmp_path / "adapter", allow_base_mismatch=True, say=said.append
    )
    assert inject.adapted(other)
    assert said == [made.NOT_COMPARED]


def test_a_missing_and_a_new_tensor_are_named(tmp_path):
    small, large = llama(), llama()
    large.extra = torch.nn.Linear(2, 2)
    for one, other, words in ((small, large, "is new"), (large, small, "is missing")):
        model = inject.inject(one, LORA, TARGETS)
        folder = tmp_path / words
        peft_model.save(model, folder)
        with pytest.raises(InputError, match=f"extra.bias {words}"):
            peft_model.load(inject.unload(other), folder, say=lambda line: None)
        inject.unload(one)


def sized(width, depth):
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        intermediate_size=12,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("known", [True, False], ids=["named", "not named"])
def test_a_deeper_or_wider_base_is_told_what_differs(tmp_path, known):
    peft_model.save(inject.inject(sized(8, 2), LORA, TARGETS), tmp_path / "full")
    found = peft_folder.read(tmp_path / "full")
    metadata = found.metadata if known else {}
    contents = peft_folder.Contents(found.config, found.tensors, metadata)
    peft_folder.write(tmp_path / "one", contents)
    wide = r"layers\.0\.mlp\.down_proj: B has shape \(8, 3\); .* must be \(16, 3\)"
    deep = r"the settings name model\.layers\.2\..*; give the model that it was trained"
    if known:
        wide = rf"another base: .* differs here .*, and model\.{wide}; load the base"
        deep = r"another base: model\.layers\.2\..* is new here; load the base it was"
    for model, sentence in ((sized(16, 2), wide), (sized(8, 3), deep)):
        with pytest.raises(InputError, match=sentence):
            peft_model.load(model, tmp_path / "one", say=lambda line: None)
        assert not inject.adapted(model)


def test_a_file_without_a_fingerprint_is_accepted_with_a_line(tmp_path):
    peft_model.save(adapted(), tmp_path / "adapter")
    contents = peft_folder.read(tmp_path / "adapter")
    foreign = peft_folder.Contents(contents.config, contents.tensors)
    peft_folder.write(tmp_path / "foreign", foreign)
    said = []
    peft_model.load(llama(), tmp_path / "foreign", say=said.append)
    assert said == [made.UNKNOWN]


def test_modules_that_were_trained_are_no_part_of_the_base(tmp_path):
    model = adapted()
    model.lm_head.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight += 1
    peft_model.save(model, tmp_path / "adapter")
    said = []
    found = peft_model.load(llama(), tmp_path / "adapter", say=said.append)
    assert torch.equal(found.lm_head.weight, model.lm_head.weight)
    assert "is the one" in said[0]
    with peers.quiet():
        llama().save_pretrained(tmp_path / "base")
    own = fingerprint.of_files(open_tensors(tmp_path / "base"))
    assert "is the one" in check_base(peft_format.read(tmp_path / "adapter"), own)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (LoRAConfig(r=3, alpha=8), "q_proj.scaling is 2.33"),
        (LoRAConfig(r=3, alpha=7, rank_stabilized=True), "not 4.04"),
    ],
)
def test_constants_beside_a_state_dict_are_compared(other, words):
    saved, model = adapted(), adapted(other)
    tensors = inject.adapter_state_dict(saved)
    before = inject.adapter_state_dict(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    with pytest.raises(InputError, match=words):
        inject.load_adapter_state_dict(model, tensors, saved=inject.constants(saved))
    after = inject.adapter_state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    inject.load_adapter_state_dict(model, tensors)  # not given, so not compared


def test_the_side_of_ia3_is_a_constant():
    saved = adapted(IA3Config())
    model = adapted(IA3Config(feedforward=["down_proj"]))
    found = inject.constants(model)
    assert set(found.values()) == {"input", "output"}
    saved_too = inject.constants(saved)
    tensors = inject.adapter_state_dict(model)
    with pytest.raises(InputError, match=r"down_proj\.side is output, not input"):
        inject.load_adapter_state_dict(model, tensors, saved=saved_too)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.fill_(float("nan")), "is not finite"),
        (lambda t: t.fill_(float("inf")), "is not finite"),
        (lambda t: t.to(torch.int64), "has dtype torch.int64"),
    ],
)
def test_a_state_dict_with_odd_values_is_refused(spoil, words):
    model = adapted()
    tensors = {k: t.clone() for k, t in inject.adapter_state_dict(model).items()}
    last = [*tensors][-1]
    before = {k: t.clone() for k, t in tensors.items()}
    tensors[last] = spoil(tensors[last])
    with pytest.raises(InputError, match=f"{last} {words}"):
        inject.load_adapter_state_dict(model, tensors)
    after = inject.adapter_state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def facts_of(folder, *arguments):
    """Run a command that writes `out`; return the metadata of what it wrote."""
    out = folder / "out"
    given = ["--base", models.TINY, "--adapter", folder / "adapter", "--out", out]
    assert cli.main([*map(str, (*arguments, *given))]) == 0
    file = out / "model.gguf" if out.is_dir() and "ollama" in arguments else out
    if (out / "adapter_config.json").exists():
        return peft_folder.read(out).metadata
    if out.is_file():
        return opened_gguf(out)
    return open_model(file).metadata


def opened_gguf(path):
    fields = gguf.GGUFReader(path).fields
    return {key: str(f.contents()) for key, f in fields.items() if "minipeft" in key}


COMMANDS = {
    "merge": ["merge"],
    "merge, rounded": ["merge", "--dtype", "bfloat16"],
    "safetensors": ["export", "--to", "safetensors"],
    "peft": ["export", "--to", "peft"],
    "gguf": ["export", "--to", "gguf"],
    "gguf, merged": ["export", "--to", "gguf", "--merged"],
    "ollama": ["export", "--to", "ollama"],
    "bitsandbytes": ["export", "--to", "bitsandbytes"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_says_what_made_it(command, tmp_path):
    own = fingerprint.of_files(open_tensors(models.TINY)).to_json()
    said = {made.METHOD: "LORA", made.DATA: "0badcafe", made.SEED: "7"}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    for foreign in (True, False):
        metadata = {} if foreign else {fingerprint.BASE: own, **said}
        contents = peft_folder.Contents(config, adapter_of_tiny(), metadata)
        peft_folder.write(tmp_path / "adapter", contents)
        found = facts_of(tmp_path, *COMMANDS[command])
        if command != "peft" or not foreign:  # which rewrites what the file says
            assert found[fingerprint.BASE] == own
        assert found.items() >= ({} if foreign else said).items()
        assert found[made.METHOD] == "LORA"
        scales = {*json.loads(found[made.CONSTANTS]).values()}
        assert scales == {1.0 if command == "peft" else 1.5}
        versions = {"minipeft", "torch", "safetensors"}
        assert json.loads(found[made.VERSIONS]).keys() == versions
        for name in ("adapter", "out"):
            path = tmp_path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_sum_says_what_made_it(tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    contents = peft_folder.Contents(config, adapter_of_tiny())
    found = combine.weighted_sum([(contents, 0.5), (contents, 2.0)]).metadata
    assert found[made.METHOD] == "LORA"
    assert json.loads(found[made.CONSTANTS])["r"] == 8
    assert json.loads(found[combine.WEIGHTS]) == [0.5, 2.0]
    assert json.loads(found[made.VERSIONS]).keys() >= {"minipeft"}


@pytest.mark.parametrize("command", ["inspect", "merge", "audit", "export"])
def test_a_foreign_file_gets_a_line(command, tmp_path, capsys):
    write_adapter(tmp_path / "adapter", adapter_of_tiny())
    base = ["--base", str(models.TINY)]
    adapter = ["--adapter", str(tmp_path / "adapter")]
    line = {
        "inspect": ["inspect", adapter[1], *base],
        "merge": ["merge", *base, *adapter, "--out", str(tmp_path / "out")],
        "audit": ["audit", *base, *adapter, "--merged", base[1]],
        "export": ["export", "--to", "peft", *base, *adapter],
    }[command]
    cli.main([*line, "--out", str(tmp_path / "out")] if command == "export" else line)
    said = " ".join(capsys.readouterr())
    assert "another base of the same shapes is not noticed" in said
