import copy
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors
import safetensors.torch
import torch

from minipeft.errors import InputError
from minipeft.lab import checkpoint as checkpoints
from minipeft.lab import files
from minipeft.lab.checkpoint import (
    Progress,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    trainable,
)
from minipeft.lab.text import consecutive, windows
from minipeft.lab.train import Checkpoint, History, TrainConfig, loss, predicted, train

TEXT = torch.arange(400) * 7 % 29 + 2
BATCHES = windows(TEXT, (4, 12), bos=1, seed=3)
VALIDATION = consecutive(TEXT, (4, 12), bos=1)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def freeze_all_but(model, part):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    return model


def test_it_learns(toy):
    before = loss(toy, VALIDATION)
    history = train(toy, BATCHES, TrainConfig(60, lr=1e-2), VALIDATION)
    assert history.validation == [(60, loss(toy, VALIDATION))]
    assert history.validation[-1][1] < before / 2
    assert len(history.losses) == 60
    assert not toy.training


def test_progress_goes_to_stderr(toy, capsys):
    train(toy, BATCHES, TrainConfig(20), VALIDATION)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 10
    assert re.fullmatch(
        r"step 20/20  loss \d\.\d{3}  .*ms/step  0 s left", err.splitlines()[-1]
    )


def test_the_same_seed_gives_the_same_bits(toy):
    other = copy.deepcopy(toy)
    config = TrainConfig(8, lr=1e-2, warmup=3, weight_decay=0.1)
    first = train(toy, BATCHES, config)
    second = train(other, BATCHES, config)
    assert first.losses == second.losses
    assert_same(weights(toy), weights(other))
    third = train(other, windows(TEXT, (4, 12), bos=1, seed=4), config)
    assert third.losses != first.losses


def test_only_what_requires_gradients_moves(toy):
    freeze_all_but(toy, "q_proj")
    before = weights(toy)
    train(toy, BATCHES, TrainConfig(2, lr=1e-2, weight_decay=0.1))
    moved = {n for n, w in weights(toy).items() if not torch.equal(w, before[n])}
    assert moved == {n for n in before if "q_proj" in n}


def test_nothing_to_train_is_said(toy):
    freeze_all_but(toy, "no such part")
    with pytest.raises(InputError, match="no parameter requires gradients"):
        train(toy, BATCHES, TrainConfig(1))


