"""FSDP2 and DDP over two processes: the values and checkpoints of one process."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from minipeft.errors import InputError
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from minipeft.torch.sharding import (
    ByteLinear,
    replicate,
    resume,
    save,
    shard,
    shardable,
)
from tests.operands import annotations_off
from tests.properties import over_processes as program
from tests.tolerance import assert_within, gamma

cases = pytest.mark.parametrize(
    ("way", "bits"), program.CASES, ids=[f"{w}-{b}" for w, b in program.CASES]
)
EVERY = range(program.ROWS)


def trained(bits):
    """Train in this process alone."""
    model = program.network(bits)
    optimizer = program.adamw(model)
    program.train(model, optimizer, range(program.STEPS), EVERY)
    return model, optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with results of one process, and of two that continued it."""
    folder = tmp_path_factory.mktemp("processes")
    for bits in {bits for _, bits in program.CASES}:
        save(folder / f"one-{bits}", *trained(bits), program.STEPS)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.properties.over_processes", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def found(folder, way, bits):
    return torch.load(folder / f"found-{way}-{bits}.pt")


def assert_same_pass(two, model, step):
    """Compare a pass of two processes with that of one.

    A row's loss has the same bits; a gradient is the same sum in another order. It adds
    up the gradients of n rows: n - 1 additions, a division by n and a division by the
    number of processes, each rounded, on both sides.
    """
    losses, gradients = two
    parameters = trainable_parameters(model)
    sizes = [torch.zeros_like(p) for p in parameters]
    for row in EVERY:
        model.zero_grad()
        program.losses(model, step, [row])
        sizes = [s + p.grad.abs() for s, p in zip(sizes, parameters, strict=True)]
    model.zero_grad()
    assert torch.equal(losses, program.losses(model, step, EVERY))
    allowed = 2 * gamma(program.ROWS + 2)
    for ours, p, size in zip(gradients, parameters, sizes, strict=True):
        assert p.grad.abs().max() > 0
        assert_within(ours.numpy(), p.grad.numpy(), allowed * size.double().numpy())


@pytest.mark.slow
@cases
def test_two_processes_have_the_losses_and_gradients_of_one(folder, way, bits):
    two, model = found(folder, way, bits), program.network(bits)
    assert_same_pass(two["first pass"], model, 0)
    assert len(trainable_parameters(model)) == (4 if bits == "experts" else 8)


@pytest.mark.slow
@cases
def test_one_process_loads_whole_what_two_saved_and_goes_on_as_they_do(
    folder, way, bits
):
    two, (model, optimizer) = found(folder, way, bits), trained(bits)
    with torch.no_grad():
        for p in trainable_parameters(model):
            p.zero_()
    step = resume(folder / f"two-{way}-{bits}", model, optimizer)
    assert step == program.STEPS
    for p, other in zip(
        trainable_parameters(model), two["trained"].values(), strict=True
    ):
        assert torch.equal(p, other)
    for one, other in zip(
        program.moments(model, optimizer), two["moments"], strict=True
    ):
        assert torch.equal(one, other)
    assert_same_pass(two["next pass"], model, step)


@pytest.mark.slow
@cases
def test_two_processes_go_on_from_what_one_saved_as_it_does(folder, way, bits):
    two, (model, optimizer) = found(folder, way, bits), trained(bits)
    assert two["step"] == program.STEPS
    parameters = trainable_parameters(model)
    for p, other in zip(parameters, two["resumed"].values(), strict=True):
        assert torch.equal(p, other)
    own = program.moments(model, optimizer)
    for one, other in zip(own, two["resumed moments"], strict=True):
        assert torch.equal(one, other)
    assert_same_pass(two["resumed pass"], model, two["step"])


