"""A 4-bit base has three targets; each is written, named, and told by the audit."""

import json
from dataclasses import replace

import pytest
import torch

from minipeft import cli
from minipeft.errors import InputError
from minipeft.interop import (
    bitsandbytes_export,
    bitsandbytes_format,
    fingerprint,
    made,
    peft_format,
    quantized_base,
)
from minipeft.interop.audit import EXACT, INTO_ORIGINAL, WRONG, audit, concluded
from minipeft.interop.bitsandbytes_format import FourBitTensors
from minipeft.interop.fingerprint import BASE
from minipeft.interop.opening import open_model
from minipeft.interop.quantized_base import TARGETS, Target
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import merged
from minipeft.torch import blockwise, double_quant
from tests.interop.folders import (
    adapter_tensors,
    base_tensors,
    write_adapter,
    write_model,
)

BF16 = torch.bfloat16
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


def weights():
    return base_tensors(BF16)


def is_matrix(name):
    return name.endswith("weight") and "layers" in name


def packed(tensors, nested):
    """Return a checkpoint whose matrices have 4 bits."""
    found = {}
    for name, W in tensors.items():
        if is_matrix(name):
            q = (double_quant if nested else blockwise).quantize(W)
            parts = bitsandbytes_format.write(name, q, W.dtype)
            found |= {key: tensor.clone() for key, tensor in parts.items()}
        else:
            found[name] = W
    return found


