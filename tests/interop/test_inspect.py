"""`minipeft inspect`: the contents of an adapter, and its use in other programs."""

import json
import math
import re

import pytest
import safetensors.torch
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import fingerprint, inspecting, loaders, parts, peft_format
from minipeft.interop.fingerprint import BASE
from minipeft.interop.inspect_command import TARGETS
from minipeft.interop.loaders import EXACT, IGNORED, LOADERS, REFUSED, SCALED, UNKNOWN
from minipeft.interop.update import exact
from tests.interop.folders import (
    InMemory,
    adapter_tensors,
    base_tensors,
    write_adapter,
    write_model,
)
from tests.tolerance import gamma

KEY = "base_model.model.model.layers.0.wide"
MODULE = "model.layers.0.wide"


def opened(path, tensors=None, **config):
    return parts.read(write_adapter(path, tensors or adapter_tensors(), **config))


def judged(found, loader):
    return loaders.judge(LOADERS[loader], found)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stabilized", [False, True])
def test_the_norm_is_that_of_the_change_that_is_never_formed(
    tmp_path, dora, stabilized
):
    base, tensors = base_tensors(), adapter_tensors(dora=dora)
    found = opened(tmp_path / "a", tensors, use_rslora=stabilized)
    layers = {x.module: x for x in inspecting.inspect(found, InMemory(base)).layers}
    updates = peft_format.read(tmp_path / "a").updates
    assert layers.keys() == {name.removesuffix(".weight") for name in updates}
    for name, update in updates.items():
        W = base[name].double()
        change = float((exact(W, update, torch.float64) - W).norm())
        layer = layers[name.removesuffix(".weight")]
        # Each way is a root of sums of products in float64. No product is larger than
        # (|W| + |change|)^2, and one passes through fewer roundings than `terms`.
        terms, size = 4 * (sum(W.flatten(1).shape) + update.r), float(W.norm())
        allowed = gamma(terms, "float64") * (1 + size / change) ** 2
        assert math.isclose(layer.norm, change, rel_tol=allowed)
        assert math.isclose(layer.share, change / size, rel_tol=allowed)
        assert allowed < 2.0**-30
        assert (layer.r, layer.scaling) == (update.r, update.scaling)


def test_dora_without_its_base_has_no_norm(tmp_path):
    found = inspecting.inspect(opened(tmp_path / "a", adapter_tensors(dora=True)))
    assert all(math.isnan(layer.norm) for layer in found.layers)
    assert found.method == "DoRA"


def test_what_does_not_fit_is_named(tmp_path):
    tensors = adapter_tensors()
    tensors[f"{KEY}.lora_B.weight"].zero_()
    tensors["base_model.model.model.layers.0.tall.lora_A.weight"][0, 0] = torch.nan
    tensors["base_model.model.model.layers.7.wide.lora_A.weight"] = torch.ones(4, 32)
    tensors["base_model.model.model.layers.7.wide.lora_B.weight"] = torch.ones(16, 4)
    del tensors["base_model.model.model.layers.1.square.lora_B.weight"]
    del tensors["base_model.model.model.layers.1.tall.lora_A.weight"]
    del tensors["base_model.model.model.layers.1.tall.lora_B.weight"]
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    targets = ["wide", "tall", "square", "gate"]
    found = opened(tmp_path / "a", tensors, target_modules=targets)
    report = inspecting.inspect(found, InMemory(base_tensors()))
    assert [x.module for x in report.layers if x.dead] == [MODULE]
    assert len(report.not_finite) == 1
    assert "layers.0.tall.lora_A" in report.not_finite[0]
    assert report.incomplete == ("model.layers.1.square",)
    assert report.unmatched == ("model.layers.7.wide",)
    assert report.matched == 4
    assert report.missing == ("model.layers.1.tall",)
    assert report.others == ("base_model.model.lm_head.weight",)
    assert inspecting.inspect(found).missing == ("gate",)


