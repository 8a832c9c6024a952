"""No kernel uses more of a GPU than budget.json allows."""

import pytest

from tests.cuda import budget
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import ARCHITECTURES, needs_listing

pytestmark = needs_listing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("row", ROWS)
def test_within_the_budget(row, architecture):
    allowed = budget.load()
    complaints = [
        f"{name}: {complaint}"
        for name, usage in budget.measure(row, architecture).items()
        for complaint in budget.worse(usage, allowed[name])
    ]
    assert not complaints, (
        "\n".join(complaints) + "\nIf that is meant: python -m tests.cuda.budget"
    )


def test_the_budget_names_every_instance_and_no_other():
    measured = {
        n for row in ROWS for a in ARCHITECTURES for n in budget.measure(row, a)
    }
    assert measured == set(budget.load())


@pytest.mark.parametrize("column", budget.COLUMNS)
def test_worse_is_noticed_in_every_column(column):
    allowed = next(iter(budget.load().values()))
    step = 1 if column in budget.SMALLER_IS_BETTER else -1
    measured = {**allowed, column: allowed[column] + step}
    assert budget.worse(measured, allowed) == [
        f"{column} {allowed[column]} -> {measured[column]}"
    ]
    assert not budget.worse(allowed, allowed)
