import copy
import json
import re

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CanineConfig,
    CanineForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForMultipleChoice,
)

from minipeft.errors import InputError
from minipeft.lab.diagnosis import IGNORE, check_ids, predicted
from minipeft.lab.text import consecutive, windows
from minipeft.lab.train import (
    Checkpoint,
    History,
    TrainConfig,
    loss,
    train,
)
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from tests.lab.architectures import build, operands
from tests.operands import annotations_off

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
    assert len(err.splitlines()) == 1 + 10
    assert err.startswith("peak memory of a step: measured ")
    assert re.fullmatch(
        r"step 20/20  loss \d\.\d{3}  \(mean of 20 steps \d\.\d{3}\)  .*0 s left",
        err.splitlines()[-1],
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "tiny"}, "model is of type str; give one of type Module"),
        ({"batches": [1]}, "batches is of type list; give a function"),
        ({"config": {"steps": 1}}, "config is of type dict; give one of type TrainC"),
        ({"checkpoint": "run.safetensors"}, "checkpoint is of type str; give one of"),
    ],
)
def test_operands_of_another_type_are_refused(toy, changes, sentence):
    given = {"model": toy, "batches": BATCHES, "config": settings(toy, steps=1)}
    with annotations_off(), pytest.raises(InputError, match=sentence):
        train(**{**given, **changes})


@pytest.mark.parametrize("fields", [{"every": 0}, {"every": 1.5}, {"resume": "no"}])
def test_a_checkpoint_that_could_not_be_kept_is_refused(tmp_path, fields):
    (name,) = fields
    with annotations_off(), pytest.raises(InputError, match=f"{name} is"):
        Checkpoint(tmp_path / "run.safetensors", **fields)


def test_nothing_to_train_is_said(toy):
    freeze_all_but(toy, "no such part")
    with pytest.raises(InputError, match="no parameter requires gradients"):
        train(toy, BATCHES, TrainConfig(1))


def test_schedule_warms_up_then_falls_to_the_floor():
    config = TrainConfig(110, warmup=10, floor=0.25)
    assert config.factor(0) == 0.1
    assert config.factor(9) == config.factor(10) == 1.0
    assert config.factor(60) == 0.625  # halfway: the mean of 1 and the floor
    assert config.factor(110) == 0.25
    falling = [config.factor(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": 1, "lr": 0.0}, "learning rate is 0.0"),
        ({"steps": 1, "lr": "1e-3"}, "lr is '1e-3'"),
        ({"steps": 1, "validate_every": -1}, "validate_every is -1"),
        ({"steps": 1, "accumulate": 0}, "accumulate is 0"),
        ({"steps": 1, "betas": (1, 0.9)}, r"betas are \(1, 0\.9\); choose both"),
        ({"steps": 1, "betas": (0.9,)}, r"betas are \(0\.9,\); choose both"),
        ({"steps": 1, "betas": ("0.9", 0.9)}, r"betas are \('0\.9', 0\.9\)"),
    ],
)
def test_bad_settings_are_refused(fields, sentence):
    with annotations_off(), pytest.raises(InputError, match=sentence):
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

    with pytest.raises(InputError, match=r"model\.norm\.weight is not finite"):
        train(toy, poisoned, TrainConfig(3))
    del good["model.norm.weight"]
    now = weights(toy)
    del now["model.norm.weight"]
    assert_same(now, good)


def test_history_goes_through_a_file(tmp_path):
    history = History([1.5, 0.25], [(2, 0.125)], 3.5)
    history.save(tmp_path / "loss_curve.json")
    assert History.load(tmp_path / "loss_curve.json") == history
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json is not a loss curve"):
        History.load(tmp_path / "bad.json")


def test_a_batch_may_hold_a_sparse_tensor(toy, tmp_path):
    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text = toy

        def forward(self, edges, **batch):
            assert edges.layout != torch.strided
            return self.text(**batch)

    def batches(i):
        return {**BATCHES(i), "edges": torch.eye(4).to_sparse()}

    keep = tmp_path / "run"
    train(Graph(), batches, settings(toy, steps=2), (), Checkpoint(keep))
    on = Checkpoint(keep, resume=True)
    assert len(train(Graph(), batches, settings(toy, steps=3), (), on).losses) == 3


def settings(toy, **changes):
    return TrainConfig(**{"steps": 6, "lr": 1e-2, **changes})


def test_accumulated_batches_are_one_larger_batch(toy):
    """Each label has the same weight, though the batches have different counts."""
    parts = [{k: v[i : i + 1].clone() for k, v in BATCHES(0).items()} for i in range(4)]
    parts[1]["labels"][:, 3:] = IGNORE
    whole = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    toy.double()
    gradients = []
    for batches, accumulate in ((lambda i: parts[i], 4), (lambda i: whole, 1)):
        model = copy.deepcopy(toy)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer.step = lambda model=model: gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters()])
        )
        config = settings(
            toy, steps=1, accumulate=accumulate, optimizer=lambda m, c, o=optimizer: o
        )
        train(model, batches, config)
    one, other = gradients
    # float64 sums of some thousand terms: far below float32's rounding
    assert float((one - other).norm() / other.norm()) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda b: b["labels"].fill_(IGNORE), "no label to learn from: all that are"),
        (lambda b: b["labels"][:, 1:].fill_(IGNORE), "no label to learn from"),
    ],
)
def test_ignored_labels_are_named_as_the_cause(toy, spoil, sentence):
    def batches(step):
        batch = {k: v.clone() for k, v in BATCHES(step).items()}
        spoil(batch)
        return batch

    before = weights(toy)
    with pytest.raises(InputError, match=sentence) as caught:
        train(toy, batches, settings(toy))
    assert "learning rate" not in str(caught.value)
    assert_same(weights(toy), before)


