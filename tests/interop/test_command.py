"""The commands on files: what they print, write and return."""

import json

import pytest
import safetensors.torch
import torch

from minipeft import cli
from minipeft.interop import fingerprint
from minipeft.interop.merging import BASE
from minipeft.interop.tensors import open_tensors
from tests.interop.folders import (
    adapter_tensors,
    base_tensors,
    write_adapter,
    write_model,
)


@pytest.fixture
def folders(tmp_path):
    base = write_model(tmp_path / "base", base_tensors(torch.bfloat16), shards=2)
    adapter = write_adapter(tmp_path / "adapter", adapter_tensors())
    return tmp_path, ["--base", str(base), "--adapter", str(adapter)]


def test_merge_then_audit(folders, capsys):
    path, given = folders
    merged = str(path / "merged")
    assert cli.main(["merge", *given, "--out", merged]) == 0
    assert "merged 6 weights" in capsys.readouterr().out
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
def test_merge_into_another_dtype_is_rounded_once(folders, dtype):
    path, given = folders
    merged = str(path / "merged")
    assert cli.main(["merge", *given, "--out", merged, "--dtype", dtype]) == 0
    about = open_tensors(path / "merged").about
    assert {a.dtype for a in about.values()} == {getattr(torch, dtype)}
    assert cli.main(["audit", *given, "--merged", merged]) == 0


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
    assert not (path / "two").exists()
    allowed = [*given, "--allow-base-mismatch", "--out", str(path / "three")]
    assert cli.main(["merge", *allowed]) == 0


@pytest.mark.parametrize("command", ["merge", "audit", "inspect", "export"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"example: minipeft {command} " in " ".join(capsys.readouterr().out.split())
