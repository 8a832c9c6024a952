"""The checks can fail: each planted mistake is found by the checks that it names.

This file runs the check of values; the two files beside it run the sanitizers and the
PTX.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cuda import mutation_runs
from tests.cuda.mutation import CHECKS
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import needs_cpu_build, needs_nvrtc

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "chapters" / "results" / "19_kernels_without_a_gpu.json"


@needs_cpu_build
@pytest.mark.parametrize(("row", "mutation"), mutation_runs.planted("values"))
def test_wrong_values_are_seen(row, mutation):
    mutation_runs.must_see(row, mutation, "values")


@pytest.mark.parametrize("row", ROWS)
def test_every_check_is_put_to_the_test(row):
    used = {check for mutation in ROWS[row].mutations for check in mutation.caught_by}
    assert used == set(CHECKS)


@needs_nvrtc
@needs_cpu_build
def test_the_table_says_what_a_check_sees_and_to_what_it_is_blind(monkeypatch, capsys):
    blind = mutation_runs.ROWS["adamw"].mutations[1]
    assert blind.caught_by == ("races",)
    rows = {"adamw": replace(ROWS["adamw"], mutations=(blind,)), "paged": ROWS["paged"]}
    monkeypatch.setattr(mutation_runs, "ROWS", rows)
    monkeypatch.setattr(mutation_runs, "CHECKS", ("ptx",))
    assert mutation_runs.main([]) == 0
    table = json.loads(capsys.readouterr().out)
    seen = {t["mistake"]: t["seen"] for t in table["trials"]}
    assert seen == {
        blind.name: [],
        **{m.name: ["ptx"] for m in ROWS["paged"].mutations},
    }


def test_the_table_in_the_book_is_of_these_mistakes():
    """If the table differs: python chapters/19_kernels_without_a_gpu.py --full."""
    published = json.loads(TABLE.read_text())["trials"]
    ours = [
        (row, mutation.name, list(mutation.caught_by))
        for row, parts in ROWS.items()
        for mutation in parts.mutations
    ]
    assert [(t["row"], t["mistake"], t["must"]) for t in published] == ours
    assert all(set(t["must"]) <= set(t["seen"]) <= set(CHECKS) for t in published)
