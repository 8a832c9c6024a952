"""Mistakes planted in the kernels are found in the PTX; see test_mutations.py."""

import pytest

from tests.cuda import mutation_runs
from tests.cuda.toolchain import needs_nvrtc


@needs_nvrtc
@pytest.mark.parametrize(("row", "mutation"), mutation_runs.planted("ptx"))
def test_mistakes_are_seen_in_ptx(row, mutation):
    mutation_runs.must_see(row, mutation, "ptx")
