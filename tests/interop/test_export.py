"""`minipeft export`: each target is written, and its own program reads it."""

import json

import pytest
import torch

from minipeft import cli
from minipeft.interop import peft_format
from minipeft.interop.audit import EXACT, audit
from minipeft.interop.gguf_format import GgufTensors
from minipeft.interop.opening import open_model
from minipeft.interop.tensors import open_tensors
from minipeft.lab import models
from tests.interop.folders import adapter_of_tiny, write_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = adapter_of_tiny()
    path = tmp_path_factory.mktemp("adapter")
    return write_adapter(path, tensors, use_rslora=True, alpha_pattern={"q_proj": 7})


def export(folder, target, out, *more):
    given = ["--base", str(models.TINY), "--adapter", str(folder), "--out", str(out)]
    return cli.main(["export", "--to", target, *given, *more])


def test_peft_gets_one_scale(folder, tmp_path):
    assert export(folder, "peft", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert (config["use_rslora"], config["alpha_pattern"]) == (False, {})
    assert export(folder, "peft", tmp_path / "out") == 2


def test_ollama_gets_the_merged_model(folder, tmp_path, capsys):
    assert export(folder, "ollama", tmp_path / "out", "--kind", "Q8_0") == 0
    assert "only before Ollama 0.34.1" in capsys.readouterr().out
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    found = GgufTensors(tmp_path / "out" / "model.gguf")
    findings = audit(open_tensors(models.TINY), peft_format.read(folder), found)
    assert {f.verdict for f in findings} == {EXACT}


def test_bitsandbytes_gets_four_bits(folder, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert export(folder, "bitsandbytes", out) == 0
    found = open_model(out)
    findings = audit(open_tensors(models.TINY), peft_format.read(folder), found)
    assert {f.verdict for f in findings} == {EXACT}
    theirs = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    layers = {
        n: m for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    }
    assert len(layers) == 28
    for name, layer in layers.items():
        weight = layer.weight
        plain = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        ours = found.read(f"{name}.weight")
        assert torch.equal(plain.to(ours.dtype), ours), name
    assert not list(tmp_path.glob(".*"))
