"""The vectors find every bug in `tests/impls/broken/`, and name it by its flag."""

import tomllib
from pathlib import Path

import pytest

from minipeft.golden.operations import OPERATIONS
from minipeft.golden.vectors import load_all
from tests.impls.broken import BUGS
from tests.impls.museum import ROWS, exhibits, failures, file_of


@pytest.mark.parametrize("name", BUGS)
def test_every_bug_is_found_and_named(name):
    flags = {flag for outcome in failures(name) for flag in outcome.case.flags}
    assert BUGS[name].flag in flags


@pytest.mark.parametrize("name", [name for name, bug in BUGS.items() if bug.only])
def test_a_bug_that_few_cases_find_is_found_by_them_alone(name):
    assert tuple(outcome.case.comment for outcome in failures(name)) == BUGS[name].only


@pytest.mark.parametrize("name", BUGS)
def test_no_bug_fails_everything(name):
    assert len(failures(name)) < len(file_of(BUGS[name].operation).cases)


def test_every_row_has_bugs():
    assert set(ROWS) == {operation.row for operation in OPERATIONS.values()}


@pytest.mark.parametrize("row", ROWS)
def test_every_flag_is_tripped_by_a_bug(row):
    files = {file.name: file for file in load_all([row])}
    used = {flag for file in files.values() for c in file.cases for flag in c.flags}
    outcomes = [o for name in BUGS for o in failures(name) if o.file in files]
    assert used == {flag for outcome in outcomes for flag in outcome.case.flags}


def test_the_museum_has_forty_bugs_each_found_under_its_flag():
    shown = exhibits()
    assert len({exhibit.name for exhibit in shown}) >= 40
    for exhibit in shown:
        operation, number = exhibit.vector.split(":")
        (case,) = (c for c in file_of(operation).cases if c.tcId == int(number))
        assert exhibit.flag in case.flags


def test_a_mutant_that_survives_with_a_reason_is_of_a_line_that_is_there():
    root = Path(__file__).parents[2]
    listed = tomllib.loads((root / "tools/mutants.toml").read_text("utf-8"))["survivor"]
    for entry in listed:
        folder = root / "minipeft" / entry.get("column", "reference")
        text = (folder / f"{entry['module']}.py").read_text("utf-8")
        assert entry["at"] in map(str.strip, text.splitlines())
        assert entry["reason"].endswith(".")