def test_a_batch_that_no_model_can_learn_from_is_named_as_the_cause(toy):
    good = BATCHES(0)
    nan = torch.full((2, 3), torch.nan)
    for batch, sentence in (
        ([1], "the batch of step 1 is of type list; give one of type Mapping"),
        ({"input_ids": good["input_ids"]}, "has no labels, but input_ids; add"),
        (
            {**good, "inputs_embeds": nan},
            "inputs_embeds in the batch of step 1 holds N",
        ),
    ):
        with annotations_off(), pytest.raises(InputError, match=sentence):
            train(toy, lambda step, batch=batch: batch, TrainConfig(1))


@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.parametrize("strange", [29 + 99, -1])
def test_an_id_that_the_model_has_no_row_for_is_named(toy, name, strange):
    size = toy.config.vocab_size
    before = weights(toy)

    def spoilt(step):
        batch = {key: t.clone() for key, t in BATCHES(step).items()}
        batch[name][-1, 5] = strange
        return batch

    said = rf"^{name} in .* {strange}, and the model knows {size} of them, 0 to "
    with pytest.raises(InputError, match=said + rf"{size - 1}; use the tokenizer"):
        train(toy, spoilt, TrainConfig(2))
    with pytest.raises(InputError, match=rf"^{name} in batch 2 holds {strange}"):
        loss(toy, [BATCHES(0), spoilt(0)])
    around = PrefixModel(toy, PrefixConfig(2))  # has no table of its own
    with pytest.raises(InputError, match=rf"^{name} in .* of step 1 holds {strange}"):
        train(around, spoilt, TrainConfig(2))
    assert_same(weights(toy), before)


def test_only_what_a_model_looks_up_in_a_table_is_compared_with_it():
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
    }
    canine = CanineConfig(**small, num_hash_buckets=40)  # a character is no row
    choices = DebertaV2Config(**small, num_labels=2)
    numbers = BertConfig(**small, num_labels=3, problem_type="regression")
    row = torch.arange(8)[None]
    known = {
        CanineForSequenceClassification(canine): (row + 70_000, torch.tensor([1])),
        DebertaV2ForMultipleChoice(choices): (row.view(1, 4, 2), torch.tensor([3])),
        BertForSequenceClassification(numbers): (row, torch.tensor([[0, 7, 1]])),
    }
    for model, (ids, labels) in known.items():
        check_ids(model, {"input_ids": ids, "labels": labels}, "a batch")
    model = BertForSequenceClassification(numbers)
    model.config.image_token_id = 50  # replaced before the table is read
    check_ids(model, {"input_ids": torch.tensor([[50, 1]])}, "a batch")
    with pytest.raises(InputError, match=r"^input_ids in a batch holds 51"):
        check_ids(model, {"input_ids": torch.tensor([[50, 51]])}, "a batch")
    # Seen as uint8, -100 is 156; and a map has marks of its own.
    ids = torch.tensor([156], dtype=torch.uint8)
    with pytest.raises(InputError, match=r"^labels in a batch holds 156"):
        check_ids(build("LlamaForCausalLM"), {"labels": ids}, "a batch")
    model = build("BertForSequenceClassification")
    check_ids(model, {"labels": torch.full((1, 2, 2), 255)}, "a batch")


def test_a_label_beyond_the_classes_is_named():
    model = build("BertForSequenceClassification")
    batch = {
        **operands("BertForSequenceClassification"),
        "labels": torch.tensor([0, 2]),
    }
    with pytest.raises(
        InputError, match=r"^labels in .* holds 2, and the model knows 2"
    ):
        train(model, lambda step: batch, TrainConfig(1))


def test_an_empty_batch_is_named_as_the_cause(toy):
    empty = {k: v[:0] for k, v in BATCHES(0).items()}
    with pytest.raises(InputError, match="the batch of step 1 is empty"):
        train(toy, lambda step: empty, settings(toy))


def test_a_learning_rate_that_vanishes_is_named_as_the_cause(toy):
    with pytest.raises(InputError, match="is 0 in float32, so nothing would train"):
        train(toy, BATCHES, settings(toy, lr=1e-46))


def test_a_damaged_base_is_named_as_the_cause(toy):
    freeze_all_but(toy, "q_proj")
    with torch.no_grad():
        toy.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"up_proj\.weight is not finite; the base"):
        train(toy, BATCHES, settings(toy))


class RootOfZero(torch.nn.Module):
    """A finite loss with a NaN gradient, from the third call on."""

    def __init__(self):
        super().__init__()
        self.inner, self.calls = torch.nn.Linear(4, 4), 0

    def forward(self, x, labels):
        self.calls += 1
        y = self.inner(x)
        bad = (y * 0).abs().sqrt().sum() if self.calls == 3 else 0

        class Out:
            loss = (y - labels).square().mean() + bad

        return Out()


def test_a_gradient_that_is_not_finite_spoils_nothing(tmp_path):
    path, model = tmp_path / "run.safetensors", RootOfZero()
    batch = {"x": torch.ones(2, 4), "labels": torch.zeros(2, 4)}
    with pytest.raises(InputError, match=r"gradient of inner\.weight is not finite"):
        train(model, lambda step: batch, settings(model), (), Checkpoint(path, every=1))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    with safetensors.safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["minipeft"])["progress"]
        kept = file.get_tensor("parameter/inner.weight")
    assert progress["step"] == 2
    assert torch.equal(kept, model.inner.weight)
