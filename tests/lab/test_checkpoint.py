"""A checkpoint is complete and fits, or it is refused by name."""

import copy
import errno
import inspect
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.interop.tensors import bytes_of
from minipeft.lab import checkpoint as checkpoints
from minipeft.lab import files, generators
from minipeft.lab.checkpoint import (
    Progress,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    trainable,
)
from minipeft.lab.text import windows
from minipeft.lab.train import Checkpoint, TrainConfig, train
from minipeft.torch.adamw import AdamW
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.pissa import PiSSAConfig, Sketch
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.vera import VeRAConfig
from tests.operands import annotations_off

BATCHES = windows(torch.arange(400) * 7 % 29 + 2, (4, 12), bos=1, seed=3)


def freeze_all_but(model, part):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def tensors_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def saved(model, path):
    train(model, BATCHES, TrainConfig(2, lr=1e-2), (), Checkpoint(path))
    return path.read_bytes()


def assert_refused(model, path, sentence):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=sentence) as caught:
        load_checkpoint(path, model)
    assert str(caught.value).count("\n") == 0
    assert str(path) in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_it_holds_adapters_only(toy, tmp_path):
    freeze_all_but(toy, "q_proj")
    path = tmp_path / "run.safetensors"
    saved(toy, path)
    names = [n for n in tensors_of(path) if n.startswith(("parameter/", "buffer/"))]
    assert names == [f"parameter/{n}" for n in sorted(trainable(toy))]


def test_the_fingerprint_is_of_the_base_alone(toy):
    freeze_all_but(toy, "q_proj")
    before = fingerprint(toy)
    with torch.no_grad():
        toy.model.layers[0].self_attn.q_proj.weight.add_(1)
    assert fingerprint(toy) == before
    toy.train()
    toy.config.use_cache = False
    assert fingerprint(toy) == before
    with torch.no_grad():
        toy.model.layers[1].mlp.up_proj.weight[0, 0].add_(1)
    assert fingerprint(toy) != before


def generator():
    return torch.Generator().manual_seed(1)


def adapted(toy, config, change=None):
    model = copy.deepcopy(toy)
    if change:
        change(model)
    return inject(model, config, ["q_proj"], generator=generator())


def four_bits(seed):
    def change(model):
        torch.manual_seed(seed)
        nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.02)
        quantize_linears(model, blocksize=32)

    return change


