"""The cost of a method: its files, their lines, and the other files that name it."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES, LINES, EDITS = 8, 600, 4
CODE = (".py", ".toml", ".yml", ".md", ".cu", ".cuh", ".txt", "Makefile")
ROWS = ("hira", "miss")

# Programs write these: vectors, schemas, the list of functions, the map of the README.
WRITTEN = (
    "minipeft/golden/v1/",
    "minipeft/golden/schema/",
    "minipeft/golden/README.md",
)
WRITTEN += ("minipeft/golden/manifest.json", "README.md", "results/")
# Not counted: the chapter and its citations, drivers and tests of peers, this test, and
# the page about the cost of a method.
CHAPTER = (
    "chapters/",
    "site/bibliography.yml",
    "site/glossary.yml",
    "site/notation.md",
)
CHAPTER += ("site/hooks/parts.yml",)
PEERS = ("minipeft/golden/drivers/peft/", "tests/golden/test_peers.py")
# By hand, after a run of `make mutants`: what no vector can tell from the right code.
SURVIVORS = ("tools/mutants.toml",)
# A row is complete without these: what files, memory counts, batches and the capstone
# offer for it.
SERVICES = (
    "minipeft/interop/",
    "minipeft/lab/memory/",
    "minipeft/torch/lora_batched.py",
    "minipeft/lab/recipe.py",
)
TESTS_OF_SERVICES = ("tests/interop/", "tests/lab/", "site/works.md", "site/peft.md")
TESTS_OF_SERVICES += ("tests/properties/test_lora_batched.py",)
TESTS_OF_SERVICES += ("tests/properties/adapted_networks.py",)
TESTS_OF_SERVICES += ("tests/properties/on_a_device.py",)
NOT_COUNTED = (*WRITTEN, *CHAPTER, *PEERS, *SURVIVORS, *SERVICES, *TESTS_OF_SERVICES)
NOT_COUNTED += ("tests/book/test_row.py", "CONTRIBUTING.md")


def tracked(root: Path) -> list[str]:
    command = ["git", "-C", str(root), "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (root / name).is_file()]


def counted(root: Path) -> list[str]:
    return [name for name in tracked(root) if not name.startswith(NOT_COUNTED)]


def own(root: Path, row: str) -> list[str]:
    return [n for n in counted(root) if Path(n).stem in (row, f"test_{row}")]


def elsewhere(root: Path, row: str) -> list[str]:
    """Return the files of others that name the row, in code or in a table."""
    # Not every "miss" in a sentence is the row.
    kind = {"hira": "HiRA", "miss": "MiSS"}[row]
    name = rf"(?<![\w ]){row}(?![\w ])|import {row}\b|\b{row}_\w"
    named = re.compile(rf"{kind}|{name}|^ *{row}\b", re.MULTILINE)
    mine = own(root, row)
    code = [n for n in counted(root) if n.endswith(CODE) and n not in mine]
    return [n for n in code if named.search((root / n).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_costs_few_files_few_lines_and_few_edits(row):
    files = own(ROOT, row)
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in files)
    assert len(files) <= FILES, files
    assert lines <= LINES, f"{lines} lines in {files}"
    edits = elsewhere(ROOT, row)
    assert len(edits) <= EDITS, edits


@pytest.mark.parametrize("row", ROWS)
def test_contributing_lists_these_files_and_no_others(row):
    said = re.sub(r"\s+", " ", (ROOT / "CONTRIBUTING.md").read_text())
    for name in own(ROOT, row):
        assert f"`{name.replace(row, 'NAME')}`" in said
    for name in (*elsewhere(ROOT, row), *SERVICES):
        assert f"`{name}`" in said


def test_a_file_a_line_and_an_edit_too_many_are_found(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "hira.py").write_text("a\nb\n")
    (tmp_path / "test_hira.py").write_text("c\n")
    (tmp_path / "rows.py").write_text("from x import hira\nHiRA = hira.HiRA\n")
    (tmp_path / "others.py").write_text("a shira, and hiragana\n")
    assert sorted(own(tmp_path, "hira")) == ["hira.py", "test_hira.py"]
    assert elsewhere(tmp_path, "hira") == ["rows.py"]