@pytest.mark.parametrize(
    ("config", "adapted"),
    [
        ({"target_modules": ["q"]}, {"layers.0.q", "layers.1.q"}),
        ({"target_modules": r"layers\.\d\.k"}, {"layers.0.k", "layers.1.k"}),
        ({"target_modules": ["q"], "layers_to_transform": 1}, {"layers.1.q"}),
        ({"target_modules": ["q"], "layers_to_transform": [0]}, {"layers.0.q"}),
        (
            {"target_modules": ["q"], "exclude_modules": ["layers.0.q"]},
            {"layers.1.q"},
        ),
        ({"target_modules": "all-linear"}, set()),
        ({}, set()),
    ],
)
def test_targets_are_those_of_peft(config, adapted):
    modules = [f"layers.{i}.{part}" for i in (0, 1) for part in ("q", "k")]
    assert {m for m in modules if inspecting.targeted(m, config)} == adapted


@pytest.mark.parametrize(
    ("config", "loader", "verdict", "words"),
    [
        ({}, "vLLM", EXACT, "loads exactly"),
        ({"use_rslora": True}, "vLLM", EXACT, "loads exactly"),
        ({"use_rslora": True}, "TensorRT-LLM", EXACT, "loads exactly"),
        ({"use_rslora": True}, "SGLang", SCALED, "scale × 0.5 on 6 layers"),
        ({"use_rslora": True}, "llama.cpp", SCALED, "scale × 0.5 on 6 layers"),
        ({"use_rslora": True}, "diffusers", SCALED, "scale × 0.1667 on 6 layers"),
        ({"alpha_pattern": {"tall": 24}}, "vLLM", SCALED, "× 0.5 on 2 layers"),
        ({"alpha_pattern": {"tall": 24}}, "llama.cpp", SCALED, "× 0.5 on 2 layers"),
        ({"alpha_pattern": {"tall": 24}}, "SGLang", REFUSED, "one alpha"),
        ({"alpha_pattern": {"tall": 24}}, "peft", EXACT, "loads exactly"),
        ({"alpha_pattern": {"tall": 12}}, "vLLM", EXACT, "loads exactly"),
        ({"modules_to_save": ["lm_head"]}, "vLLM", REFUSED, "must be None"),
        ({"modules_to_save": ["lm_head"]}, "SGLang", UNKNOWN, "saved whole"),
        ({"bias": "all"}, "vLLM", REFUSED, "bias is not supported"),
        ({"peft_type": "IA3"}, "peft", EXACT, "loads exactly"),
        ({"peft_type": "IA3"}, "SGLang", REFUSED, "must be LORA"),
        ({"peft_type": "NEW"}, "peft", REFUSED, "no such peft_type"),
        ({"fan_in_fan_out": True}, "vLLM", UNKNOWN, "not known for weights stored"),
        ({}, "Ollama", REFUSED, "no ADAPTER line"),
        ({}, "MLX", REFUSED, "num_layers"),
    ],
)
def test_what_a_loader_does_follows_from_its_rules(
    tmp_path, config, loader, verdict, words
):
    found = judged(opened(tmp_path / "a", **config), loader)
    assert (found.verdict, words in found.sentence) == (verdict, True), found
    assert found.lost == (verdict != EXACT)


def test_dora_biases_and_embeddings(tmp_path):
    dora = opened(tmp_path / "a", adapter_tensors(dora=True), use_dora=True)
    for loader in ("vLLM", "SGLang", "llama.cpp"):
        assert judged(dora, loader).verdict == REFUSED
    assert judged(dora, "TensorRT-LLM").verdict == UNKNOWN
    bias = opened(
        tmp_path / "b", {**adapter_tensors(), f"{KEY}.lora_B.bias": torch.ones(16)}
    )
    for loader in ("vLLM", "llama.cpp", "TensorRT-LLM"):
        assert judged(bias, loader).verdict == REFUSED
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    pair = {f"{key}A": torch.ones(4, 40), f"{key}B": torch.ones(16, 4)}
    embedding = opened(tmp_path / "c", {**adapter_tensors(), **pair})
    assert judged(embedding, "llama.cpp").verdict == EXACT
    assert judged(embedding, "TensorRT-LLM").verdict == IGNORED
    assert judged(embedding, "vLLM").verdict == UNKNOWN


