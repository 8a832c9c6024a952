"""Every method works on a tiny model of each class, or refuses in a sentence."""

import pytest

from tests.lab import works
from tests.lab.architectures import EVERY
from tests.lab.works import METHODS, NONE, PAGE, WORKS, every, read, table
from tests.operands import annotations_off

REMEDY = "run: python -m tests.lab.works"
WRITTEN = read(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EVERY)
def test_a_row_of_the_page_is_what_a_model_of_the_class_does(name):
    shown = {key: mark for key, mark in WRITTEN.items() if key[1] == name}
    with annotations_off():  # the same sentences as the library's own
        assert every([name]) == shown, REMEDY


def test_the_page_is_drawn_from_its_outcomes():
    assert set(WRITTEN) == {(method, name) for name in EVERY for method in METHODS}
    assert table(WRITTEN) == PAGE.read_text(encoding="utf-8"), REMEDY


def test_linear_methods_work_on_every_class_but_where_a_sentence_says_why():
    refused = {k: s for k, s in WRITTEN.items() if s not in (WORKS, NONE)}
    assert {method for method, _ in refused} == {
        "DoRA",
        "LoRA on experts",
        "bottleneck",
        "prefix",
        "prompt",
    }
    assert all(sentence.endswith(".") for sentence in refused.values())


def test_a_merge_that_does_something_else_is_seen(monkeypatch):
    monkeypatch.setattr(works, "merge", lambda model: works.unload(model))
    with pytest.raises(AssertionError):
        works.outcome("LoRA", "LlamaForCausalLM")