@pytest.mark.slow
@cases
def test_a_shard_is_half_of_the_model_and_a_replica_all_of_it(folder, way, bits):
    """A shard is half of the bytes, with the first axis rounded up to an even size."""
    parameters = [*program.network(bits).parameters()]
    whole = sum(p.nbytes for p in parameters)
    spare = sum(p.nbytes // max(1, len(p)) for p in parameters)
    local = found(folder, way, bits)["local"]
    if way == "shard":
        assert whole / 2 <= local <= whole / 2 + spare
    else:
        assert local == whole


@pytest.mark.parametrize("nested", [None, 8])
def test_bytes_hold_the_same_weight_and_are_not_cast(nested):
    layer = QuantizedLinear.from_linear(nn.Linear(24, 5), nested_blocksize=nested)
    model = shardable(nn.Sequential(layer))
    x = torch.randn(3, 24)
    assert type(model[0]) is ByteLinear
    assert torch.equal(model(x), layer(x))
    assert {p.dtype for n, p in model.named_parameters() if "bytes" in n} == {
        torch.uint8
    }
    cast = model.bfloat16()[0]
    assert torch.equal(cast.dequantize(torch.float32), layer.dequantize(torch.float32))
    assert cast.dtype == torch.bfloat16


def test_what_cannot_be_sharded_is_refused():
    with pytest.raises(InputError, match="no layer is quantized"):
        shardable(nn.Sequential(nn.Linear(4, 4)))
    model = quantize_linears(nn.Sequential(nn.Linear(64, 4)))
    with pytest.raises(InputError, match=r"call shardable\(model\) before inject"):
        shard(model)
    with pytest.raises(InputError, match="0 has adapters"):
        shardable(inject(model, LoRAConfig(2, 4.0), ["0"]))
    with pytest.raises(InputError, match="there is no process group; start the proc"):
        replicate(model)
    for act in (shardable, shard, replicate):
        with (
            annotations_off(),
            pytest.raises(InputError, match=r"^model is of type str"),
        ):
            act("tiny")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = trained(32)
    with pytest.raises(InputError, match="holds no checkpoint"):
        resume(tmp_path / "none", model, optimizer)
    save(tmp_path / "one", model, optimizer, 1)
    for r, targets, reason in (
        (4, ["up", "down"], "Size mismatch"),
        (3, ["up", "down", "head"], "Missing key .* model.head"),
        (3, ["up"], "it holds model.blocks.0.down.adapters.default.A, and 3 more"),
    ):
        other = inject(program.Network(), LoRAConfig(r, 8.0), targets)
        before = [p.detach().clone() for p in trainable_parameters(other)]
        with pytest.raises(InputError, match=reason):
            resume(tmp_path / "one", other, program.adamw(other))
        for p, old in zip(trainable_parameters(other), before, strict=True):
            assert torch.equal(p, old)


@pytest.mark.parametrize("refused", [False, True])
def test_a_checkpoint_before_the_first_step_changes_no_training(refused, tmp_path):
    results = []
    for touched in (False, True):
        model = program.network(32)
        optimizer = program.adamw(model)
        if touched and refused:
            other = inject(program.Network(), LoRAConfig(2, 8.0), ["up"])
            save(tmp_path / "other", other, program.adamw(other), 0)
            with pytest.raises(InputError, match="does not fit"):
                resume(tmp_path / "other", model, optimizer)
        elif touched:
            save(tmp_path / "zero", model, optimizer, 0)
        program.train(model, optimizer, range(program.STEPS), EVERY)
        results.append([p.detach().clone() for p in trainable_parameters(model)])
    for own, other in zip(*results, strict=True):
        assert torch.equal(own, other)


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """The parts are written, and the list of them is not: as if a process had died."""
    model, optimizer = trained("32")
    first = [p.detach().clone() for p in trainable_parameters(model)]
    save(tmp_path, model, optimizer, program.STEPS)

    def died(*_, **__):
        raise OSError("cut off")

    program.train(model, optimizer, range(2), EVERY)
    with monkeypatch.context() as patched:
        patched.setattr(FileSystemWriter, "finish", died)
        with pytest.raises(CheckpointException, match="cut off"):
            save(tmp_path, model, optimizer, program.STEPS + 2)
    assert resume(tmp_path, model, optimizer) == program.STEPS
    for p, before in zip(trainable_parameters(model), first, strict=True):
        assert torch.equal(p, before)


def test_a_save_that_is_cut_off_at_its_last_write_leaves_the_one_before(
    tmp_path, monkeypatch
):
    """The list of the parts is written too, but does not have its name yet."""
    model, optimizer = trained("32")
    save(tmp_path, model, optimizer, 1)

    def died(*_, **__):
        raise OSError("cut off")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", died)
        patched.setattr(Path, "replace", died)
        with pytest.raises(CheckpointException, match="cut off"):
            save(tmp_path, model, optimizer, 2)
    assert resume(tmp_path, model, optimizer) == 1


def test_a_second_save_takes_the_place_of_the_first(tmp_path):
    model, optimizer = trained("32")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, model, optimizer, 1)
    files = len([*tmp_path.iterdir()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, model, optimizer, 2)
    assert len([*tmp_path.iterdir()]) == files
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert resume(tmp_path, model, optimizer) == 2
