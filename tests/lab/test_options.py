"""The options of a chapter: another model, dtype, data, layers; a saved state."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from minipeft.errors import InputError
from minipeft.lab import chapter as chapters
from minipeft.lab import models, task, text
from minipeft.lab.chapter import start
from minipeft.lab.places import TINY, first_block, places
from minipeft.torch.targets import all_linear, layers
from tests.lab import architectures

pytestmark = pytest.mark.slow

CHAPTERS = Path(__file__).parents[2] / "chapters"


@pytest.fixture(autouse=True)
def _as_before():
    hook, count = sys.excepthook, len(chapters.FIGURES)
    yield
    sys.excepthook = hook
    del chapters.FIGURES[count:]


def folder_of(name, place, tokenizer):
    """Save a tiny random model with the tokenizer of `tiny`."""
    length = "n_positions" if name.startswith("GPT2") else "max_position_embeddings"
    model = architectures.build(name, vocab_size=len(tokenizer), **{length: 256})
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


# Whole chapters with another model


def arguments(number, model, out, *options):
    """Return the command line of a chapter with one step a run."""
    (chapter,) = CHAPTERS.glob(f"{number}_*.py")
    line = [str(chapter), "--model", str(model), "--steps", "1"]
    return [*line, "--device", "cpu", "--out", str(out), *map(str, options)]


def run_chapter(line):
    """Run a whole chapter in this process, and return its output."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a process of its own
        with mock.patch.object(sys, "argv", line):
            runpy.run_path(line[0], run_name="__main__")
    assert list(Path(line[line.index("--out") + 1]).glob("*.svg"))
    return shown.getvalue()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("GPT2LMHeadModel", "06"),
        ("GPT2LMHeadModel", "08"),
        ("GPT2LMHeadModel", "10"),
        ("Qwen2ForCausalLM", "06"),
        ("GemmaForCausalLM", "14"),
    ],
)
def test_a_stranger_s_model_goes_through_a_chapter(tmp_path, tiny, name, number):
    model = folder_of(name, tmp_path / "model", tiny.tokenizer)
    line = arguments(number, model, tmp_path / "out", "--held-out", 16)
    shown = run_chapter(line)
    assert f"{model} in float32, loss on the held-out examples: " in shown


