"""A run that is interrupted anywhere continues with the values of an unbroken run."""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from minipeft.errors import InputError
from minipeft.lab.checkpoint import load_checkpoint
from minipeft.lab.text import windows
from minipeft.lab.train import (
    Checkpoint,
    Interrupted,
    ResumeWarning,
    TrainConfig,
    train,
)
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging
from tests.lab.test_train import (
    BATCHES,
    TEXT,
    VALIDATION,
    assert_same,
    freeze_all_but,
    settings,
    weights,
)
from tests.operands import annotations_off

pytestmark = pytest.mark.slow


def torch_adamw(model, config):
    return torch.optim.AdamW(trainable_of(model), lr=config.lr, weight_decay=0.1)


def ours(bits):
    def build(model, config):
        return AdamW(trainable_of(model), lr=config.lr, bits=bits)

    return build


def paged(model, config):
    return PagedAdamW(trainable_of(model), lr=config.lr, paging=Paging(budget=2**12))


def trainable_of(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("optimizer", "accumulate"),
    [(torch_adamw, 1), (torch_adamw, 3), (ours(32), 1), (ours(8), 2), (paged, 1)],
)
@pytest.mark.parametrize("part", ["", "q_proj"])
def test_resuming_is_as_if_never_stopped(toy, tmp_path, part, optimizer, accumulate):
    toy.config.attention_dropout = 0.1
    for layer in toy.model.layers:
        layer.self_attn.attention_dropout = 0.1  # so that the random state matters
    freeze_all_but(toy, part)
    other = copy.deepcopy(toy)
    config = TrainConfig(
        9,
        lr=1e-2,
        warmup=2,
        validate_every=3,
        accumulate=accumulate,
        optimizer=optimizer,
    )
    torch.manual_seed(1)
    whole = train(toy, BATCHES, config, VALIDATION)

    path = tmp_path / "run.safetensors"

    def until_five(step):
        if step == 5 * accumulate:
            raise RuntimeError("power cut")
        return BATCHES(step)

    torch.manual_seed(1)
    start = copy.deepcopy(other)
    with pytest.raises(RuntimeError, match="power cut"):
        train(other, until_five, config, VALIDATION, Checkpoint(path, every=4))
    torch.manual_seed(99)
    resumed = train(
        start, BATCHES, config, VALIDATION, Checkpoint(path, every=4, resume=True)
    )
    assert resumed.losses == whole.losses
    assert resumed.validation == whole.validation
    assert_same(weights(start), weights(toy))


SCRIPT = """
    import sys, time, pathlib, torch
    from minipeft.lab.train import Checkpoint, TrainConfig, train
    from minipeft.lab.chapter import _calm
    sys.excepthook = _calm
    class Out:
        def __init__(self, loss): self.loss = loss
    class Model(torch.nn.Module):
        def __init__(self): super().__init__(); self.inner = torch.nn.Linear(2, 2)
        def forward(self, x, labels):
            return Out((self.inner(x) - labels).square().mean())
    def batches(step):
        print("step", step, flush=True)
        time.sleep(0.05)
        return {"x": torch.ones(3, 2), "labels": torch.zeros(3, 2)}
    path = pathlib.Path(sys.argv[1])
    train(Model(), batches, TrainConfig(10_000), (), Checkpoint(path, every=1000))
"""


def test_ctrl_c_keeps_the_last_complete_step(tmp_path):
    path = tmp_path / "run.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line == "step 3\n":
            break
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    last = err.strip().splitlines()[-1]
    steps = 4 + out.count("step ")  # the running step was finished
    done = f"stopped after step {steps} of 10000; continue from {path}"
    assert last == f"{done}; run the same command with --resume"
    assert "Traceback" not in err
    with safetensors.safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["minipeft"])["progress"]
    assert progress["step"] == len(progress["losses"]) == steps
    assert list(tmp_path.iterdir()) == [path]