def test_ranks_that_differ(tmp_path):
    wide = adapter_tensors(r=8, layers=(1,))
    tensors = {**adapter_tensors(layers=(0,)), **wide}
    pattern = {r"layers\.1\..*": 8}
    found = opened(tmp_path / "a", tensors, rank_pattern=pattern)
    assert judged(found, "SGLang").verdict == REFUSED
    assert judged(found, "llama.cpp").verdict == EXACT
    assert judged(found, "vLLM").verdict == SCALED
    assert "scale × 2 on 3 layers" in judged(found, "vLLM").sentence


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_never_loaded_exactly(tmp_path, capsys, half):
    tensors = adapter_tensors()
    del tensors[f"{KEY}.lora_{half}.weight"]
    found = opened(tmp_path / "a", tensors)
    assert found.incomplete == (MODULE,)
    wanted = dict.fromkeys(("llama.cpp", "Ollama", "MLX"), REFUSED)
    wanted |= {"peft": IGNORED, "diffusers": SCALED}
    for name in TARGETS:
        judgement = judged(found, name)
        assert judgement.verdict == wanted.get(name, UNKNOWN), judgement
        if name not in ("Ollama", "MLX"):  # these refuse every adapter
            assert re.search("without A or without B|needs A and B", judgement.sentence)
        assert cli.main(["inspect", str(tmp_path / "a"), "--for", name]) == 1
    said = capsys.readouterr().out
    assert "it leaves the missing matrix at its start" in said
    assert "the configuration names no base\n" in said
    assert cli.main(["inspect", str(tmp_path / "a")]) == 0


@pytest.mark.parametrize("told", ["by the base", "by the adapter"])
def test_no_loader_is_said_to_load_what_is_no_causal_model(tmp_path, capsys, told):
    base = write_model(tmp_path / "base", base_tensors())
    classifier = {"architectures": ["ModernBertForSequenceClassification"]}
    causal = {"architectures": ["LlamaForCausalLM"]}
    task = "SEQ_CLS" if told == "by the adapter" else None
    folder = write_adapter(tmp_path / "a", adapter_tensors(), task_type=task)
    command = ["inspect", str(folder)]
    if told == "by the base":
        (base / "config.json").write_text(json.dumps(causal))
        assert cli.main([*command, "--base", str(base), "--for", "vLLM"]) == 0
        assert "\nvLLM: loads exactly\n" in capsys.readouterr().out
        (base / "config.json").write_text(json.dumps(classifier))
        command += ["--base", str(base)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    for name in ("vLLM", "SGLang", "llama.cpp", "TensorRT-LLM"):
        sentence = "not known for an architecture that is no causal language model"
        assert f"\n{name}: {sentence}\n" in said
    # peft looks for a head where the file names its task.
    verdict = {"by the base": "loads exactly", "by the adapter": "not known whether a"}
    assert f"\npeft: {verdict[told]}" in said
    assert cli.main([*command, "--for", "vLLM"]) == 1


def test_every_rule_names_what_was_read():
    assert tuple(LOADERS) == TARGETS
    for loader in LOADERS.values():
        rules = [loader.scale_rule, *loader.rules.values()]
        for rule in rules:
            if (rule.outcome, rule.reason) != (UNKNOWN, ""):
                assert re.search(r"@ [0-9a-f]{8}|20\d\d|\d+\.\d+\.\d+", rule.source)
                assert rule.outcome in (EXACT, SCALED, IGNORED, REFUSED, UNKNOWN)
        assert set(loader.rules) <= {*loaders.FEATURES, "any"}


def test_our_scales_are_those_of_the_installed_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    layers = torch.nn.ModuleDict(
        {name: torch.nn.Linear(16, 16, bias=False) for name in ("q", "k", "v")}
    )
    config = peft.LoraConfig(
        target_modules=["q", "k", "v"],
        r=4,
        lora_alpha=12,
        use_rslora=True,
        alpha_pattern={"k": 32},
        rank_pattern={"v": 8},
    )
    model = peft.get_peft_model(torch.nn.Sequential(layers), config)
    model.save_pretrained(tmp_path)
    found = parts.read(tmp_path)
    theirs = {
        name: model.base_model.model[0][name].scaling["default"] for name in layers
    }
    assert {m[2:]: found.scaling(m) for m in found.modules} == theirs
    assert len(set(theirs.values())) == 3
    # Half a pair: peft leaves the missing matrix at its start.
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors = {name: torch.ones_like(t) for name, t in tensors.items() if ".k." in name}
    safetensors.torch.save_file({n: t for n, t in tensors.items() if "_A" in n}, file)
    fresh = torch.nn.Sequential(
        torch.nn.ModuleDict({n: torch.nn.Linear(16, 16, bias=False) for n in layers})
    )
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    k = loaded.base_model.model[0]["k"]
    assert k.lora_A["default"].weight.eq(1).all()
    assert not k.lora_B["default"].weight.any()


def test_the_base_is_recognized(tmp_path):
    base = write_model(tmp_path / "base", base_tensors())
    own = fingerprint.of_files(parts.SafeTensors(base / "model.safetensors"))
    folder = write_adapter(tmp_path / "a", adapter_tensors())
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(adapter_tensors(), file, metadata={BASE: own.to_json()})
    found = parts.read(folder)
    tensors = base_tensors()
    line, other = inspecting.about_base(found, InMemory(tensors))
    assert ("made for this base" in line, other) == (True, False)
    tensors["model.norm.weight"] += 1
    line, other = inspecting.about_base(found, InMemory(tensors))
    assert line.endswith("and this is another: model.norm.weight differs here")
    assert other


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 0}, "r in .* is 0"),
        ({"lora_alpha": "12"}, "lora_alpha in .* is '12'"),
        ({"alpha_pattern": {"q": None}}, "lora_alpha in .* is None"),
        ({"alpha_pattern": {"q": math.inf}}, "holds the number Infinity"),
        ({"rank_pattern": [1]}, "is no JSON object"),
    ],
)
def test_a_configuration_without_a_scale_is_refused(tmp_path, config, sentence):
    with pytest.raises(InputError, match=sentence):
        opened(tmp_path / "a", **config)


