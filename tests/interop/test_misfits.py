"""An adapter that does not fit the base's tensors is refused, not cut to fit."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import bitsandbytes_export, merging, peft_format
from minipeft.interop.adapter import Adapter
from minipeft.interop.audit import WRONG, audit
from minipeft.interop.fingerprint import Hashing, of_files
from minipeft.interop.tensors import open_tensors
from minipeft.interop.update import Update
from tests.interop.folders import InMemory, adapter_tensors, write_adapter, write_model

NAME = "model.layers.0.q_proj.weight"


def update(rows=4, columns=6, **fields):
    return Update(torch.ones(2, columns), torch.ones(rows, 2), 2.0, **fields)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (update(rows=5), r"has shape \(4, 6\) .* of shape \(5, 6\)"),
        (update(rows=3), r"has shape \(4, 6\) .* of shape \(3, 6\)"),
        (update(columns=7), r"of shape \(4, 7\)"),
        (update(transposed=True), r"of shape \(6, 4\)"),
        (update(magnitude=torch.ones(3)), "has 3 numbers and its B 4 rows"),
    ],
)
def test_another_shape_is_refused(changed, words, tmp_path):
    tensors = {NAME: torch.zeros(4, 6)}
    base = write_model(tmp_path / "base", tensors)
    adapter = Adapter({NAME: changed})
    with pytest.raises(InputError, match=words):
        merging.merge(base, adapter, tmp_path / "out")
    with pytest.raises(InputError, match=words):
        list(audit(InMemory(tensors), adapter, InMemory(tensors)))
    assert not (tmp_path / "out").exists()


def test_a_bias_of_another_shape_is_refused(tmp_path):
    base = write_model(tmp_path / "base", {"a.bias": torch.zeros(4)})
    with pytest.raises(InputError, match=r"of shape \(1,\)"):
        merging.merge(base, Adapter({}, {"a.bias": torch.ones(1)}), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_base_of_integers_is_refused(dtype, tmp_path):
    base = write_model(tmp_path / "base", {NAME: torch.zeros(4, 6).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"q_proj.weight holds {name}; give the base"):
        merging.merge(base, Adapter({NAME: update()}), tmp_path / "out")


TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
NAMED = "base_model.model.model.layers.0.square.lora_A.default.weight"
BIAS = "base_model.model.model.layers.0.square.lora_B.bias"


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({"init_lora_weights": "pissa"}, {}, "--rank with 2r"),
        ({"init_lora_weights": "loftq"}, {}, "Q - W has full rank"),
        ({"init_lora_weights": "olora"}, {}, "path_initial_model_for_weight_conv"),
        ({"use_qalora": True}, {}, "use_qalora = True"),
        ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, {}, "layer_replication"),
        ({"use_rslora": "false"}, {}, "use_rslora is 'false'; it must be true or"),
        ({"use_dora": True}, {}, "does not have lora_magnitude_vector"),
        ({"lora_bias": False}, {BIAS: torch.ones(16)}, "is False, and the file has"),
        ({}, {TOKENS: torch.ones(2, 16)}, "holds rows of tokens"),
        ({}, {NAMED: torch.ones(4, 16)}, "its name is none of LoRA's"),
    ],
)
def test_what_is_no_update_of_the_base_is_not_merged(config, more, words, tmp_path):
    folder = write_adapter(tmp_path / "a", adapter_tensors() | more, **config)
    with pytest.raises(InputError, match=words):
        peft_format.read(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_matrices_of_integers_are_refused(dtype, tmp_path):
    tensors = {name: M.to(dtype) for name, M in adapter_tensors().items()}
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(InputError, match=r"holds .*; give it in a float dtype"):
        peft_format.read(folder)


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_merge_beyond_the_dtype_is_refused(fan, dtype, tmp_path):
    base = write_model(tmp_path / "base", {NAME: torch.zeros(4, 4, dtype=dtype)})
    alpha = 2.0 * torch.finfo(dtype).max
    changed = Update(torch.ones(2, 4), torch.ones(4, 2), alpha, transposed=fan)
    with pytest.raises(InputError, match=f"is not finite in {str(dtype)[6:]}; choose"):
        merging.merge(base, Adapter({NAME: changed}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_a_tensor_beyond_the_dtype_is_refused_without_an_update_too(place, tmp_path):
    norm = torch.tensor([1.0, 1e6, torch.inf])
    base = write_model(tmp_path / "base", {"norm.weight": norm})
    saved = {"norm.weight": norm} if place == "adapter" else {}
    adapter = Adapter({}, saved=saved)
    with pytest.raises(InputError, match=r"norm\.weight has a value beyond float16"):
        merging.merge(base, adapter, tmp_path / "out", torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    merging.merge(base, adapter, tmp_path / "out", torch.bfloat16)
    found = open_tensors(tmp_path / "out").read("norm.weight")
    assert found.tolist() == norm.bfloat16().tolist()


def test_nan_in_8_bits_stays_nan():
    W = torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)
    assert merging.cast("norm.weight", W, torch.float16).isnan().tolist() == [0, 1]


def test_the_audit_refuses_what_overflowed():
    base = InMemory({"norm.weight": torch.tensor([1.0, 1e6])})
    found = InMemory({"norm.weight": torch.tensor([1.0, torch.inf]).half()})
    (finding,) = audit(base, Adapter({}), found)
    assert finding.verdict == WRONG
    assert finding.mistake == "not finite"


def test_a_base_that_changes_for_one_pass_is_refused():
    W = torch.ones(4, 4)
    source = InMemory({NAME: W})
    read = Hashing(source, of_files(source))
    W[0, 0] = 2
    pieces = read.pieces(NAME)
    next(pieces)
    W[0, 0] = 1  # as it was, when the whole base is hashed to find the first
    with pytest.raises(InputError, match="changed while it was read"):
        next(pieces)


@pytest.mark.parametrize("write", [merging.merge, bitsandbytes_export.write_model])
def test_a_place_that_is_a_file_is_no_full_disk(write, tmp_path):
    base = write_model(tmp_path / "base", {NAME: torch.zeros(4, 6)})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write") as refused:
        write(base, Adapter({NAME: update()}), tmp_path / "file" / "out")
    assert "free some space" not in str(refused.value)


def test_an_embedding_of_another_base_is_refused(tmp_path):
    name, key = "model.embed_tokens.weight", "base_model.model.model.embed_tokens."
    table = torch.arange(24.0).reshape(6, 4)
    base = write_model(tmp_path / "base", {name: table.bfloat16()})
    pair = {
        f"{key}lora_embedding_A": torch.ones(2, 6),
        f"{key}lora_embedding_B": torch.ones(4, 2),
    }
    held = {f"{key}base_layer.weight": table}
    folder = write_adapter(tmp_path / "a", pair | held, r=2)
    adapter = peft_format.read(folder)
    merging.merge(base, adapter, tmp_path / "out")
    found = open_tensors(tmp_path / "out").read(name)
    assert torch.equal(found, (table + 12).bfloat16())  # the update is not lost
    other = write_model(tmp_path / "other", {name: (table + 1).bfloat16()})
    with pytest.raises(
        InputError, match=r"holds model\.embed_tokens\.weight of another"
    ):
        merging.merge(other, adapter, tmp_path / "no")
    with pytest.raises(InputError, match="of another base"):
        list(audit(open_tensors(other), adapter, open_tensors(other)))