def test_a_passing_checkpoint_is_not_offered_to_go_on_from(toy, tmp_path):
    def batches(index):
        if index == 2:
            signal.raise_signal(signal.SIGINT)
        return BATCHES(index)

    passing = Checkpoint(tmp_path / "run.safetensors", passing=True)
    sentence = "^stopped after step 3 of 9; the state of this run is not kept$"
    with pytest.raises(Interrupted, match=sentence) as caught:
        train(toy, batches, settings(toy, steps=9), (), passing)
    assert caught.value.kept is False


def test_a_run_that_goes_on_with_another_batch_size_says_so(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    train(toy, BATCHES, settings(toy, steps=2), (), Checkpoint(path))
    half = windows(TEXT, (2, 12), bos=1, seed=3)
    with pytest.warns(ResumeWarning, match="the batch size was 4 and is 2"):
        train(toy, half, settings(toy, steps=3), (), Checkpoint(path, resume=True))


def test_a_run_that_goes_on_with_other_data_says_so(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    train(toy, BATCHES, settings(toy, steps=2), (), Checkpoint(path))
    resumed = Checkpoint(path, resume=True)
    said = (
        r"the data, by SHA-256 of the first batch, was \w{12} and is \w{12}; stop it "
    )
    other = windows(TEXT, (4, 12), bos=1, seed=4)
    with pytest.warns(ResumeWarning, match=said):
        train(toy, other, settings(toy, steps=3), (), resumed)
    train(toy, other, settings(toy, steps=4), (), resumed)  # no word about the same
    half = windows(TEXT, (2, 12), bos=1, seed=4)
    with pytest.warns(ResumeWarning) as warned:
        train(toy, half, settings(toy, steps=5), (), resumed)
    assert "the data" not in str(warned[0].message)  # the batches must differ


@pytest.mark.parametrize("draw", ["torch", "python", "numpy", "seeded"])
def test_batches_that_draw_are_resumed_with_the_same_draws(toy, tmp_path, draw):
    """No look at a batch may draw: not at the first one, not for the memory."""
    drawn = {
        "torch": lambda _: int(torch.randint(9, (1,))),
        "python": lambda _: random.randrange(9),
        "numpy": lambda _: np.random.randint(9),  # noqa: NPY002
        "seeded": lambda index: int(torch.manual_seed(index).initial_seed()),
    }[draw]

    def batches(index):
        return BATCHES(drawn(index))

    for layer in toy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    path = tmp_path / "run.safetensors"

    def until_three(index):
        if index == 3:
            raise RuntimeError("power cut")
        return batches(index)

    def seeded():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        return copy.deepcopy(toy)

    config = settings(toy, steps=6)
    resumed = Checkpoint(path, resume=True)
    with annotations_off():  # the checker of annotations draws from Python's
        whole = train(unbroken := seeded(), batches, config)
        with pytest.raises(RuntimeError, match="power cut"):
            train(seeded(), until_three, config, (), Checkpoint(path, 2))
        again = train(last := seeded(), batches, config, (), resumed)  # no warning
    assert again.losses == whole.losses
    assert_same(weights(last), weights(unbroken))


def test_a_run_that_has_fewer_steps_than_its_checkpoint_is_refused(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    start = copy.deepcopy(toy)
    train(toy, BATCHES, settings(toy, steps=3), VALIDATION, Checkpoint(path))
    before = copy.deepcopy(weights(start))
    resumed = Checkpoint(path, resume=True)
    with pytest.raises(InputError, match="after step 3, and the run has 2 steps; use"):
        train(start, BATCHES, settings(start, steps=2), VALIDATION, resumed)
    assert_same(weights(start), before)
    ended = train(start, BATCHES, settings(start, steps=3), VALIDATION, resumed)
    assert [step for step, _ in ended.validation] == [3]


def test_a_second_run_on_the_same_checkpoint_is_refused(toy, tmp_path):
    path = tmp_path / "run.safetensors"

    def second(step):
        with pytest.raises(InputError, match="another process writes"):
            train(copy.deepcopy(toy), BATCHES, settings(toy), (), Checkpoint(path))
        return BATCHES(step)

    train(toy, second, settings(toy, steps=1), (), Checkpoint(path))
    again = Checkpoint(path, resume=True)  # the lock is gone with the run
    train(toy, BATCHES, settings(toy, steps=2), (), again)


def no_batches(step):
    raise AssertionError("a step was taken")


@pytest.mark.parametrize("kept", [2, 3], ids=["amid", "at its end"])
def test_a_new_run_replaces_no_checkpoint(toy, tmp_path, kept):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"")  # as `tempfile` leaves it: nothing is lost
    train(toy, BATCHES, settings(toy, steps=kept), (), Checkpoint(path))
    held, before = path.read_bytes(), copy.deepcopy(weights(toy))
    refused = (
        f"run.safetensors holds a run after step {kept}, and a new run would replace "
        "it; go on from it with resume=True, choose another path, or remove the file"
    )
    for place in (path, str(path)):
        with annotations_off(), pytest.raises(InputError, match=re.escape(refused)):
            train(toy, no_batches, settings(toy, steps=3), (), Checkpoint(place))
    assert path.read_bytes() == held
    assert_same(weights(toy), before)
    found = train(
        toy, BATCHES, settings(toy, steps=3), (), Checkpoint(path, resume=True)
    )
    assert len(found.losses) == 3


def test_a_new_run_replaces_no_other_file(toy, tmp_path):
    strangers = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, strangers)
    other = tmp_path / "other.safetensors"
    metadata = {"minipeft": json.dumps({"format": "another", "progress": {"step": 1}})}
    safetensors.torch.save_file({"w": torch.ones(2)}, other, metadata=metadata)
    text = tmp_path / "notes.txt"
    text.write_text("of value")
    deep = tmp_path / "deep.safetensors"
    metadata = {"minipeft": "[" * 200_000}
    safetensors.torch.save_file({"w": torch.ones(2)}, deep, metadata=metadata)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (strangers, other, text, tmp_path, deep, pipe, Path("/dev/null")):
        with pytest.raises(InputError, match="exists and is no checkpoint of this pro"):
            train(toy, no_batches, settings(toy), (), Checkpoint(path))
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match=r"is no regular file; start again with"):
            load_checkpoint(path, toy)
    assert text.read_text() == "of value"
    assert set(safetensors.torch.load_file(strangers)) == {"w"}