def test_the_command(tmp_path, capsys):
    base = write_model(tmp_path / "base", base_tensors())
    folder = write_adapter(tmp_path / "a", adapter_tensors(dora=True), use_rslora=True)
    report = tmp_path / "report.json"
    arguments = ["inspect", str(folder), "--json", str(report)]
    assert cli.main([*arguments, "--base", str(base)]) == 0
    said = capsys.readouterr().out
    assert "method: DoRA with rsLoRA's scale; 6 updates" in said
    assert "modules that fit the base: 6" in said
    assert all(f"\n{name}: " in said for name in TARGETS)
    assert cli.main([*arguments]) == 0
    assert json.loads(report.read_text())["layers"][0]["norm"] is None
    assert cli.main([*arguments, "--for", "peft"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--for", "VLLM"]) == 1
    assert "  source: vllm/lora/peft_helper.py" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_in_the_folder_is_refused(tmp_path, capsys, name):
    file = write_adapter(tmp_path / "a", adapter_tensors()) / name
    assert cli.main(["inspect", str(file)]) == 2
    said = f"{file} is a file; give the folder of an adapter, not a file in it"
    assert said in capsys.readouterr().err


def test_a_base_that_is_not_the_adapters_gives_exit_code_1(tmp_path, capsys):
    tensors, narrow = base_tensors(), base_tensors()
    narrow["model.layers.0.wide.weight"] = torch.ones(16, 24)
    unfit = write_model(tmp_path / "narrow", narrow)
    base = write_model(tmp_path / "base", tensors)
    folder = write_adapter(tmp_path / "a", adapter_tensors())
    peft = ["inspect", str(folder), "--for", "peft", "--base"]
    assert cli.main([*peft, str(base)]) == 0
    assert "\npeft: loads exactly\n" in capsys.readouterr().out
    assert cli.main([*peft, str(unfit)]) == 1
    said = "peft: 1 of 6 modules do not fit this base; on its own base: loads exactly"
    assert said in capsys.readouterr().out
    assert cli.main(["inspect", str(folder), "--base", str(unfit)]) == 1
    own = fingerprint.of_files(parts.SafeTensors(base / "model.safetensors"))
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(adapter_tensors(), file, metadata={BASE: own.to_json()})
    assert cli.main([*peft, str(base)]) == 0
    tensors["model.norm.weight"] += 1
    other = write_model(tmp_path / "other", tensors)
    capsys.readouterr()
    assert cli.main([*peft, str(other)]) == 1
    said = "peft: the file was made for another base; on its own base: loads exactly"
    assert said in capsys.readouterr().out


def test_every_rule_says_which_version_was_read():
    version = re.compile(r"@ [0-9a-f]{8}|, 20\d\d-\d\d-\d\d|\d+\.\d+\.\d+|request \d+$")
    for loader in LOADERS.values():
        for rule in (loader.scale_rule, *loader.rules.values()):
            bare = not rule.source and rule.outcome == UNKNOWN
            assert bare or version.search(rule.source), (loader.name, rule)
