"""The checks can fail: each mistake planted in a kernel is found by those named."""

from functools import cache

import pytest

from minipeft.cupy import kernels
from minipeft.cupy.executor import use
from tests.cuda.executors import CpuExecutor, LaunchError, PtxExecutor
from tests.cuda.mutation import CHECKS
from tests.cuda.ptx_parser import PtxError
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import compile_cpu, missing_for_cpu, missing_for_device

DTYPE = "float32"
SEEDS = range(3)
PLANTED = [
    pytest.param(row, mutation, check, id=f"{row}: {mutation.name}: {check}")
    for row, parts in ROWS.items()
    for mutation in parts.mutations
    for check in mutation.caught_by
]

# The words by which each check reports what it is there for.
REPORTS = {
    "values": r"differ, first at|off by|shim: ",
    "races": "ThreadSanitizer: data race",
    "addresses": r"AddressSanitizer: [\w-]+-overflow|runtime error: ",
    "ptx": "differ, first at|off by|out of bounds|misaligned|outside every buffer",
}


@cache
def program(row: str, check: str):
    """Build the mutants that a check must see, all in one program."""
    text = kernels.source(row)
    seen = [m for m in ROWS[row].mutations if check in m.caught_by]
    return compile_cpu(row, check, {m.name: m.apply(text) for m in seen}, [DTYPE])


def executors(row, mutation, check):
    if check == "ptx":
        yield PtxExecutor(mutants={row: mutation.apply(kernels.source(row))})
        return
    for seed in SEEDS:
        yield CpuExecutor(check, seed, {row: (program(row, check), mutation.name)})


def run(row, chosen):
    for executor in chosen:
        with use(executor):
            ROWS[row].small([DTYPE])


@pytest.mark.parametrize(("row", "mutation", "check"), PLANTED)
def test_a_mistake_is_found(row, mutation, check):
    missing = missing_for_device() if check == "ptx" else missing_for_cpu()
    if missing:
        pytest.skip(missing)
    chosen = list(executors(row, mutation, check))
    with pytest.raises((AssertionError, LaunchError, PtxError), match=REPORTS[check]):
        run(row, chosen)


@pytest.mark.parametrize("row", ROWS)
def test_every_check_is_put_to_the_test(row):
    used = {check for mutation in ROWS[row].mutations for check in mutation.caught_by}
    assert used == set(CHECKS)
