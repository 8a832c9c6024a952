"""The committed results of long runs: complete, with the settings that made them."""

import ast
import itertools
import json
import math
from pathlib import Path

import pytest

from minipeft.lab.results import BASES

CHAPTERS = Path(__file__).parents[2] / "chapters"
FILES = sorted((CHAPTERS / "results").glob("*.json"))
SIDE_BY_SIDE = CHAPTERS / "results" / "17_side_by_side.json"


@pytest.fixture(scope="module")
def result():
    return json.loads(SIDE_BY_SIDE.read_text())


def assigned(name):
    """Return the value that the chapter assigns to a name, without a run."""
    tree = ast.parse((CHAPTERS / "17_side_by_side.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            if name in map(ast.unparse, names):
                value = ast.literal_eval(node.value)
                place = [ast.unparse(n) for n in names].index(name)
                return value[place] if isinstance(target, ast.Tuple) else value
    raise AssertionError(f"the chapter assigns nothing to {name}")


def entrants():
    """Return the names in the chapter's table of methods, without a run."""
    tree = ast.parse((CHAPTERS / "17_side_by_side.py").read_text())
    tables = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "METHODS"
    ]
    return [ast.literal_eval(key) for key in tables[0].keys]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_results_say_how_they_were_made(path):
    result = json.loads(path.read_text())
    (chapter,) = (c for c in CHAPTERS.glob("*.py") if path.stem.startswith(c.stem))
    added = path.stem.removeprefix(chapter.stem)
    ((model, held_out),) = (base for base, name in BASES.items() if name == added)
    options = f" --model {model}" if added else ""
    options += f" --held-out {held_out}" if held_out else ""
    assert result["command"] == f"python chapters/{chapter.name}{options} --full"
    assert result.get("model", model) == model or not added
    assert "chapter.full" in chapter.read_text()
    assert {"minipeft", "python", "torch"} <= result["versions"].keys()
    assert result["seconds"] > 0
    assert len(set(result["seeds"])) == len(result["seeds"]) > 0


def test_every_method_of_the_chapter_has_a_result(result):
    assert list(result["methods"]) == entrants()
    assert list(result["step_seconds"]) == entrants()
    assert len(entrants()) == 12


def test_the_result_is_of_the_setting_that_the_chapter_describes(result):
    assert result["model"] == "tiny"
    assert result["steps"] == assigned("STEPS")
    assert result["seeds"] == list(assigned("SEEDS"))
    assert result["batch"] == list(assigned("SIZE"))


@pytest.mark.parametrize("name", entrants())
def test_every_seed_learned_and_none_is_a_copy_of_another(result, name):
    method = result["methods"][name]
    for kind in ("tuning", "validation"):
        losses = [run[kind] for run in method["runs"]]
        assert len(set(losses)) == len(losses)
        assert max(losses) < method["before"][kind]


@pytest.mark.parametrize("name", entrants())
def test_every_method_ran_with_every_seed(result, name):
    method = result["methods"][name]
    assert len(result["seeds"]) == len(method["runs"]) == 3
    for losses in (method["before"], *method["runs"]):
        assert losses.keys() == {"tuning", "validation", "novel"}
        assert all(math.isfinite(loss) for loss in losses.values())
    for kind in ("trained", "file_bytes", "memory_bytes", "seconds"):
        assert method[kind] > 0
    assert result["step_seconds"][name] > 0


@pytest.mark.parametrize("name", entrants())
def test_the_chosen_rate_has_worse_neighbours_on_both_sides(result, name):
    method = result["methods"][name]
    rates, runs = zip(*method["tried"], strict=True)
    losses = [run["tuning"] for run in runs]
    assert list(rates) == sorted(rates)
    best = rates.index(method["rate"])
    assert 0 < best < len(rates) - 1
    assert losses[best] == min(losses)
    # The sweep used the first seed, so its run is one of the three.
    assert runs[best] == method["runs"][0]
    ratios = [high / low for low, high in itertools.pairwise(rates)]
    assert all(3 < ratio < 3.4 for ratio in ratios)


def test_the_share_that_the_readme_tells_is_the_one_that_was_counted(result):
    full, thin = (result["methods"][n]["trained"] for n in ("full fine-tuning", "LoRA"))
    said = f"LoRA, which trains {100 * thin / full:.1f} % of the parameters"
    assert said in " ".join((CHAPTERS.parent / "README.md").read_text().split())
