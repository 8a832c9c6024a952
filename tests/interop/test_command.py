"""The commands on files: their output, their files and their exit codes."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from minipeft import cli
from minipeft.interop import (
    fingerprint,
    fixing,
    merging,
    parts,
    peft_folder,
    peft_format,
    peft_model,
    progress,
    to_lora,
)
from minipeft.interop.combine import weighted_sum
from minipeft.interop.fingerprint import BASE
from minipeft.interop.opening import open_model
from minipeft.interop.tensors import INDEX, open_tensors
from minipeft.torch import inject
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.lora import LoRAConfig
from tests.agreement.llama import llama
from tests.interop.folders import (
    adapter_tensors,
    base_tensors,
    write_adapter,
    write_model,
)
from tests.tolerance import assert_within, gamma


@pytest.fixture
def folders(tmp_path):
    base = write_model(tmp_path / "base", base_tensors(torch.bfloat16), shards=2)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    return tmp_path, ["--base", str(base), "--adapter", str(adapter)]


class Terminal(io.StringIO):
    """A file that says it is a terminal, or that it is none."""

    def __init__(self, there):
        super().__init__()
        self.there = there

    def isatty(self):
        return self.there


@pytest.mark.parametrize("terminal", [False, True])
def test_long_work_shows_how_far_it_is(terminal, monkeypatch):
    clock, err = iter(range(0, 100, 4)), Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patched:
        if not terminal:
            patched.setattr(progress.time, "monotonic", lambda: next(clock))
        with progress.progress("merging", 5) as step:
            for name in "abcde":
                step(name)
    said = err.getvalue()
    if terminal:
        assert "5/5" in said
        assert "\x1b" in said
    else:  # a plain line at the first step 10 seconds or more after the last one
        assert said == "merging: 3 of 5, c\n"


def test_merge_then_audit(folders, capsys):
    path, given = folders
    merged = str(path / "merged")
    assert cli.main(["merge", *given, "--out", merged]) == 0
    assert "merged 6 weights" in capsys.readouterr().out
    index = json.loads((path / "merged" / INDEX).read_text())
    size = sum(tensor.nbytes for tensor in base_tensors(torch.bfloat16).values())
    assert index["metadata"] == {"total_size": size}  # of the values, without headers
    assert cli.main(["audit", *given, "--merged", merged]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "6 adapted tensors: 6 exact, 0 within the bound of another order of sums, "
        "0 wrong",
        "8 other tensors: 8 unchanged, 0 not",
    ]
    assert "does not say which base" in said.err


def test_audit_names_what_was_not_applied(folders, capsys):
    path, given = folders
    report = path / "report.json"
    arguments = ["audit", *given, "--merged", given[1], "--json", str(report)]
    assert cli.main(arguments) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("not applied: the tensor is that of the base (6 tensors")
    findings = json.loads(report.read_text())
    assert sum(f["mistake"] == "not applied" for f in findings) == 6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_into_another_dtype_is_rounded_once(folders, dtype, capsys):
    path, given = folders
    merged = str(path / "merged")
    assert cli.main(["merge", *given, "--out", merged, "--dtype", dtype]) == 0
    about = open_tensors(path / "merged").about
    assert {a.dtype for a in about.values()} == {getattr(torch, dtype)}
    said = json.loads((path / "merged" / "config.json").read_text())
    assert said == {"dtype": dtype}
    capsys.readouterr()
    assert cli.main(["audit", *given, "--merged", merged]) == 0
    others = capsys.readouterr().out.splitlines()[-1]
    how = {"float16": "rounded to float16", "float32": "kept in float32"}[dtype]
    assert others == f"8 other tensors: 0 unchanged, 8 as the base, {how}, 0 not"


def test_a_merge_writes_its_dtype_into_every_part_of_the_configuration(folders):
    path, given = folders
    text = {"dtype": "bfloat16", "limit": [0, math.inf], "hidden_size": 16}
    config = {"torch_dtype": "bfloat16", "text_config": text}
    (path / "base" / "config.json").write_text(json.dumps(config))
    for dtype, wanted in ((["--dtype", "float16"], "float16"), ([], "bfloat16")):
        out = path / wanted
        assert cli.main(["merge", *given, "--out", str(out), *dtype]) == 0
        text["dtype"] = config["torch_dtype"] = wanted
        assert json.loads((out / "config.json").read_text()) == config


def test_another_base_is_refused_by_name(folders, capsys):
    path, given = folders
    own = fingerprint.of_files(open_tensors(path / "base"))
    file = path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    metadata = {"format": "pt", BASE: own.to_json()}
    safetensors.torch.save_file(tensors, file, metadata=metadata)
    assert cli.main(["merge", *given, "--out", str(path / "one")]) == 0
    assert (
        "the base is the one that the adapter was made for" in capsys.readouterr().err
    )
    other = base_tensors(torch.bfloat16)
    other["model.norm.weight"][3] += 1
    write_model(path / "base", other, shards=2)
    assert cli.main(["merge", *given, "--out", str(path / "two")]) == 2
    error = capsys.readouterr().err
    assert "another base: model.norm.weight differs here" in error
    assert error.endswith("or pass --allow-base-mismatch if you mean it\n")
    assert "=True" not in error
    assert not (path / "two").exists()
    allowed = [*given, "--allow-base-mismatch", "--out", str(path / "three")]
    assert cli.main(["merge", *allowed]) == 0


@pytest.mark.parametrize("command", ["merge", "audit", "inspect", "export", "combine"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: minipeft {command} " in " ".join(capsys.readouterr().out.split())


def test_combine_writes_the_weighted_sum(folders, capsys):
    path, given = folders
    second = write_adapter(path / "second", adapter_tensors(seed=9, r=3), r=3)
    arguments = ["combine", given[3], str(second), "--out", str(path / "both")]
    assert cli.main([*arguments, "--weights", "0.5"]) == 2
    assert "2 adapters and 1 weights" in capsys.readouterr().err
    for few in ("-1e3", "-.5E-2"):  # a number, not an option
        assert cli.main([*arguments, "--weights", few]) == 2
        assert "2 adapters and 1 weights" in capsys.readouterr().err
    assert cli.main([*arguments, "--weights", "0.5", "-2"]) == 0
    assert "wrote" in capsys.readouterr().out
    read = [peft_folder.read(Path(folder)) for folder in (given[3], second)]
    expected = weighted_sum([*zip(read, (0.5, -2.0), strict=True)])
    found = peft_folder.read(path / "both")
    assert found.config == expected.config
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    assert cli.main([*arguments[:3], "--out", str(path / "concatenated")]) == 0


def test_export_writes_any_method_as_lora_and_states_the_error(tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    model = inject.inject(llama(), DoRAConfig(r=2, alpha=3), ["q_proj", "v_proj"])
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save(model, adapter)
    given = ["export", "--base", str(base), "--adapter", str(adapter)]
    out = tmp_path / "out"
    assert cli.main([*given, "--to", "peft", "--rank", "3", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "4 updates as LoRA of rank 3 to 3" in said.out
    assert "the base is the one" in said.err
    expected = to_lora.to_lora(model, rank=3)
    assert f"lost: {expected.error:.2g} of all updates together" in said.out
    found = peft_folder.read(out)
    for name, tensor in expected.contents.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    wrong = [*given, "--to", "gguf", "--rank", "3", "--out", str(tmp_path / "x")]
    assert cli.main(wrong) == 2
    assert "write plain LoRA for peft, not for gguf" in capsys.readouterr().err
    wrong[wrong.index("gguf")] = "safetensors"
    assert cli.main(wrong) == 2
    assert "for peft, not for safetensors" in capsys.readouterr().err
    both = [*given, "--to", "peft", "--rank", "3", "--share", "0.9"]
    assert cli.main([*both, "--out", str(tmp_path / "x")]) == 2
    assert "give one of the two" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_export_does_not_overwrite_a_gguf_file(folders, capsys):
    path, given = folders
    model = path / "model.gguf"
    model.write_text("mine")
    for to, out in (("gguf", model), ("ollama", path)):
        for merged in ([], ["--merged"]):
            more = ["--out", str(out), *merged]
            assert cli.main(["export", "--to", to, *given, *more]) == 2
            assert f"{model} exists; choose another" in capsys.readouterr().err
    assert model.read_text() == "mine"


def test_export_looks_for_the_adapter_before_it_loads_the_base(folders, capsys):
    path, given = folders
    out = ["--out", str(path / "out"), "--rank", "2", "--adapter", str(path / "none")]
    assert cli.main(["export", "--to", "peft", *given[:2], *out]) == 2
    assert f"there is no {path / 'none'}" in capsys.readouterr().err


def test_the_usage_of_combine_can_be_typed(folders, capsys):
    path, given = folders
    with pytest.raises(SystemExit):
        cli.main(["combine", "--help"])
    usage = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
    assert usage.index("ADAPTER") < usage.index("--weights") < usage.index("--out")
    typed = ["combine", given[3], given[3], "--weights", "1", "2"]
    assert cli.main([*typed, "--out", str(path / "sum")]) == 0


def test_a_folder_may_be_a_string(folders):
    path, (_, base, _, adapter) = folders
    found = peft_format.read(adapter)
    merging.merge(base, found, f"{path}/merged")
    open_model(f"{path}/merged")
    fixing.fix(parts.read(adapter), f"{path}/fixed")
    peft_folder.write(f"{path}/written", peft_folder.read(adapter))
    model = inject.inject(llama(), LoRAConfig(r=2, alpha=3), ["q_proj"])
    peft_model.save(model, f"{path}/saved")
    assert inject.adapted(peft_model.load(llama(), f"{path}/saved"))


def test_the_error_of_all_layers_is_that_of_their_sum():
    model = inject.inject(llama(), DoRAConfig(r=2, alpha=3), ["q_proj", "down_proj"])
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    found = to_lora.to_lora(model, rank=1)
    lost, whole = 0.0, 0.0
    for key, layer in inject.adapted(model).items():
        start = f"base_model.model.{key}.lora_"
        B, A = (found.contents.tensors[f"{start}{M}.weight"].double() for M in "BA")
        delta = layer.delta().detach().double()
        lost += float((delta - B @ A).square().sum())
        whole += float(delta.square().sum())
    expected = (lost / whole) ** 0.5
    # Both sides compute in float64, so their difference is far below float32's
    # rounding.
    assert_within(found.error, expected, gamma(1) * expected)
    assert found.worst[1] == max(found.errors.values())