OTHERS = {
    "another 4-bit base": (
        (LoRAConfig(2, 4), four_bits(0)),
        (LoRAConfig(2, 4), four_bits(1)),
        r"up_proj\S* has other values",
    ),
    "alpha": (
        (LoRAConfig(2, 4), None),
        (LoRAConfig(2, 64), None),
        r"scaling of the module .*q_proj\S* was 2.0 and is 32.0",
    ),
    "dropout": (
        (LoRAConfig(2, 4), None),
        (LoRAConfig(2, 4, dropout=0.5), None),
        r"dropout of the module \S*q_proj",
    ),
    "rank": (
        (LoRAConfig(2, 4), None),
        (LoRAConfig(4, 8), None),
        r"shape of the trained parameter \S*q_proj\S*A was \[2, 16\] and is \[4, 16\]",
    ),
    "VeRA's seed": (
        (VeRAConfig(4, seed=0), None),
        (VeRAConfig(4, seed=1), None),
        "has other values",
    ),
    "PiSSA's sketch": (
        (PiSSAConfig(2, 4), None),
        (PiSSAConfig(2, 4, sketch=Sketch(seed=9, iterations=0)), None),
        "has other values|does not fit",
    ),
    "method": (
        (LoRAConfig(2, 4), None),
        (IA3Config(), None),
        "does not fit: ",
    ),
    "configuration": (
        (LoRAConfig(2, 4), None),
        (LoRAConfig(2, 4), lambda model: setattr(model.config, "rms_norm_eps", 1.0)),
        "rms_norm_eps of the configuration",
    ),
    "constant": (
        (LoRAConfig(2, 4), None),
        (
            LoRAConfig(2, 4),
            lambda m: setattr(m.model.norm, "variance_epsilon", 1.0),
        ),
        r"variance_epsilon of the module model\.norm was 1e-06 and is 1.0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_by_name(toy, tmp_path, name):
    (config, change), (other, other_change), sentence = OTHERS[name]
    path = tmp_path / "run.safetensors"
    model = adapted(toy, config, change)
    optimizer = AdamW(trainable_parameters(model))
    save_checkpoint(path, model, optimizer, Progress(1))
    load_checkpoint(path, adapted(toy, config, change))
    assert_refused(adapted(toy, other, other_change), path, sentence)


class Normed(nn.Module):
    """Running statistics, and a buffer that each forward pass increases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, labels):
        self.calls += self.training

        class Out:
            loss = (self.norm(self.linear(x)) - labels).square().mean()

        return Out()


def test_running_statistics_are_state(tmp_path):
    path = tmp_path / "run.safetensors"

    def batch(step):
        values = torch.Generator().manual_seed(step)
        return {"x": torch.randn(5, 4, generator=values), "labels": torch.zeros(5, 4)}

    whole, first, second = Normed(), Normed(), Normed()
    train(whole, batch, TrainConfig(6, lr=0.1))

    def until_three(step):
        if step == 3:
            raise RuntimeError("power cut")
        return batch(step)

    checkpoint = Checkpoint(path, every=1)
    with pytest.raises(RuntimeError, match="power cut"):
        train(first, until_three, TrainConfig(6, lr=0.1), (), checkpoint)
    train(second, batch, TrainConfig(6, lr=0.1), (), Checkpoint(path, resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert int(second.calls) == 6


@pytest.mark.parametrize(
    "part",
    [
        torch.arange(6.0).reshape(2, 3)[:1, 1],
        torch.full((1, 1), 2.0)[:, 0].expand(1),
        torch.empty(0, 3)[:, 1],
    ],
    ids=["of a column", "expanded", "empty"],
)
def test_a_part_of_one_value_may_lie_anyhow_in_memory(tmp_path, part):
    model, optimizer = small()
    model.register_buffer("part", part)
    step(model, optimizer)
    path = tmp_path / "run.safetensors"
    save_checkpoint(path, model, optimizer, Progress(1))
    assert bytes_of(part) == bytes_of(part.clone(memory_format=torch.contiguous_format))
    load_checkpoint(path, model, optimizer)
    model.part = part + 1
    if part.numel():
        with pytest.raises(InputError, match="part"):
            load_checkpoint(path, model, optimizer)


def test_every_generator_goes_on_where_it_was(tmp_path):
    path, model = tmp_path / "run.safetensors", nn.Linear(2, 2)
    model.drawing = torch.Generator().manual_seed(4)
    optimizer = torch.optim.AdamW(model.parameters())
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002

    def draws():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),  # noqa: NPY002
            np.random.rand(),  # noqa: NPY002
            float(torch.rand(())),
            float(torch.rand((), generator=model.drawing)),
        )

    save_checkpoint(path, model, optimizer, Progress(1))
    expected = draws()
    draws()
    load_checkpoint(path, model, optimizer)
    assert draws() == expected


def test_a_generator_of_a_device_is_kept_and_missed(tmp_path, monkeypatch):
    """The device is pretended, with the functions of torch.cuda."""

    class Module:
        state = torch.arange(16, dtype=torch.uint8)

        def get_rng_state(self, device):
            return self.state

        def set_rng_state(self, state, device):
            self.state = state

    path, model, module = tmp_path / "run.safetensors", nn.Linear(2, 2), Module()
    optimizer = torch.optim.AdamW(model.parameters())
    with monkeypatch.context() as patched:
        patched.setattr(generators, "_devices", lambda model: [("cuda:0", module)])
        save_checkpoint(path, model, optimizer, Progress(1))
        module.state = module.state + 1
        load_checkpoint(path, model, optimizer)
        assert torch.equal(module.state, Module.state)
    with pytest.raises(InputError, match="the generator torch/cuda:0, which is not"):
        load_checkpoint(path, model, optimizer)


def test_the_generators_of_a_model_s_devices_are_found(monkeypatch):
    """Parameters on the meta device; its functions have the arguments of CUDA's."""
    asked = []

    def get_rng_state(*given):
        asked.append(inspect.signature(torch.cuda.get_rng_state).bind(*given).args)
        return torch.arange(16, dtype=torch.uint8)

    def set_rng_state(*given):
        asked.append(inspect.signature(torch.cuda.set_rng_state).bind(*given).args[1:])

    functions = SimpleNamespace(
        get_rng_state=get_rng_state, set_rng_state=set_rng_state
    )
    kinds = {"meta": functions}
    monkeypatch.setattr(torch, "get_device_module", lambda kind: kinds[kind])
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    saved = generators.states(model)
    assert torch.equal(saved["torch/meta"], torch.arange(16, dtype=torch.uint8))
    generators.check(saved, model)
    generators.restore(saved, model)
    assert asked == [("meta",)] * 3
    del saved["torch/meta"]
    with pytest.raises(InputError, match="lacks the state of the generator torch/meta"):
        generators.check(saved, model)


def small():
    torch.manual_seed(0)
    model = inject(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(2, 4), ["0"])
    optimizer = AdamW(trainable_parameters(model))
    return model, optimizer


def step(model, optimizer, value=1.0):
    for parameter in trainable_parameters(model):
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


def test_an_absent_checkpoint_is_refused(toy, tmp_path):
    assert_refused(toy, tmp_path / "none.safetensors", "there is no checkpoint")


def test_a_path_of_another_type_is_refused():
    with annotations_off():
        for use in (
            load_checkpoint,
            lambda path, *rest: save_checkpoint(path, *rest, 1),
        ):
            with pytest.raises(InputError, match="path is of type int; give one of"):
                use(3, small()[0], small()[1])


def test_other_files_and_versions_are_refused(toy, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    assert_refused(toy, path, "not a checkpoint of this program")
    path.unlink()
    monkeypatch.setattr(checkpoints, "VERSION", 3)
    saved(toy, path)
    monkeypatch.undo()
    assert_refused(toy, path, r"not a checkpoint of this program .* version 2")


class Reversed(torch.optim.AdamW):
    """AdamW under another name."""


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (torch.optim.AdamW, Reversed, "its optimizer was .*AdamW and is .*Reversed"),
        (torch.optim.AdamW, AdamW, "its optimizer was torch.* and is minipeft"),
        (
            lambda p: torch.optim.AdamW(p),
            lambda p: torch.optim.AdamW(p[::-1]),
            "the parameters in another order",
        ),
        (
            lambda p: torch.optim.AdamW(p),
            lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:]}]),
            "had 1 parameter groups and has 2",
        ),
        (
            lambda p: AdamW(p, bits=8),
            lambda p: AdamW(p, bits=32),
            "bits of its optimizer was 8 and is 32",
        ),
        (
            lambda p: torch.optim.AdamW(p, amsgrad=True),
            lambda p: torch.optim.AdamW(p),
            "amsgrad of its optimizer was True and is False",
        ),
    ],
)
def test_another_optimizer_is_refused_by_name(tmp_path, first, second, sentence):
    path, model = tmp_path / "run.safetensors", nn.Linear(3, 2)
    optimizer = first(list(model.parameters()))
    step(model, optimizer)
    save_checkpoint(path, model, optimizer, Progress(1))
    step(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(path, model, second(list(model.parameters())))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("spoil", ["parameter", "state"])
def test_what_is_not_finite_is_never_saved(tmp_path, spoil):
    path = tmp_path / "run.safetensors"
    model, optimizer = small()
    step(model, optimizer)
    save_checkpoint(path, model, optimizer, Progress(3))
    before = path.read_bytes()
    with torch.no_grad():
        if spoil == "parameter":
            trainable_parameters(model)[0][0, 0] = float("nan")
        else:
            optimizer.state[trainable_parameters(model)[0]]["m"][0, 0] = float("inf")
    with pytest.raises(InputError, match=r"is not finite, so .* last good"):
        save_checkpoint(path, model, optimizer, Progress(4))
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_checkpoint_before(toy, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    before = saved(toy, path)

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    optimizer = torch.optim.AdamW(toy.parameters())
    with pytest.raises(InputError, match="No space left"):
        save_checkpoint(path, toy, optimizer, Progress(3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
