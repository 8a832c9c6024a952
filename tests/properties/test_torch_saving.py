"""`save_pretrained`: a changed model is refused, for it would not load again."""

import copy
import pickle

import pytest
import torch
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
    assert_refused(model, tmp_path / "whole", r"adapters.*unload\(merge\(model\)\)")
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