def test_schedule_warms_up_then_falls_to_the_floor():
    config = TrainConfig(110, warmup=10, floor=0.25)
    assert config.factor(0) == 0.1
    assert config.factor(9) == config.factor(10) == 1.0
    assert config.factor(60) == 0.625  # half-way: the mean of 1 and the floor
    assert config.factor(110) == 0.25
    falling = [config.factor(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"steps": 0}, "steps is 0"), ({"steps": 1, "lr": 0.0}, "learning rate is 0.0")],
)
def test_bad_settings_are_refused(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainConfig(**fields)


def test_gradient_is_clipped_to_the_norm(toy):
    norms = []

    def spying(model, config):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = optimizer.step

        def spy(*arguments):
            gradients = [p.grad.flatten() for p in model.parameters()]
            norms.append(float(torch.cat(gradients).norm()))
            return step(*arguments)

        optimizer.step = spy
        return optimizer

    train(toy, BATCHES, TrainConfig(3, clip=0.125, optimizer=spying))
    assert all(0 < norm <= 0.125 for norm in norms)


def test_loss_is_the_mean_over_predicted_labels(toy):
    short = {k: v[:1, :5] for k, v in VALIDATION[0].items()}
    toy.eval()
    with torch.no_grad():
        parts = [float(toy(**batch).loss) for batch in (VALIDATION[1], short)]
    counts = [predicted(VALIDATION[1]["labels"]), predicted(short["labels"])]
    assert counts == [44, 4]
    expected = (parts[0] * 44 + parts[1] * 4) / 48
    assert loss(toy, [VALIDATION[1], short]) == expected
    with pytest.raises(InputError, match="no label"):
        loss(toy, [])


def test_a_loss_that_is_not_finite_stops_with_the_last_good_weights(toy):
    good = weights(toy)

    def poisoned(step):
        with torch.no_grad():
            toy.model.norm.weight.fill_(float("nan"))
        return BATCHES(step)

    with pytest.raises(InputError, match=r"the loss became nan at step 1; lower"):
        train(toy, poisoned, TrainConfig(3))
    del good["model.norm.weight"]
    now = weights(toy)
    del now["model.norm.weight"]
    assert_same(now, good)


@pytest.mark.parametrize("part", ["", "q_proj"])
def test_resuming_is_as_if_never_stopped(toy, tmp_path, part):
    toy.config.attention_dropout = 0.1
    for layer in toy.model.layers:
        layer.self_attn.attention_dropout = 0.1  # so that random state matters
    freeze_all_but(toy, part)
    other = copy.deepcopy(toy)
    config = TrainConfig(9, lr=1e-2, warmup=2, validate_every=3)
    torch.manual_seed(1)
    whole = train(toy, BATCHES, config, VALIDATION)

    path = tmp_path / "run.safetensors"

    def until_five(step):
        if step == 5:
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


def saved(model, path):
    config = TrainConfig(2, lr=1e-2)
    train(model, BATCHES, config, (), Checkpoint(path))
    return path.read_bytes()


def test_checkpoint_holds_adapters_only(toy, tmp_path):
    freeze_all_but(toy, "q_proj")
    path = tmp_path / "run.safetensors"
    saved(toy, path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["minipeft"])
        names = [n for n in file.keys() if n.startswith("parameter/")]  # noqa: SIM118
    assert header["format"] == "minipeft-checkpoint"
    assert header["version"] == 1
    assert header["fingerprint"] == fingerprint(toy)
    assert names == [f"parameter/{n}" for n in sorted(trainable(toy))]


def test_fingerprint_is_of_the_base_alone(toy):
    freeze_all_but(toy, "q_proj")
    before = fingerprint(toy)
    with torch.no_grad():
        toy.model.layers[0].self_attn.q_proj.weight.add_(1)
    assert fingerprint(toy) == before
    with torch.no_grad():
        toy.model.layers[1].mlp.up_proj.weight[0, 0].add_(1)
    assert fingerprint(toy) != before


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_checkpoint_is_refused(toy, tmp_path, keep):
    path = tmp_path / "run.safetensors"
    data = saved(toy, path)
    path.write_bytes(data[:keep])
    assert_refused(toy, path, "damaged or not a checkpoint")


def test_an_absent_checkpoint_is_refused(toy, tmp_path):
    assert_refused(toy, tmp_path / "none.safetensors", "there is no checkpoint")


def test_other_files_and_versions_are_refused(toy, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    assert_refused(toy, path, "not a checkpoint of this program")
    monkeypatch.setattr(checkpoints, "VERSION", 2)
    saved(toy, path)
    monkeypatch.undo()
    assert_refused(toy, path, r"not a checkpoint of this program .* version 1")


def test_a_checkpoint_of_another_base_or_adapter_is_refused(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    freeze_all_but(toy, "q_proj")
    saved(toy, path)
    freeze_all_but(toy, "o_proj")
    assert_refused(toy, path, "another base model or other adapters")
    freeze_all_but(toy, "q_proj")
    with torch.no_grad():
        toy.model.norm.weight[0].add_(1)
    assert_refused(toy, path, "another base model or other adapters")


def test_a_checkpoint_that_lacks_a_parameter_is_refused(toy, tmp_path):
    path = tmp_path / "run.safetensors"
    saved(toy, path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["parameter/model.norm.weight"]
    path.write_bytes(safetensors.torch.save(tensors, metadata=header))
    assert_refused(toy, path, "another base model or other adapters")


def assert_refused(model, path, sentence):
    before = weights(model)
    with pytest.raises(InputError, match=sentence) as caught:
        load_checkpoint(path, model)
    assert str(caught.value).count("\n") == 0
    assert str(path) in str(caught.value)
    assert_same(weights(model), before)


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


def test_history_goes_through_a_file(tmp_path):
    history = History([1.5, 0.25], [(2, 0.125)], 3.5)
    history.save(tmp_path / "loss_curve.json")
    assert History.load(tmp_path / "loss_curve.json") == history
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json is not a loss curve"):
        History.load(tmp_path / "bad.json")


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
    steps = 4 + out.count("step ")  # the step in hand was finished
    assert last == f"stopped after step {steps} of 10000; continue from {path}"
    assert "Traceback" not in err
    with safetensors.safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["minipeft"])["progress"]
    assert progress["step"] == len(progress["losses"]) == steps
    assert list(tmp_path.iterdir()) == [path]
