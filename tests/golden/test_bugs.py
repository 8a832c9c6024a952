"""The vectors bite: every bug in `tests/impls/broken/` is found, by its flag."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import pytest

from minipeft.golden.implementations import Functions
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.runner import verify
from minipeft.golden.vectors import load_all
from tests.impls import broken
from tests.impls.broken import BUGS

ROWS = [module.name for module in iter_modules(broken.__path__)]
for row in ROWS:
    import_module(f"tests.impls.broken.{row}")


@cache
def file_of(operation):
    (file,) = load_all([operation])
    return file


@cache
def failures(name):
    bug = BUGS[name]
    broken = Functions(name, {bug.operation: bug.function}.get)
    outcomes = verify(broken, [file_of(bug.operation)])
    return [o for o in outcomes if o.status in ("fail", "policy")]


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
