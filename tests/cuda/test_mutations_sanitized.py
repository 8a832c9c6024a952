"""Mistakes planted in the kernels are found by sanitizers; see test_mutations.py."""

import pytest

from tests.cuda import mutation_runs
from tests.cuda.toolchain import needs_cpu_build

pytestmark = needs_cpu_build


@pytest.mark.parametrize(("row", "mutation"), mutation_runs.planted("races"))
def test_races_are_seen(row, mutation):
    mutation_runs.must_see(row, mutation, "races")


@pytest.mark.parametrize(("row", "mutation"), mutation_runs.planted("addresses"))
def test_wrong_addresses_are_seen(row, mutation):
    mutation_runs.must_see(row, mutation, "addresses")
