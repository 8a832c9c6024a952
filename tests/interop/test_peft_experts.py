"""LoRA on stacks of experts in peft's files: our results against those of peft."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import peft_experts, peft_folder, peft_model
from minipeft.torch import inject
from minipeft.torch.experts import LoRAExperts
from minipeft.torch.lora import LoRAConfig
from tests.interop import peers
from tests.interop.test_peft_model import (
    assert_same_logits,
    assert_same_tensors,
    silent,
)
from tests.lab.architectures import build

peft = pytest.importorskip("peft")

MODELS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM")
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "both": {"target_parameters": BOTH},
    "one": {"target_parameters": ["experts.down_proj"]},
    "with layers": {"target_parameters": BOTH, "target_modules": ["q_proj"]},
    "rank-stabilized": {"target_parameters": BOTH, "use_rslora": True, "r": 3},
    "patterns": {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.gate_up_proj": 2},
        "alpha_pattern": {"layers.1.mlp.experts.down_proj": 7},
    },
    "one layer": {"target_parameters": ["layers.1.mlp.experts.down_proj"]},
}


def experts(name):
    """Return a small model whose experts run one after another."""
    torch.manual_seed(0)
    model = build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # GPT-OSS leaves some uninitialized
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.fill_(1)
    model.set_experts_implementation("eager")
    return model


def logits(model):
    """Return the logits of a few tokens."""
    with torch.no_grad(), peers.quiet():
        return model(torch.arange(12).reshape(2, 6)).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_peft_gives_its_logits_and_is_written_back_bit_for_bit(
    name, case, tmp_path
):
    base = experts(name)
    settings = {"target_modules": [], **CASES[case]}
    theirs = peers.trained(base, peers.lora(**settings))
    folder = peers.saved(theirs, tmp_path / "theirs")
    expected = logits(theirs)
    assert not torch.equal(expected, logits(base))
    mine = peft_model.load(experts(name), folder, say=silent).eval()
    assert any(isinstance(m, LoRAExperts) for m in mine.modules())
    assert_same_logits(base, logits(mine), expected)
    peft_model.save(mine, tmp_path / "mine")
    one, other = (peft_folder.read(tmp_path / f) for f in ("theirs", "mine"))
    assert_same_tensors(one.tensors, other.tensors)
    again = peers.reloaded(base, tmp_path / "mine")
    assert torch.equal(logits(again), expected)
    assert_same_logits(base, logits(inject.merge(mine)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_minipeft_trained_is_loaded_by_peft_and_by_minipeft(name, tmp_path):
    model = inject.inject(
        experts(name), LoRAConfig(3, 7, rank_stabilized=True), ["experts", "v_proj"]
    )
    torch.manual_seed(3)
    for parameter in inject.trainable_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save(model, tmp_path / "adapter")
    expected = logits(model)
    again = peers.reloaded(experts(name), tmp_path / "adapter")
    assert_same_logits(model, logits(again), expected)
    mine = peft_model.load(experts(name), tmp_path / "adapter", say=silent)
    assert torch.equal(logits(mine), expected)


def test_the_layout_is_expert_major_in_A_and_expert_minor_in_B():
    A = torch.arange(24.0).reshape(2, 3, 4)  # two experts, rank 3, four inputs
    B = torch.arange(30.0).reshape(2, 5, 3)
    a, b = peft_experts.turned_to_file(A, B)
    assert torch.equal(a[3], A[1, 0])
    assert torch.equal(b[:, 1], B[1, :, 0])
    assert torch.equal(b[:, 2], B[0, :, 1])
    back = peft_experts.turned_from_file(a, b, 2)
    assert torch.equal(back[0], A)
    assert torch.equal(back[1], B)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_parameters": ["experts.down_proj"]}, "names down_proj of"),
        ({"target_parameters": []}, "names no stack of"),
        ({"target_parameters": "experts.down_proj"}, "must be a list of names"),
        ({"r": 3}, r"has rank 4 in the file and 3"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_stacks_that_the_settings_do_not_name_are_refused(change, words, tmp_path):
    name = "Qwen3MoeForCausalLM"
    settings = {"target_parameters": BOTH, "target_modules": []}
    theirs = peers.trained(experts(name), peers.lora(**settings))
    contents = peft_folder.read(peers.saved(theirs, tmp_path / "theirs"))
    changed = peft_folder.Contents({**contents.config, **change}, contents.tensors)
    peft_folder.write(tmp_path / "changed", changed)
    model = experts(name)
    with pytest.raises(InputError, match=words) as refusal:
        peft_model.load(model, tmp_path / "changed", say=silent)
    assert "\n" not in str(refusal.value)
    assert not inject.adapted(model)


def test_experts_of_another_model_are_refused(tmp_path):
    settings = {"target_parameters": BOTH, "target_modules": []}
    theirs = peers.trained(experts("MixtralForCausalLM"), peers.lora(**settings))
    folder = peers.saved(theirs, tmp_path / "theirs")
    model = experts("Qwen3MoeForCausalLM")
    with pytest.raises(InputError, match=r"shape"):
        peft_model.load(model, folder, say=silent)
    assert not inject.adapted(model)
