"""`save_pretrained` refuses a model with adapters: the files would not load again."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minipeft.errors import InputError
from minipeft.torch.inject import add, inject, merge, remove, unload
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import quantize_linears
from tests.agreement.llama import TEXT, llama

CONFIG = LoRAConfig(2, 4.0)


def assert_refused(model, folder, sentence):
    with pytest.raises(InputError, match=f"save_pretrained is refused: .*{sentence}"):
        model.save_pretrained(folder, safe_serialization=True)
    assert not folder.exists()


def assert_loads_again(model, folder):
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(TEXT).logits, model(TEXT).logits)


def test_an_injected_model_is_saved_after_it_was_merged_and_unloaded(tmp_path):
    model = inject(llama(), CONFIG, ["q_proj"])
    remedy = r"adapters.*minipeft\.interop\.peft_model\.save.*unload\(merge\(model\)\)"
    assert_refused(model, tmp_path / "whole", remedy)
    assert_refused(model.model, tmp_path / "part", "adapters")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_refused(twin, tmp_path / "twin", "adapters")
    assert_loads_again(unload(merge(model)), tmp_path / "merged")


def test_a_model_whose_last_adapter_is_removed_is_saved(tmp_path):
    model = add(inject(llama(), CONFIG, ["q_proj"]), CONFIG, "other")
    assert_refused(remove(model, "default"), tmp_path / "one", "adapters")
    assert_loads_again(remove(model, "other"), tmp_path / "none")


def test_a_quantized_model_stays_refused_without_its_adapters(tmp_path):
    model = quantize_linears(llama(), blocksize=16)
    assert_refused(model, tmp_path / "codes", "few bits")
    inject(model, CONFIG, ["q_proj"])
    assert_refused(unload(model), tmp_path / "codes", "few bits")


def test_tensors_that_share_a_part_of_their_memory_are_kept(tmp_path):
    model, W = inject(llama(), CONFIG, ["q_proj"]), torch.randn(8, 8)
    state = {"a": W[:6], "b": W[2:], "c": W, "d": W.T, "e": W.flatten()}
    model.save_pretrained(tmp_path / "run", state_dict=state)
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_state_that_cannot_be_written_is_refused(tmp_path):
    model = inject(llama(), CONFIG, ["q_proj"])
    nothing = {"a": torch.ones(2, device="meta")}
    with pytest.raises(InputError, match="a is on the device meta"):
        model.save_pretrained(tmp_path / "meta", state_dict=nothing)
    assert not (tmp_path / "meta").exists()
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"cannot write .*; choose another place"):
            model.save_pretrained(place, state_dict={"a": torch.ones(2)})
