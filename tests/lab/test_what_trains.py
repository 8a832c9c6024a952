"""A run whose steps would reach nothing is refused before its first, with the cause."""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab.text import windows
from minipeft.lab.train import TrainConfig, train
from minipeft.torch.adamw import AdamW
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import (
    adapted,
    adapters_of,
    inject,
    merge,
    trainable_parameters,
    unmerge,
)
from minipeft.torch.paged import PagedAdamW
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
from tests.properties.test_torch_programs import MERGE, ROWS

BATCHES = windows(torch.arange(400) * 7 % 29 + 2, (4, 12), bos=1, seed=3)
SETTINGS = TrainConfig(1)
PLACEHOLDER = r"(P|\S*\.adapters\.default\.\S+) is a placeholder on the device meta"
VIRTUAL = {
    "prefix": lambda model: PrefixModel(model, PrefixConfig(3)),
    "prompt": lambda model: PromptModel(model, PromptConfig(3)),
}


def changed(toy, row):
    if row in VIRTUAL:  # tied weights stay out of their state dict
        toy.lm_head.weight = torch.nn.Parameter(toy.lm_head.weight.detach().clone())
        return VIRTUAL[row](toy)
    if "bits" in row:
        quantize_linears(toy, blocksize=8)
    config = IA3Config(["up_proj"]) if row == "ia3" else ROWS[row]
    return inject(toy, config, ["up_proj"])


def offloaded(model):
    """Offload the whole model, as accelerate does it."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    return accelerate.cpu_offload(model, "cpu")


def in_part_on_disk(model, folder):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    places = dict.fromkeys((n for n, _ in model.named_children()), "cpu")
    last = max(n for n, p in model.named_parameters() if p.requires_grad)
    places[last.partition(".")[0]] = "disk"
    return accelerate.dispatch_model(model, places, "cpu", offload_dir=folder)


@pytest.mark.parametrize("row", [*ROWS, *VIRTUAL])
def test_what_is_offloaded_since_is_refused_by_name_and_trains_when_back(toy, row):
    hooks = pytest.importorskip("accelerate", reason="needs accelerate").hooks
    model = offloaded(changed(toy, row))
    for optimizer in (AdamW, PagedAdamW):
        given = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        with pytest.raises(InputError, match=f"^{PLACEHOLDER}"):
            optimizer(given)
    with pytest.raises(InputError, match=r"^\S+ is offloaded: what is here is a place"):
        trainable_parameters(model)
    calls = []
    with pytest.raises(InputError, match=f"^{PLACEHOLDER}"):
        train(model, lambda step: calls.append(step), SETTINGS)
    assert not calls
    hooks.remove_hook_from_submodules(model)
    before = [p.detach().clone() for p in trainable_parameters(model)]
    train(model, BATCHES, SETTINGS)
    pairs = zip(trainable_parameters(model), before, strict=True)
    assert any(not torch.equal(now, then) for now, then in pairs)


def test_a_part_on_disk_is_enough(toy, tmp_path):
    model = in_part_on_disk(changed(toy, "lora"), str(tmp_path))
    with pytest.raises(InputError, match=f"^{PLACEHOLDER}"):
        train(model, BATCHES, SETTINGS)


@pytest.mark.parametrize("row", MERGE)
def test_a_merged_layer_is_refused_by_name(toy, row):
    model = merge(changed(toy, row))
    first = next(iter(adapted(model)))
    with pytest.raises(
        InputError, match=rf"^{first} is merged: it computes with one weight"
    ):
        train(model, BATCHES, SETTINGS)
    train(unmerge(model), BATCHES, SETTINGS)


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("remedy", ["unmerge", "freeze"])
def test_beside_a_merged_adapter_what_else_is_trained_has_two_remedies(
    toy, remedy, name
):
    model = merge(inject(toy, ROWS["lora"], ["up_proj"], name=name))
    head = model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    before = head.detach().clone()
    with pytest.raises(InputError, match=r"unmerge\(model\) first, or, ") as said:
        train(model, BATCHES, SETTINGS)
    if remedy == "unmerge":
        unmerge(model)
    else:  # as the message says
        line = str(said.value).partition("freeze them: ")[2]
        exec(line, {"adapters_of": adapters_of, "model": model})
    train(model, BATCHES, SETTINGS)
    assert not torch.equal(head, before)


def test_a_merged_layer_that_is_frozen_leaves_others_to_train(toy):
    model = merge(changed(toy, "lora"))
    model.requires_grad_(False)
    inject(model, ROWS["lora"], ["down_proj"])
    train(model, BATCHES, SETTINGS)