@pytest.fixture
def folders(tmp_path, request):
    nested = request.getfixturevalue("nested")
    write_model(tmp_path / "original", weights())
    base = write_model(tmp_path / "packed", packed(weights(), nested), shards=2)
    said = {"dtype": "bfloat16", "quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(said))
    # One layer keeps its weights, as most adapters leave some alone.
    write_adapter(tmp_path / "adapter", adapter_tensors(layers=(0,)))
    return tmp_path


def merge(folders, name, adapter=None):
    original = folders / "original" if name == "original" else None
    adapter = adapter or peft_format.read(folders / "adapter")
    where = folders / "packed", adapter, folders / name[:3]
    line = quantized_base.merge(*where, Target(name, original))
    return open_model(folders / name[:3]), line


@NESTED
@pytest.mark.parametrize("name", TARGETS)
def test_each_target_is_what_its_name_says(folders, nested, name):
    found, _ = merge(folders, name)
    updates = peft_format.read(folders / "adapter").updates
    quantized, plain = open_model(folders / "packed"), weights()
    for weight in plain:
        W = plain[weight] if name == "original" else quantized.read(weight)
        if weight in updates:
            W = merged(W, updates[weight])
            if name == "requantized":
                kind = double_quant if nested else blockwise
                W = kind.dequantize(kind.quantize(W), BF16)
        assert torch.equal(found.read(weight), W), weight
    assert found.metadata[made.TARGET] == name
    config = json.loads((folders / name[:3] / "config.json").read_text())
    assert ("quantization_config" in config) == (name == "requantized")
    assert isinstance(found, FourBitTensors) == (name == "requantized")
    own = "original" if name == "original" else "packed"
    of = fingerprint.of_files(open_tensors(folders / own))
    assert fingerprint.Fingerprint.from_json(found.metadata[BASE]) == of


@NESTED
@pytest.mark.parametrize("name", TARGETS)
def test_the_audit_tells_the_targets_apart(folders, nested, name):
    found, _ = merge(folders, name)
    adapter = peft_format.read(folders / "adapter")

    def mistakes(base):
        findings = concluded(list(audit(open_model(folders / base), adapter, found)))
        return {f.mistake for f in findings if f.verdict == WRONG}, findings

    wrong, findings = mistakes("packed")
    assert wrong == ({INTO_ORIGINAL} if name == "original" else set())
    if name != "original":
        assert {f.verdict for f in findings} == {EXACT}
    kinds = {"dequantized": "merged into dequantized NF4"}
    kinds |= {"requantized": "requantized"}
    wrong, findings = mistakes("original")
    adapted = {f.mistake for f in findings if f.adapted}
    assert adapted == {kinds.get(name, "")}
    assert "wrong base" not in wrong


@NESTED
def test_another_original_is_refused_by_its_first_tensor(folders, nested):
    other = weights()
    other["model.layers.1.tall.weight"][0, 0] += 1
    write_model(folders / "original", other)
    with pytest.raises(InputError, match=r"layers\.1\.tall\.weight of the original is"):
        merge(folders, "original")
    write_model(folders / "original", {n: W for n, W in other.items() if "norm" in n})
    with pytest.raises(InputError, match="give the model that was quantized"):
        merge(folders, "original")
    assert sorted(p.name for p in folders.iterdir()) == [
        "adapter",
        "original",
        "packed",
    ]


@pytest.mark.parametrize("nested", [True], ids=["nested"])
@pytest.mark.parametrize("decoded", [False, True], ids=["packed", "decoded"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_base_is_compared_as_the_file_names_it(folders, nested, name, decoded):
    base = (
        open_model(folders / "packed") if decoded else open_tensors(folders / "packed")
    )
    own = fingerprint.of_files(base)
    adapter = peft_format.read(folders / "adapter")
    adapter = replace(adapter, metadata={BASE: own.to_json()})
    assert "the base is the one" in merge(folders, name, adapter)[1]
    wrong = {**own.tensors, "model.norm.weight": "0" * 64}
    text = fingerprint.Fingerprint(wrong).to_json()
    other = replace(adapter, metadata={BASE: text})
    (folders / name[:3]).rename(folders / "before")
    with pytest.raises(InputError, match=r"another base: model\.norm\.weight differs"):
        merge(folders, name, other)
    assert not (folders / name[:3]).exists()


@pytest.mark.parametrize("nested", [False], ids=["plain"])
def test_the_command_asks_for_a_target(folders, nested, capsys):
    given = ["--base", str(folders / "packed"), "--adapter", str(folders / "adapter")]
    out = ["--out", str(folders / "out")]
    assert cli.main(["merge", *given, *out]) == 2
    assert "the base holds 4-bit weights; choose --target" in capsys.readouterr().err
    assert cli.main(["merge", *given, *out, "--target", "original"]) == 2
    assert "needs --original MODEL" in capsys.readouterr().err
    other = ["--target", "dequantized", "--original", str(folders / "original")]
    assert cli.main(["merge", *given, *out, *other]) == 2
    assert "no other target takes it" in capsys.readouterr().err
    narrow = ["--dtype", "float16"]
    assert cli.main(["merge", *given, *out, "--target", "requantized", *narrow]) == 2
    assert "leave --dtype out" in capsys.readouterr().err
    assert cli.main(["export", "--to", "gguf", *given, *out, *narrow]) == 2
    assert "--dtype is for --to safetensors" in capsys.readouterr().err
    assert cli.main(["merge", *given, *out, "--target", "dequantized"]) == 0
    said = capsys.readouterr()
    assert "merged 3 weights" in said.out
    assert "(dequantized)" in said.out
    assert "does not say which base" in said.err
    merged_ = ["--merged", str(folders / "out")]
    assert cli.main(["audit", *given, *merged_]) == 0
    assert "says that the target was dequantized" in capsys.readouterr().out
    plain = ["--base", str(folders / "original"), *given[2:]]
    assert cli.main(["merge", *plain, *out, "--target", "dequantized"]) == 2
    assert "leave --target" in capsys.readouterr().err


@pytest.mark.parametrize("nested", [False], ids=["plain"])
def test_a_base_that_changes_meanwhile_is_refused(folders, nested, monkeypatch):
    original, name = quantized_base.merge, "model.layers.1.tall.weight"

    def then_changed(base, *more):
        original(base, *more)
        others = {**weights(), name: weights()[name] + 1}  # which is copied later
        write_model(base, packed(others, nested), shards=2)

    monkeypatch.setattr(bitsandbytes_export.quantized_base, "merge", then_changed)
    adapter = peft_format.read(folders / "adapter")
    with pytest.raises(InputError, match=rf"{name}.* of the base changed while it"):
        bitsandbytes_export.write_model(folders / "packed", adapter, folders / "out")
    assert {p.name for p in folders.iterdir()} == {"adapter", "original", "packed"}
