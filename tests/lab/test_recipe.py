"""A run by its settings, and the folders that it writes, for every method."""

import argparse
import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from minipeft.errors import InputError
from minipeft.interop import merging, peft_format
from minipeft.interop.audit import WRONG, audit
from minipeft.interop.made import Made
from minipeft.interop.opening import open_model
from minipeft.lab import handover, recipe, results
from minipeft.lab.memory import prepared
from minipeft.lab.places import places
from minipeft.lab.text import windows
from minipeft.lab.train import StepMemory, train
from minipeft.torch.inject import trainable_parameters
from minipeft.torch.qlora import quantize_linears

BATCHES = windows(torch.arange(400) * 7 % 29 + 2, (2, 12), bos=1, seed=3)


def asked(*line):
    parser = argparse.ArgumentParser()
    recipe.add_options(parser)
    return recipe.recipe(parser.parse_args([*line]))


def trained(toy, method):
    use = asked("--method", method, "--rank", "2", "--lr", "0.01")
    if use.quantize:
        quantize_linears(toy, blocksize=16, nested_blocksize=8)
    model = use.prepared(toy, places(toy))
    train(model, BATCHES, use.settings(toy, 3))
    return use, model


def test_every_method_of_the_book_can_be_ordered():
    assert {*recipe.METHODS} == {*prepared.NAMES}
    assert {*recipe.METHODS} >= {*handover.EXACT, *handover.RANKED, *handover.UNMERGED}


def greedy(model, count=6):
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids.tolist()


@pytest.mark.parametrize("method", recipe.METHODS)
def test_its_folders_hold_what_was_trained(toy, tiny, tmp_path, method):
    use, model = trained(toy, method)
    assert sum(p.numel() for p in trainable_parameters(model))
    handover.write_base(model, tiny.tokenizer, tmp_path / "base")
    read, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert not any(said.values()), said
    if method == "full":
        (line,) = handover.described(tmp_path, method)
        assert line == "  base: the trained model"
        assert greedy(read) == greedy(model)
        return
    made = Made(data=recipe.fingerprint([("a", "b")]), seed=0)
    handover.write_adapter(model, use, made, tmp_path / "adapter")
    if method in handover.UNMERGED:
        return
    handover.write_lora(model, use, made, tmp_path / "lora")
    adapter = peft_format.read(tmp_path / "lora")
    merging.merge(tmp_path / "base", adapter, tmp_path / "merged")
    base, merged = open_model(tmp_path / "base"), open_model(tmp_path / "merged")
    findings = [*audit(base, adapter, merged)]
    assert any(f.adapted for f in findings)
    assert WRONG not in {f.verdict for f in findings}
    said = "\n".join(handover.described(tmp_path, method))
    rooms = "base", "adapter", "lora", "merged"
    assert all(f"  {name}: {handover.ROOMS[name]}" in said for name in rooms)
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert greedy(served) == greedy(model)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"]


def test_the_rate_is_the_book_s_and_a_tenth_in_a_wider_model(toy):
    assert asked().settings(toy, 10).lr == recipe.RATES["lora"]
    assert asked("--lr", "0.5").settings(toy, 10).lr == 0.5
    wide = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=256,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    assert asked().settings(wide, 10).lr == recipe.RATES["lora"] / 10
    settings = asked("--accumulate", "3").settings(toy, 30)
    assert (settings.accumulate, settings.warmup, settings.validate_every) == (3, 3, 10)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({}, True),
        ({"model": "mine"}, False),
        ({"data": "mine.jsonl"}, False),
        ({"method": "bottleneck"}, False),
    ],
    ids=str,
)
def test_the_capstone_shows_the_committed_run_beside_the_same_recipe(
    changed, shown, capsys
):
    script = Path(__file__).parents[2] / "chapters" / "26_capstone.py"
    cells = script.read_text("utf-8").split("\n# %%")
    (cell,) = (c for c in cells if "chapter.read_full(" in c)
    chapter = {"name": script.stem, "full": False, "model": "tiny", "data": None}
    chapter |= {"read_full": lambda path: json.loads(path.read_text("utf-8"))}
    chapter |= {"claim": lambda sentence, *_, **__: print(sentence), **changed}
    given = {
        "__file__": str(script),
        "Path": Path,
        "chapter": SimpleNamespace(**chapter),
        "committing": False,
        "use": SimpleNamespace(method=changed.get("method", "lora")),
        "train": SimpleNamespace(StepMemory=StepMemory),
        "results": results,
        "tell": print,
    }
    exec(cell, given)
    said = capsys.readouterr().out
    assert said.startswith("the committed run on SmolLM2, not the one") == shown
    assert ("SmolLM2 has learned" in said) == shown


def test_a_run_replaces_the_folder_of_a_run_and_nothing_else(tmp_path):
    handover.check_own(tmp_path / "new")
    for name in (*handover.ROOMS, *handover.FILES):
        (tmp_path / name).mkdir()
    handover.check_own(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match=r"holds mine, which no run wrote .* move it"):
        handover.check_own(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; choose another --out"):
        handover.check_own(tmp_path / "file")


@pytest.mark.parametrize(
    ("predicted", "said"),
    [(100.0, ["False"]), (104.0, ["True"]), (None, [])],
    ids=["far", "near", "no formula"],
)
def test_the_capstone_claims_no_prediction_where_no_formula_is(predicted, said, capsys):
    script = Path(__file__).parents[2] / "chapters" / "26_capstone.py"
    parts = [
        part
        for part in ast.parse(script.read_text("utf-8")).body
        if isinstance(part, ast.If) and "history.peak" in ast.unparse(part.test)
    ]
    peak = StepMemory(106.0, predicted)
    chapter = SimpleNamespace(claim=lambda _, holds, control: print(holds))
    given = {"history": SimpleNamespace(peak=peak), "chapter": chapter}
    exec(compile(ast.Module(parts, []), str(script), "exec"), given)
    first, *rest = capsys.readouterr().out.splitlines()
    assert ("predicted by no formula" in first) == (predicted is None)
    assert rest == said


@pytest.mark.parametrize("option", ["--rank", "--batch", "--accumulate"])
def test_a_number_below_one_is_refused(option):
    with pytest.raises(InputError, match=f"{option} is 0; give at least 1"):
        asked(option, "0")
    with pytest.raises(InputError, match="--lr is -1"):
        asked("--lr", "-1")
