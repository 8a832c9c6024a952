"""`minipeft inspect --fix`: the rewritten adapter gives the first one's results."""

import json

import pytest
import safetensors.torch
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import fixing, loaders, parts, peft_format
from minipeft.interop.audit import BOUND, EXACT, WRONG, audit
from minipeft.interop.loaders import LOADERS
from minipeft.interop.update import merged
from tests.interop.folders import (
    InMemory,
    adapter_tensors,
    base_tensors,
    write_adapter,
)

PATTERNS = {
    "use_rslora": True,
    "alpha_pattern": {"tall": 7},
    "rank_pattern": {r"layers\.1\..*": 9},
}


def mixed(dora=False):
    small, large = (
        adapter_tensors(r=r, layers=(layer,), dora=dora)
        for r, layer in ((4, 0), (9, 1))
    )
    bias = {"base_model.model.model.layers.0.wide.lora_B.bias": torch.ones(16)}
    return {**small, **large, **bias}


def merge(base, adapter):
    found = {n: merged(base[n], u) for n, u in adapter.updates.items()}
    for name, bias in adapter.biases.items():
        found[name] = (base[name].float() + bias.float()).to(base[name].dtype)
    return {**base, **found}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_effect_is_that_of_the_first_adapter(tmp_path, dora, dtype):
    first = write_adapter(tmp_path / "a", mixed(dora), lora_bias=True, **PATTERNS)
    fixing.fix(parts.read(first), tmp_path / "b")
    base = base_tensors(dtype)
    before, after = peft_format.read(first), peft_format.read(tmp_path / "b")
    found = list(audit(InMemory(base), before, InMemory(merge(base, after))))
    assert {f.verdict for f in found} <= {EXACT, BOUND}
    # The control: without the scale the audit reports a mistake.
    text = (tmp_path / "b" / "adapter_config.json").read_text()
    changed = json.loads(text) | {"lora_alpha": 12}
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(changed))
    wrong = merge(base, peft_format.read(tmp_path / "b"))
    assert WRONG in {f.verdict for f in audit(InMemory(base), before, InMemory(wrong))}


def test_a_scale_that_is_a_power_of_two_changes_no_bit(tmp_path):
    tensors = {n: t.bfloat16() for n, t in adapter_tensors().items()}
    first = write_adapter(tmp_path / "a", tensors, lora_alpha=8)
    fixing.fix(parts.read(first), tmp_path / "b")
    found = safetensors.torch.load_file(tmp_path / "b" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        scale = 2 if "lora_B" in name else 1
        assert torch.equal(found[name], scale * tensor)


def test_every_loader_of_pairs_computes_its_scale(tmp_path):
    tensors = {n: t for n, t in mixed().items() if "bias" not in n}
    first = write_adapter(tmp_path / "a", tensors, **PATTERNS)
    read = parts.read(first)
    fixing.fix(read, tmp_path / "b")
    fixed = parts.read(tmp_path / "b")
    for name in ("peft", "vLLM", "SGLang", "llama.cpp", "TensorRT-LLM"):
        assert not loaders.judge(LOADERS[name], fixed).lost, name
    assert loaders.judge(LOADERS["SGLang"], read).lost
    assert not loaders.scales(LOADERS["diffusers"], fixed)


def test_the_installed_peft_merges_it_alike(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    draw = torch.Generator().manual_seed(3)
    names = ("q", "k", "v")

    def model():
        layers = {n: torch.nn.Linear(16, 24, bias=False) for n in names}
        for name, layer in layers.items():
            layer.weight.data = weights[name].clone()
        return torch.nn.ModuleDict(layers)

    weights = {n: torch.randn(24, 16, generator=draw) * 0.1 for n in names}
    config = peft.LoraConfig(
        target_modules=[*names],
        r=3,
        lora_alpha=7,
        use_rslora=True,
        alpha_pattern={"k": 5},
        rank_pattern={"v": 6},
    )
    theirs = peft.get_peft_model(model(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    theirs.save_pretrained(tmp_path / "a")
    fixing.fix(parts.read(tmp_path / "a"), tmp_path / "b")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "b")
    found = {
        f"{name}.weight": layer.weight.detach()
        for name, layer in loaded.merge_and_unload().items()
    }
    base = InMemory({f"{name}.weight": W for name, W in weights.items()})
    adapter = peft_format.read(tmp_path / "a")
    verdicts = {f.verdict for f in audit(base, adapter, InMemory(found))}
    assert verdicts <= {EXACT, BOUND}


def test_nothing_is_replaced_and_nothing_else_is_rewritten(tmp_path, capsys):
    folder = write_adapter(tmp_path / "a", adapter_tensors())
    with pytest.raises(InputError, match="exists; choose another folder"):
        fixing.fix(parts.read(folder), folder)
    other = write_adapter(tmp_path / "b", {"x": torch.ones(2)}, peft_type="IA3")
    with pytest.raises(InputError, match="'IA3' has no scale to fold"):
        fixing.fix(parts.read(other), tmp_path / "c")
    assert not (tmp_path / "c").exists()
    out = str(tmp_path / "d")
    assert cli.main(["inspect", str(folder), "--fix", out]) == 0
    assert "every scale in B" in capsys.readouterr().out


def test_experts_of_ranks_that_differ_are_refused(tmp_path):
    key = "base_model.model.model.layers.0.mlp.experts"
    stacked = {f"{key}.lora_A.weight": torch.ones(12, 16)}
    stacked |= {f"{key}.lora_B.weight": torch.ones(16, 12)}
    large = {name: tensor for name, tensor in adapter_tensors(r=8, layers=(1,)).items()}
    config = {"rank_pattern": {r"layers\.1\..*": 8}}
    folder = write_adapter(tmp_path / "a", {**stacked, **large}, **config)
    with pytest.raises(InputError, match="holds experts of rank 4"):
        fixing.fix(parts.read(folder), tmp_path / "b")
