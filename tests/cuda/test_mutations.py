"""The checks can fail: each mistake planted in a kernel is found by those named."""

import json
from pathlib import Path

import pytest

from tests.cuda import trials
from tests.cuda.mutation import CHECKS
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import missing_for_cpu, missing_for_device

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "chapters" / "results" / "19_kernels_without_a_gpu.json"
PLANTED = [
    pytest.param(row, mutation, check, id=f"{row}: {mutation.name}: {check}")
    for row, parts in ROWS.items()
    for mutation in parts.mutations
    for check in mutation.caught_by
]


@pytest.mark.parametrize(("row", "mutation", "check"), PLANTED)
def test_a_mistake_is_found(row, mutation, check):
    missing = missing_for_device() if check == "ptx" else missing_for_cpu()
    if missing:
        pytest.skip(missing)
    together = tuple(m for m in ROWS[row].mutations if check in m.caught_by)
    chosen = list(trials.executors(row, mutation, check, together))
    with pytest.raises(trials.FAILURES, match=trials.REPORTS[check]):
        trials.run(row, chosen)


@pytest.mark.parametrize("row", ROWS)
def test_every_check_is_put_to_the_test(row):
    used = {check for mutation in ROWS[row].mutations for check in mutation.caught_by}
    assert used == set(CHECKS)


def test_the_table_in_the_book_is_of_these_mistakes():
    """If not: python chapters/19_kernels_without_a_gpu.py --full."""
    published = json.loads(TABLE.read_text())["trials"]
    ours = [
        (row, mutation.name, list(mutation.caught_by))
        for row, parts in ROWS.items()
        for mutation in parts.mutations
    ]
    assert [(t["row"], t["mistake"], t["must"]) for t in published] == ours
    assert all(set(t["must"]) <= set(t["seen"]) <= set(CHECKS) for t in published)
