"""Conversations: the tokenizer's template, and a loss on answers alone."""

import copy
import json

import pytest

from minipeft.errors import InputError
from minipeft.lab import chat, task, text
from minipeft.lab.diagnosis import IGNORE

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BY_EOS = TEMPLATE.replace("END", "</s>")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Define: Politics, n."},
    {"role": "assistant", "content": "A strife of interests."},
    {"role": "user", "content": "Shorter."},
    {"role": "assistant", "content": "Strife."},
]


def with_template(tiny, template):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer, pair):
    """Return the text that has a loss, and the whole text."""
    (batch,) = text.example_batches(tokenizer, [pair], (1, 256))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    return tokenizer.decode(labels[labels != IGNORE]), tokenizer.decode(ids)


def test_every_answer_is_an_example_with_all_before_it():
    first, second = chat.answers(TALK)
    assert (first, second) == (TALK[:3], TALK)
    odd = [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}]
    assert chat.answers(odd) == [odd]


@pytest.mark.parametrize("template", [TEMPLATE, BY_EOS])
def test_the_loss_is_on_the_answer_and_the_end_of_its_turn(tiny, template):
    tokenizer = with_template(tiny, template)
    pair = chat.written(tokenizer, TALK)
    learned, whole = trained(tokenizer, pair)
    end = "END</s>" if template == TEMPLATE else "</s>"
    assert learned == f"Strife.{end}"
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole.removesuffix("</s>") == rendered.rstrip().removesuffix("</s>")


def test_a_template_that_begins_with_the_begin_token_gets_no_second_one(tiny):
    tokenizer = with_template(tiny, TEMPLATE)
    prompt, _ = chat.written(tokenizer, TALK[:3])
    assert text.prompt_ids(tokenizer, prompt).count(tokenizer.bos_token_id) == 1
    assert text.prompt_ids(tokenizer, "A word")[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.content }}", "refuses a conversation of system, user"),
        (TEMPLATE + "{{ messages | length }}", "elsewhere than where it asks"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(tiny, template, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        chat.written(with_template(tiny, template), TALK[:3])
    assert "\n" not in str(caught.value)


def test_a_task_is_written_in_the_template_but_for_plain_lines(tiny, tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"{i}"}, *TALK[2:]]}
        if i % 2
        else {"prompt": f"{i} is", "completion": " even"}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = task.from_file(path)
    assert plain.written_for(tiny.tokenizer) is plain
    found = plain.written_for(with_template(tiny, TEMPLATE))
    assert ("<s>[user]1END\n[assistant]", "A strife of interests.END") in [
        *found.train,
        *found.validation,
    ]
    assert ("2 is", " even") in [*found.train, *found.validation]
    assert found.length == task.CHAT_LENGTH > plain.length


def test_all_of_a_conversation_is_on_one_side(tiny, tmp_path):
    path = tmp_path / "mine.jsonl"
    talks = [[{"role": "user", "content": f"{i}."}, *TALK[2:]] for i in range(150)]
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks))
    found = task.from_file(path)
    assert len(found.train) + len(found.validation) == 300
    sides = [
        {p.split(".")[0] for p, _ in side} for side in (found.train, found.validation)
    ]
    assert not sides[0] & sides[1]
    assert 4 < len(sides[1]) < 50


def test_the_dictionary_is_asked_for_where_there_is_a_template(tiny):
    plain = task.dictionary()
    found = plain.written_for(with_template(tiny, BY_EOS))
    word, definition = plain.train[0]
    assert found.train[0] == (
        f"<s>[user]Define: {word}</s>\n[assistant]",
        definition[1:],
    )
