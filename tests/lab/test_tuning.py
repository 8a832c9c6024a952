"""Several starts for one task, as in the chapters on prefixes and prompts."""

import copy

import pytest
import torch

from minipeft.lab import data, tuning
from minipeft.lab.task import dictionary
from minipeft.lab.train import History, loss


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 31, (4, 12), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture
def task():
    return tuning.Lesson([], batch, [batch(-1), batch(-2)])


def test_the_dictionary_is_batched_for_a_tokenizer(tiny):
    task = tuning.lesson(dictionary(), tiny.tokenizer, rows=3)
    entries = data.devils_dictionary("train")
    assert task.pairs == [(entry.prompt, entry.answer) for entry in entries]
    first = task.batches(0)
    assert first["input_ids"].shape[0] == 3
    assert first["input_ids"].shape[1] <= 64
    judged = sum(len(part["input_ids"]) for part in task.held_out)
    assert judged == len(data.devils_dictionary("validation"))
    again = tuning.lesson(dictionary(), tiny.tokenizer, rows=3).batches(0)
    assert torch.equal(again["input_ids"], first["input_ids"])


def test_a_run_tells_where_it_began_and_where_it_ended(toy, task):
    untouched = copy.deepcopy(toy)
    run = tuning.tune(toy, task, 10, lr=1e-2)
    assert run.model is toy
    assert run.before == loss(untouched, task.held_out)
    assert run.after == loss(toy, task.held_out)
    assert run.after < run.before
    assert [step for step, _ in run.history.validation] == [2, 4, 6, 8, 10]


def test_a_short_run_is_checked_at_every_step(toy, task):
    run = tuning.tune(toy, task, 3, lr=1e-3)
    assert [step for step, _ in run.history.validation] == [1, 2, 3]


def test_one_check_is_that_of_the_last_step(toy, task):
    run = tuning.tune(toy, task, 4, lr=1e-3, checks=1)
    assert [step for step, _ in run.history.validation] == [4]


def test_only_what_requires_gradients_is_trained_and_counted(toy, task):
    toy.requires_grad_(False)
    norm = toy.model.norm.weight.requires_grad_()
    frozen = toy.model.layers[0].mlp.up_proj.weight.clone()
    start = norm.detach().clone()
    run = tuning.tune(toy, task, 2, lr=1e-2)
    assert run.trained == norm.numel()
    assert torch.equal(toy.model.layers[0].mlp.up_proj.weight, frozen)
    assert not torch.equal(norm, start)


def test_the_curves_begin_at_the_start_and_show_the_base(toy, task):
    runs = {"one": tuning.tune(toy, task, 5, lr=1e-3)}
    figure = tuning.curves(runs, without=3.5, label="nothing trained")
    (ax,) = figure.axes
    one, base = ax.get_lines()
    assert list(one.get_xdata()) == [0, 1, 2, 3, 4, 5]
    assert one.get_ydata()[0] == runs["one"].before
    assert one.get_ydata()[-1] == runs["one"].after
    assert set(base.get_ydata()) == {3.5}
    assert [text.get_text() for text in ax.texts] == ["nothing trained"]


@pytest.mark.parametrize("start", [-6, -1])
def test_a_sweep_walks_until_the_best_rate_has_worse_neighbours(toy, task, start):
    runs = tuning.sweep(lambda: copy.deepcopy(toy), task, 5, start, checks=1)
    rates = [*runs]
    best = min(runs, key=lambda rate: runs[rate].after)
    assert rates == sorted(rates)
    assert rates[0] < best < rates[-1]


def test_a_sweep_ends_even_if_every_larger_rate_is_better(toy, task, monkeypatch):
    def larger_is_better(model, learn, steps, lr, checks):
        return tuning.Run(model, 1, 0.0, History([], [(steps, -lr)]))

    monkeypatch.setattr(tuning, "tune", larger_is_better)
    runs = tuning.sweep(lambda: toy, task, 1, start=0)
    assert [*runs] == [0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
