import pytest
import torch

from minipeft.errors import InputError
from minipeft.lab import task
from minipeft.lab.data import devils_dictionary
from minipeft.lab.diagnosis import IGNORE
from minipeft.lab.text import (
    Sampling,
    consecutive,
    encode,
    example_batches,
    examples,
    generate,
    windows,
)

TOKENS = torch.arange(100, 150)


def test_windows_are_runs_of_the_text_behind_bos():
    batches = windows(TOKENS, (6, 8), bos=1, seed=2)
    seen = set()
    for step in range(200):
        ids = batches(step)["input_ids"]
        assert ids.shape == (6, 8)
        assert (ids[:, 0] == 1).all()
        assert (ids[:, 2:] - ids[:, 1:-1] == 1).all()
        seen |= set(ids[:, 1:].flatten().tolist())
    assert seen == set(TOKENS.tolist())  # both ends occur
    assert torch.equal(batches(7)["input_ids"], batches(7)["input_ids"])
    assert not torch.equal(batches(7)["input_ids"], batches(8)["input_ids"])


def test_consecutive_holds_each_token_once():
    batches = consecutive(TOKENS, (2, 8), bos=1)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2, 1]
    assert (ids[:, 0] == 1).all()
    assert torch.equal(ids[:, 1:].flatten(), TOKENS[:49])


@pytest.mark.parametrize("make", [windows, consecutive])
def test_too_short_a_text_is_refused(make):
    extra = {"seed": 0} if make is windows else {}
    with pytest.raises(
        InputError, match=r"a window needs \d+ tokens, and the text has 3; give"
    ):
        make(TOKENS[:3], (1, 8), bos=1, **extra)


def pairs(count):
    entries = devils_dictionary("validation")[:count]
    return [(entry.prompt, entry.answer) for entry in entries]


def test_examples_predict_the_answer_and_the_end(tiny):
    tokenizer = tiny.tokenizer
    (batch,) = example_batches(tokenizer, pairs(3), (8, 200))
    for row, (prompt, answer) in enumerate(pairs(3)):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        predicted = labels[labels != IGNORE]
        assert tokenizer.decode(predicted) == answer + tokenizer.eos_token
        given = ids[: int((labels == IGNORE).nonzero()[0]) + 1]
        assert given[0] == tokenizer.bos_token_id
        whole = tokenizer.decode(ids[batch["attention_mask"][row] == 1])
        assert whole == f"<s>{prompt}{answer}</s>"
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORE).all()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()


def test_each_epoch_takes_every_example_once(tiny):
    given = [(f"word {i}", f" {i}") for i in range(10)]
    batches = examples(tiny.tokenizer, given, (4, 20), seed=1)
    rows = [tiny.tokenizer.decode(r) for s in range(5) for r in batches(s)["input_ids"]]
    rows = [row.replace("<pad>", "") for row in rows]
    assert len(rows) == 20
    assert len(set(rows[:10])) == len(set(rows[10:])) == 10
    assert rows[:10] != rows[10:]


def test_examples_are_cut_and_hopeless_ones_refused(tiny):
    (batch,) = example_batches(tiny.tokenizer, pairs(2), (2, 12))
    assert batch["input_ids"].shape[1] == 12
    with pytest.raises(InputError, match="leaves no room for an answer in 3"):
        example_batches(tiny.tokenizer, pairs(1), (1, 3))
    with pytest.raises(InputError, match="no examples"):
        examples(tiny.tokenizer, [], (1, 3), seed=0)


def test_texts_end_with_the_end_token(tiny):
    ids = encode(tiny.tokenizer, ["She was", " there."])
    assert tiny.tokenizer.decode(ids) == "She was</s> there.</s>"


def test_generation_is_decided_by_its_seed(tiny):
    state = torch.get_rng_state()
    first, again, other, greedy = (
        generate(tiny.model, tiny.tokenizer, "It was", sampling)
        for sampling in (
            None,
            Sampling(seed=0),
            Sampling(seed=1),
            Sampling(tokens=5, temperature=0),
        )
    )
    assert first == again != other
    assert not first.startswith("It was")
    assert len(tiny.tokenizer.encode(greedy, add_special_tokens=False)) <= 5
    assert torch.equal(torch.get_rng_state(), state)


def test_no_chapter_is_judged_on_what_it_trains_on(tiny):
    tokenizer = tiny.tokenizer
    shared = task.dictionary()
    train, held_out = shared.train, shared.validation
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in held_out}
    batches = shared.held_out(tokenizer)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(held_out)
    assert shared.training(tokenizer, rows=3)(0)["input_ids"].shape[0] == 3
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    assert longest == task.LENGTH


def test_a_prompt_of_another_tokenizer_is_refused(toy, tiny):
    said = (
        r"^input_ids in the prompt holds \d+, and the model knows 31 of them, 0 to 30;"
    )
    with pytest.raises(InputError, match=said):
        generate(toy, tiny.tokenizer, "It was")