POINTS = ("batch", "forward", "backward", "step", "validate", "save")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STEPS = 8  # the signal comes in one of the first four


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("point", POINTS)
def test_a_signal_anywhere_in_a_step_keeps_whole_steps(
    toy, tmp_path, point, number, monkeypatch
):
    path = tmp_path / "run.safetensors"
    config = settings(toy, steps=STEPS, validate_every=1)
    expected = copy.deepcopy(toy)
    train(
        expected, BATCHES, settings(toy, steps=STEPS, validate_every=1), VALIDATION[:1]
    )
    seen = []

    def reached(where):
        seen.append(where)
        if where == point and seen.count(where) == 3:
            signal.raise_signal(number)

    spy_on(toy, reached, monkeypatch)

    def batches(step):
        reached("batch")
        return BATCHES(step)

    checkpoint = Checkpoint(path, every=1)
    with pytest.raises(
        Interrupted, match=rf"stopped after step \d of {STEPS}"
    ) as caught:
        train(toy, batches, config, VALIDATION[:1], checkpoint)
    assert caught.value.signal == number
    assert caught.value.code == 128 + number
    assert caught.value.kept
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    train(toy, BATCHES, config, VALIDATION[:1], Checkpoint(path, every=1, resume=True))
    assert_same(weights(toy), weights(expected))


def spy_on(model, reached, monkeypatch):
    forward, step = type(model).forward, torch.optim.AdamW.step
    save = safetensors.torch.save

    def spied_forward(self, *args, **kwargs):
        reached("forward" if self.training else "validate")
        return forward(self, *args, **kwargs)

    def spied_step(self, *args, **kwargs):
        reached("step")
        return step(self, *args, **kwargs)

    def spied_save(*args, **kwargs):
        reached("save")
        return save(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spied_forward)
    monkeypatch.setattr(torch.optim.AdamW, "step", spied_step)
    monkeypatch.setattr(safetensors.torch, "save", spied_save)
    model.model.norm.weight.register_hook(lambda grad: reached("backward"))