def test_a_chapter_takes_every_option_and_goes_on_from_its_runs(tmp_path, tiny, capsys):
    model = folder_of("Qwen3ForCausalLM", tmp_path / "model", tiny.tokenizer)
    pairs = [{"prompt": f"w{i} is", "completion": f"v{i % 7}"} for i in range(120)]
    options = ["--data", written(tmp_path / "mine.jsonl", pairs)]
    options += ["--dtype", "bfloat16", "--targets", "q_proj,up_proj", "--threads", "1"]
    options += ["--checkpoint", tmp_path / "kept"]
    line = arguments("01", model, tmp_path / "out", *options)
    ran = subprocess.run(
        [sys.executable, *line], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    first = ran.stdout
    kept = sorted((tmp_path / "kept").glob("run-*.safetensors"))
    assert kept
    assert f"{model} in bfloat16, loss on the held-out examples: " in first
    capsys.readouterr()
    states = {path: path.read_bytes() for path in kept}
    with pytest.raises(InputError) as refused:
        run_chapter(line)
    assert str(refused.value) == (
        f"{kept[0]} holds a run after step 1, and a new run would replace it; go on "
        "with --resume, choose another folder, or empty this one"
    )
    assert {path: path.read_bytes() for path in kept} == states
    again = run_chapter([*line, "--resume"])
    assert "step 1/1" in ran.stderr
    assert "step 1/1" not in capsys.readouterr().err  # every run was at its end
    told = [
        [line for line in shown.splitlines() if "loss" in line or "gains" in line]
        for shown in (first, again)
    ]
    assert told[0] == told[1]
    assert told[0]
    assert sorted((tmp_path / "kept").glob("run-*.safetensors")) == kept


def test_no_chapter_names_the_layers_of_one_architecture():
    # Chapter 21 makes a model of its own and knows its names; 24 and 25 count the sizes
    # of models from papers.
    own = ("21_files.py", "24_costs.py", "25_counted.py")
    for path in (p for p in CHAPTERS.glob("*.py") if p.name not in own):
        code = [line for line in path.read_text().splitlines() if line[:1] != "#"]
        named = [
            line for line in code if re.search(r'"[a-pr-z]\w*_proj"|"q_proj"', line)
        ]
        assert not named, path.name


def test_a_chapter_offers_a_model_where_it_loads_one():
    for path in CHAPTERS.glob("*.py"):
        text = path.read_text("utf-8")
        offered = re.search(r"^chapter = start\((?!.*model=None)", text, re.MULTILINE)
        loads = "chapter.load(" in text or "models.load(chapter.model" in text
        assert bool(offered) == loads, path.name


# Places of adapters


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_derived_places_are_the_book_s_where_names_are_llama_s(name):
    model = architectures.build(name)
    found = places(model)
    for part in ("linears", "ends", "scaled"):
        derived = layers(model, getattr(found, part))
        assert derived.keys() == layers(model, getattr(TINY, part)).keys(), part
    assert found.feedforward == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert found.beside == [f"model.layers.{i}.mlp" for i in (0, 1)]
    assert first_block(model) is model.model.layers[0]


def test_places_where_one_layer_computes_queries_keys_and_values():
    model = architectures.build("GPT2LMHeadModel")
    found = places(model)
    blocks = [f"transformer.h.{i}" for i in (0, 1)]
    assert found.ends == [f"{b}.{s}.c_proj" for b in blocks for s in ("attn", "mlp")]
    assert found.feedforward == [f"{block}.mlp.c_proj" for block in blocks]
    assert found.scaled == list(all_linear(model))


def test_places_where_the_feed_forward_is_no_module():
    model = architectures.build("OPTForCausalLM")
    found = places(model)
    assert found.feedforward == [f"model.decoder.layers.{i}.fc2" for i in (0, 1)]
    assert found.beside == []


def test_places_are_among_the_layers_that_were_asked_for():
    model = architectures.build("LlamaForCausalLM")
    found = places(model, ["v_proj", "o_proj"])
    assert found.ends == [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    assert found.feedforward == []
    with pytest.raises(InputError, match="'w_proj' matches no layer"):
        places(model, ["w_proj"])


@pytest.mark.parametrize("name", architectures.CAUSAL)
def test_every_architecture_has_places(name):
    model = architectures.build(name)
    found = places(model)
    assert found.ends
    assert set(found.feedforward) <= set(found.ends) <= set(all_linear(model))


# Options


def test_what_another_option_prints_is_no_claim_of_the_book(tmp_path):
    usual = start("01_lora", 30, arguments=["--device", "cpu"])
    assert usual.usual
    assert usual.places(None) is TINY
    assert usual.before == task.BEFORE
    for line in (["--dtype", "bfloat16"], ["--targets", "x"], ["--threads", "2"]):
        assert not start("01_lora", 30, arguments=line).usual
    assert torch.get_num_threads() == 2
    start("01_lora", 30, arguments=[])
    assert torch.get_num_threads() == 1


def test_dtype_and_targets_reach_the_model():
    line = ["--dtype", "bfloat16", "--targets", "q_proj,v_proj"]
    chapter = start("01_lora", 30, arguments=line)
    model = chapter.load().model
    assert model.dtype == torch.bfloat16
    assert chapter.places(model).linears == ["q_proj", "v_proj"]
    assert chapter.before == "tiny in bfloat16, loss on the held-out examples"


def test_a_chapter_without_a_model_takes_none():
    chapter = start("02_nf4", 1, model=None, arguments=[])
    assert (chapter.model, chapter.usual) == ("", True)
    with pytest.raises(InputError, match="unrecognized arguments: --model"):
        start("02_nf4", 1, model=None, arguments=["--model", "tiny"])


def test_a_model_that_writes_no_text_is_refused(minilm_folder):
    chapter = start("01_lora", 30, arguments=["--model", str(minilm_folder)])
    with pytest.raises(InputError, match="is a BertModel, which does not write text"):
        chapter.load()


def test_a_model_of_two_texts_is_refused_before_a_step(tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=1024, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    models.load("tiny").tokenizer.save_pretrained(tmp_path)
    chapter = start("01_lora", 30, arguments=["--model", str(tmp_path)])
    with pytest.raises(InputError, match="which answers one text by another; give a"):
        chapter.load()


def test_each_run_has_a_file_and_goes_on_from_it(tmp_path):
    line = ["--checkpoint", str(tmp_path / "kept")]
    chapter = start("01_lora", 30, arguments=line)
    first, second = chapter.kept(), chapter.kept()
    assert [c.path.name for c in (first, second)] == [
        "run-001.safetensors",
        "run-002.safetensors",
    ]
    first.path.write_bytes(b"a state")
    again = start("01_lora", 30, arguments=[*line, "--resume"])
    assert [again.kept().resume, again.kept().resume] == [True, False]
    assert start("01_lora", 30, arguments=[]).kept() is None


# Tokenizers


@pytest.mark.parametrize(("pad", "end"), [(None, "</s>"), ("<pad>", None)])
def test_a_missing_pad_or_end_token_is_stood_in_for(tmp_path, tiny, pad, end):
    folder = folder_of("Qwen2ForCausalLM", tmp_path, tiny.tokenizer)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    given = tiny.tokenizer
    config["pad_token"] = pad and given.pad_token
    config["eos_token"] = end and given.eos_token
    path.write_text(json.dumps(config))
    tokenizer = models.load(str(folder)).tokenizer
    assert tokenizer.pad_token_id < 1024
    assert tokenizer.eos_token_id < 1024
    batch = text.example_batches(tokenizer, [("a", " b"), ("c", " d e f")], (2, 16))
    assert batch[0]["labels"].shape[0] == 2
    tokenizer.bos_token = None
    assert text.opening(tokenizer) == tokenizer.eos_token_id


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path, tiny):
    model = architectures.build("Qwen2ForCausalLM", vocab_size=100)
    model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"has \d+ tokens and the model a table of 100"
    ):
        models.load(str(tmp_path))


# Data of one's own


def written(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_file_s_lines_become_pairs(tmp_path):
    kinds = [
        lambda i: {"word": f"w{i}", "definition": "d"},
        lambda i: {"word": f"w{i}", "part": "n.", "definition": "d"},
        lambda i: {"prompt": f"p{i}", "completion": "c"},
        lambda i: {"text": f"t{i} and more"},
        lambda i: {
            "messages": [
                {"role": "user", "content": f"m{i}"},
                {"role": "assistant", "content": "yes"},
            ]
        },
    ]
    entries = [kinds[i % 5](i) for i in range(200)]
    found = task.from_file(written(tmp_path / "mine.jsonl", entries))
    pairs = {*found.train, *found.validation}
    assert {("w0", " d"), ("w1, n.", " d"), ("p2", "c"), ("t3", " and more")} <= pairs
    assert ("user: m4\nassistant:", " yes") in pairs
    assert len(pairs) == 200
    assert 5 < len(found.validation) < 50
    assert not set(found.train) & set(found.validation)
    again = task.from_file(written(tmp_path / "mine.jsonl", entries[::-1]))
    assert set(again.validation) == set(found.validation)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 41 of .* is not JSON"),
        (
            "The oak stood.",
            r"is not JSON \(.*\); give one object a line: .*\"text\": …}$",
        ),
        ('["a"]', r'line 41 of .* is none of \{"word"'),
        ('{"word": "a"}', "line 41 of .* is none of"),
        ('{"prompt": 3, "completion": "x"}', "line 41 of .* is none of"),
        ('{"prompt": "a", "completion": " "}', "line 41 of .* has an empty answer"),
        ('{"text": "alone"}', "line 41 of .* has an empty answer"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "of one message; give"),
        ('{"messages": [3, 4]}', "is none of"),
        ("[" * 100_000, "line 41 of .* is not JSON .maximum recursion"),
        (
            r'{"text": "a \ud800"}',
            r"line 41 of .* holds '\\ud800', which is half of a character; write",
        ),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path, line, sentence):
    path = written(tmp_path / "mine.jsonl", [{"prompt": "a", "completion": "b"}] * 40)
    path.write_text(path.read_text() + line)
    with pytest.raises(InputError, match=sentence) as caught:
        task.from_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sign", ["\u2028", "\u0085", "\x7f", "\u2029"])
def test_a_sign_that_python_ends_a_line_at_may_stand_in_an_answer(tmp_path, sign):
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"{i}", "completion": f"a{sign}b"} for i in range(40)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # as editors on Windows write
    found = task.from_file(path)
    assert len(found.train) + len(found.validation) == 40
    assert {answer for _, answer in found.train} == {f"a{sign}b"}


