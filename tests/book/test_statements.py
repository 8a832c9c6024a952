"""The form of statements in chapters: controlled claims, sweeps, words with numbers."""

import ast
import json
from pathlib import Path

import pytest
from book import Folders, chapter

from minipeft.lab import memory
from minipeft.lab.memory import LLAMA_7B
from tests.book.statements import (
    TRAINED,
    Asserts,
    calls,
    sweeps,
    typed,
    vague,
    worded,
    words,
)

ROOT = Path(__file__).parents[2]
CHAPTERS = chapter.read_all(Folders(ROOT).chapters)
by_name = pytest.mark.parametrize("script", CHAPTERS, ids=lambda c: c.name)


def code(script):
    return "\n".join(c.source for c in (*script.code, *script.solutions))


def prose(script):
    return "\n\n".join(
        part
        for cell in script.prose
        for fenced, part in chapter.pieces(cell.source)
        if not fenced
    )


WORDS = ("alt", "caption")


def texts(script):
    """Return the alternative text and the caption of each figure."""
    return [
        [words({k.arg: k.value for k in call.keywords}.get(w)) for w in WORDS]
        for call in calls(code(script), "show")
    ]


# Loops over rates that search for no best rate.
NO_SWEEP = {
    "07_rslora": "it compares scalings at rates that it derives",
    "18_gpu_four_bits": "its rates are operations a second",
}


@by_name
def test_what_depends_on_training_is_claimed_and_not_asserted(script):
    assert [*Asserts(code(script)).found] == []


@by_name
def test_a_chapter_that_trains_names_a_control(script):
    training = [name for name in TRAINED if f"{name}(" in code(script)]
    assert not training or calls(code(script), "claim")


@by_name
def test_a_best_rate_is_found_inside_its_sweep(script):
    loops = sweeps(code(script))
    asked = "LongRun(chapter, " in code(script)  # asks `chapter.best` for each method
    done = asked or calls(code(script), "best") or script.name in NO_SWEEP
    assert done or loops == []


@by_name
def test_a_word_that_stands_for_a_number_has_one_in_its_sentence(script):
    text = "\n\n".join([prose(script), *map("\n\n".join, texts(script))])
    assert vague(text) == []


@by_name
def test_every_figure_has_a_caption_besides_its_alternative_text(script):
    assert [alt[:60] for alt, caption in texts(script) if not caption.strip()] == []


@by_name
def test_the_text_of_a_figure_has_its_numbers_from_the_cell(script):
    assert [typed(text) for pair in texts(script) for text in pair if typed(text)] == []


@by_name
def test_the_text_of_a_figure_shows_no_marks_of_code(script):
    """Nothing formats it, so a reader would see the marks."""
    assert [text for pair in texts(script) for text in pair if "`" in text] == []


@by_name
def test_a_number_word_in_the_text_of_a_figure_counts_its_parts(script):
    found = [worded(text) for pair in texts(script) for text in pair]
    assert [words for words in found if words] == []


TRAINING = """
before = train.loss(model, held_out)
losses = {}
for name in names:
    losses[name] = train.train(model, batches, config).validation[-1][1]
def gain(name): return before - losses[name]
"""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("assert gain('LoRA') > 0", True),
        ("assert all(loss < 4 for loss in losses.values())", True),
        ("assert torch.equal(model(ids), untouched)", False),
        ("assert all(before < 4 for before in widths)", False),
        ("before = 3\nassert before < 4", False),
    ],
)
def test_an_assert_on_a_loss_is_found_however_it_came_about(line, found):
    assert bool(Asserts(TRAINING + line).found) == found


def test_a_loop_over_rates_is_a_sweep():
    assert sweeps("for name, lr in settings:\n    pass") == ["for (name, lr)"]
    assert sweeps("best = [run(rate) for rate in RATES]") == ["for rate"]
    assert sweeps("for name in names:\n    pass") == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The two stay close. The gap is 0.01.", 1),
        ("The two stay close, {=gap=} nats apart.", 0),
        ("It is nearly $W_1$, see [chapter 6](06_qlora.md).", 1),
        ("The bars fill almost half of the box.", 0),
        ("- almost\n- 2 of 3", 1),
    ],
)
def test_a_word_without_its_number_is_found(text, count):
    assert len(vague(text)) == count


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("'a curve from −0.6 to 32,000'", ["−0.6", "32,000"]),
        ("'it begins fifty times lower'", ["fifty times"]),
        ("f'it ends at {loss:.2f} nats, 1/{ratio:.1f} of {n}'", []),
        ("'three bars: NF4, Llama 3.1 8B in 16 bits, rank 8, float16'", []),
    ],
)
def test_a_number_that_was_typed_is_found(source, found):
    assert typed(words(ast.parse(source, mode="eval").body)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "it levels off at one, and rises to three or nine.",
            ["at one", "three", "nine"],
        ),
        ("Three panels, two thin lines in each; all three rise, in two bits.", []),
        ("It ends twice as high, at a tenth of the rest.", ["twice", "tenth of"]),
        ("Grey bars mark six matrices; a scale is a power of two.", ["six"]),
        (
            "Seven times lower bars, over eight steps of one thousand.",
            ["Seven", "eight", "thousand"],
        ),
    ],
)
def test_a_number_word_that_counts_no_part_of_a_figure_is_found(text, found):
    assert worded(text) == found


def of_seventeen(method):
    path = ROOT / "chapters" / "results" / "17_side_by_side.json"
    return json.loads(path.read_text())["methods"][method]


def apart(method):
    losses = [run["validation"] for run in of_seventeen(method)["runs"]]
    return max(losses) - min(losses)


def share_of_7b(r):
    adapter = memory.Adapter(r)
    return 100 * memory.adapter_parameters(LLAMA_7B, adapter) / LLAMA_7B.parameters


# Numbers of one chapter that another chapter quotes, and their sources.
TOLD = [
    ("13_bottleneck", "three seeds of LoRA alone lie {:.2f} nats apart", apart("LoRA")),
    ("15_prompt", "fewer than the {:,} of [IA3]", of_seventeen("IA3")["trained"]),
    ("01_lora", "it is {:.1f} % at eight times the rank", share_of_7b(64)),
    ("17_side_by_side", "a rank of 8 is {:.1f} % of the parameters", share_of_7b(8)),
]


@pytest.mark.parametrize(("name", "sentence", "value"), TOLD, ids=[t[0] for t in TOLD])
def test_what_a_chapter_tells_of_another_is_what_that_one_has(name, sentence, value):
    (script,) = [c for c in CHAPTERS if c.name == name]
    assert sentence.format(value) in " ".join(prose(script).split())
