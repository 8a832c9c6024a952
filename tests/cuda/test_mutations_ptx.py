"""Mistakes planted in the kernels are found in the PTX; see test_mutations."""

import pytest

from tests.cuda import trials
from tests.cuda.toolchain import needs_nvrtc


@needs_nvrtc
@pytest.mark.parametrize(("row", "mutation"), trials.planted("ptx"))
def test_mistakes_are_seen_in_ptx(row, mutation):
    trials.must_see(row, mutation, "ptx")