def test_a_message_may_hold_more_than_text(tmp_path):
    """As files with calls of tools have it."""
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "1"}]}
    tool = {"role": "tool", "content": "rain", "name": None}
    last = {"role": "assistant", "content": "Rain."}
    talks = [
        {"messages": [{"role": "user", "content": f"{i}?"}, call, tool, last]}
        for i in range(40)
    ]
    found = task.from_file(written(tmp_path / "mine.jsonl", talks))
    assert len(found.train) + len(found.validation) == 80
    assert found.train[1][0].endswith("assistant: I look.\ntool: rain\nassistant:")


def test_texts_that_begin_alike_are_split_and_a_prompt_is_not(tmp_path):
    path = tmp_path / "mine.jsonl"
    sides = task.from_file(written(path, [{"text": f"The {i}"} for i in range(200)]))
    assert 5 < len(sides.validation) < 50
    prompts = [{"prompt": "ab"[i % 2], "completion": f"{i}"} for i in range(40)]
    sides = task.from_file(written(path, prompts))
    assert len(sides.train) == len(sides.validation) == 20
    assert {p for p, _ in sides.train} != {p for p, _ in sides.validation}
    with pytest.raises(
        InputError, match=r"^all 40 examples of .* have the same prompt"
    ):
        task.from_file(written(path, prompts[::2] * 2))


def test_every_forty_examples_have_both_sides(tmp_path):
    path = tmp_path / "mine.jsonl"
    for first in range(0, 40 * 200, 40):
        lines = [{"prompt": f"{first + i}", "completion": "c"} for i in range(40)]
        sides = task.from_file(written(path, lines))
        assert sides.train
        assert sides.validation


def test_a_file_that_is_absent_or_short_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"^there is no file \S*absent.jsonl; "):
        task.from_file(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        task.from_file(tmp_path)
    short = written(tmp_path / "short.jsonl", [{"text": "one more"}])
    with pytest.raises(
        InputError, match=r"short.jsonl holds 1 example; give at least 40"
    ):
        task.from_file(short)
