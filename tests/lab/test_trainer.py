"""transformers' `Trainer` on a model with adapters gives the values of a plain loop."""

import copy
import json

import pytest
import torch
import transformers

from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.vera import VeRAConfig

pytestmark = pytest.mark.slow

TEXT = torch.arange(1200) * 7 % 29 + 2
DATA = [{"input_ids": row, "labels": row} for row in TEXT.reshape(-1, 12)]
ROWS = {
    "LoRA": LoRAConfig(2, 4.0),
    "QLoRA": LoRAConfig(2, 4.0),
    "DoRA": DoRAConfig(2, 4.0),
    "VeRA": VeRAConfig(2),
    "IA3": IA3Config(["down_proj"]),
    "HiRA": HiRAConfig(2),
    "MiSS": MiSSConfig(2),
    "PiSSA": PiSSAConfig(2, 4.0),
    "LoftQ": LoftQConfig(2, 4.0, blocksize=16, steps=1),
    "bottleneck": BottleneckConfig(2),
}
VIRTUAL = {
    "prompt": lambda model: PromptModel(model, PromptConfig(3)),
    "prefix": lambda model: PrefixModel(model, PrefixConfig(3)),
    "prefix with a network": lambda model: PrefixModel(
        model, PrefixConfig(3, hidden=5)
    ),
}
RATE, STEPS, ACCUMULATE = 1e-2, 4, 2


def adapted(base, row):
    model = copy.deepcopy(base)
    if row in VIRTUAL:
        torch.manual_seed(0)
        return VIRTUAL[row](model)
    if row == "experts":
        torch.manual_seed(0)
        return inject(of_experts(), LoRAConfig(2, 4.0), ["experts"])
    if row == "QLoRA":
        quantize_linears(model, blocksize=16)
    torch.manual_seed(0)
    return inject(model, ROWS[row], "all-linear")


def of_experts():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(
        vocab_size=64, num_local_experts=4, **sizes, **heads
    )
    return transformers.MixtralForCausalLM(config)


class Noting(transformers.Trainer):
    """A trainer that records the inputs of the model."""

    seen: list

    def compute_loss(self, model, inputs, *args, **settings):
        count = settings.get("num_items_in_batch")
        self.seen.append({**inputs, "num_items_in_batch": count})
        return super().compute_loss(model, inputs, *args, **settings)


def trainer(model, folder, **changes):
    settings = {
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "save_strategy": "steps",
        "gradient_accumulation_steps": ACCUMULATE,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
        **changes,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings)
    run = Noting(
        model=model, args=arguments, train_dataset=DATA[:60], eval_dataset=DATA[60:68]
    )
    run.seen = []
    return run


def by_hand(model, seen):
    """Take the steps of a run in a plain loop."""
    optimizer = torch.optim.AdamW(
        trainable_parameters(model), lr=RATE, weight_decay=0.0
    )
    model.train()
    for start in range(0, len(seen), ACCUMULATE):
        for batch in seen[start : start + ACCUMULATE]:
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model, batch):
    """Return the loss of a part; without a count of items, the mean of means.

    The trainer looks at the arguments of `forward` and does the same.
    """
    if isinstance(model, (PrefixModel, PromptModel)):
        return model(batch["input_ids"], labels=batch["labels"]).loss / ACCUMULATE
    return model(**batch).loss


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("row", [*ROWS, "experts", *VIRTUAL])
def test_it_takes_the_steps_of_a_plain_loop_and_resumes_bit_for_bit(toy, tmp_path, row):
    start, whole, resumed = (adapted(toy, row) for _ in range(3))
    run = trainer(whole, tmp_path)
    run.train()
    assert len(run.seen) == STEPS * ACCUMULATE
    assert_same(by_hand(copy.deepcopy(start), run.seen), whole)
    frozen = {n for n, p in start.named_parameters() if not p.requires_grad}
    moved = [
        name
        for name, value in start.state_dict().items()
        if not torch.equal(value, whole.state_dict()[name])
    ]
    assert moved
    assert not set(moved) & frozen
    half = tmp_path / f"checkpoint-{STEPS // 2}"
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(half))
    assert_same(resumed, whole)


def test_its_checkpoint_is_no_model_that_would_start_from_random_weights(toy, tmp_path):
    trainer(adapted(toy, "LoRA"), tmp_path, max_steps=1, save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    for kind in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(Exception, match=r"load_state_dict|type `minipeft`"):
            kind.from_pretrained(folder)
    names = json.loads((folder / "config.json").read_text())
    assert names["model_type"] == "minipeft"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_under_the_trainer_gives_the_same_state(toy, tmp_path, reentrant):
    plain, checkpointed = (adapted(toy, "QLoRA") for _ in range(2))
    trainer(plain, tmp_path / "a", save_strategy="no").train()
    trainer(
        checkpointed,
        tmp_path / "b",
        save_strategy="no",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    ).train()
    assert_same(plain, checkpointed)


def test_the_best_state_is_loaded_at_the_end(toy, tmp_path):
    """A learning rate that is far too large spoils the last steps."""
    model = adapted(toy, "LoRA")
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    run.train()
    losses = {
        e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e
    }
    best = min(losses, key=losses.get)
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == losses[best]
