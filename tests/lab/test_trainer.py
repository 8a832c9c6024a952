"""transformers' own `Trainer` on a model with adapters: train, save, resume, best."""

import json

import pytest
import torch
import transformers

from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import quantize_linears

TEXT = torch.arange(1200) * 7 % 29 + 2
ROWS = [{"input_ids": row, "labels": row} for row in TEXT.reshape(-1, 12)]


def adapted(model, quantized):
    model = quantize_linears(model) if quantized else model
    torch.manual_seed(0)
    return inject(model, LoRAConfig(r=4, alpha=8), "all-linear")


def trainer(model, folder, **changes):
    settings = {
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
        **changes,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=ROWS[:60], eval_dataset=ROWS[60:]
    )


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(params=[False, True], ids=["LoRA", "QLoRA"])
def make(request, toy_of):
    return lambda: adapted(toy_of(), request.param)


@pytest.fixture
def toy_of(toy):
    first = {k: v.clone() for k, v in toy.state_dict().items()}

    def fresh():
        model = transformers.LlamaForCausalLM(toy.config)
        model.load_state_dict(first)
        return model

    return fresh


def test_it_trains_the_adapters_and_nothing_else(make, tmp_path):
    model = make()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = state(model)
    run = trainer(model, tmp_path)
    start = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < start
    changed = {n for n, v in state(model).items() if not torch.equal(v, before[n])}
    assert changed == names


def test_a_run_resumes_as_if_it_had_never_stopped(make, tmp_path):
    whole = make()
    trainer(whole, tmp_path / "whole").train()
    first = make()
    trainer(first, tmp_path / "parts", max_steps=8, save_total_limit=3).train()
    second = make()
    run = trainer(second, tmp_path / "parts")
    run.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert run.state.global_step == 8
    assert_same(state(second), state(whole))


def test_the_best_state_is_loaded_at_the_end(make, tmp_path):
    """A rate that grows without a schedule spoils the last steps."""
    model = make()
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_steps=2,
        save_steps=2,
    )
    run.train()
    losses = {
        e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e
    }
    best = min(losses, key=losses.get)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=0, abs=0)


def test_checkpointing_under_the_trainer_gives_the_same_state(make, tmp_path):
    plain, checkpointed = make(), make()
    trainer(plain, tmp_path / "a").train()
    trainer(
        checkpointed,
        tmp_path / "b",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    ).train()
    assert_same(state(plain), state(checkpointed))


def test_a_saved_model_holds_the_adapters(make, tmp_path):
    model = make()
    run = trainer(model, tmp_path)
    run.train()
    kept = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert kept["global_step"] == 8
    fresh = make()
    again = trainer(fresh, tmp_path / "other")
    again._load_from_checkpoint(str(tmp_path / "checkpoint-8"))
    assert_same(state(fresh), state(model))
    assert all(p.requires_grad for p in trainable_parameters(fresh))
