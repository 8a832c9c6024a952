"""Put a mistake under a check, and see whether the check reports it.

    python -m tests.cuda.mutation_runs [ROW …]   every mistake and check, as JSON

The tests ask only for the checks that *must* see a mistake. The table that this module
prints also says which others do, and which are blind to it.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from minipeft import kernels
from minipeft.cupy.executor import Executor, use
from tests.cuda.executors import CpuExecutor, LaunchError, PtxExecutor
from tests.cuda.mutation import CHECKS, Mutation
from tests.cuda.ptx_parser import PtxError
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import compile_cpu, missing_for_cpu, missing_for_device

DTYPE = "float32"
SEEDS = range(3)
FAILURES = (AssertionError, LaunchError, PtxError)

# The words by which each check reports a failure of its own kind.
REPORTS = {
    "values": r"differ, first at|off by|shim: ",
    "races": "ThreadSanitizer: data race",
    "addresses": r"AddressSanitizer: [\w-]+-overflow|runtime error: ",
    "ptx": "differ, first at|off by|out of bounds|misaligned|outside every buffer",
}


@cache
def program(row: str, check: str, mutations: tuple[Mutation, ...]) -> Path:
    """Build all mutants of a row in one program."""
    text = kernels.source(row)
    return compile_cpu(row, check, {m.name: m.apply(text) for m in mutations}, [DTYPE])


def executors(
    row: str, mutation: Mutation, check: str, mutations: tuple[Mutation, ...]
) -> Iterator[Executor]:
    """Yield executors that run the mutant in several orders, from one build."""
    if check == "ptx":
        yield PtxExecutor(mutants={row: mutation.apply(kernels.source(row))})
        return
    built = program(row, check, mutations)
    for seed in SEEDS:
        yield CpuExecutor(check, seed, {row: (built, mutation.name)})


def run(row: str, chosen: Iterable[Executor]) -> None:
    """Run the few launches of a row on each executor, and compare."""
    for executor in chosen:
        with use(executor):
            ROWS[row].small([DTYPE])


def planted(check: str) -> list[ParameterSet]:
    """Return the mistakes that this check must find: row and mutation."""
    return [
        pytest.param(row, mutation, id=f"{row}: {mutation.name}")
        for row, parts in ROWS.items()
        for mutation in parts.mutations
        if check in mutation.caught_by
    ]


def must_see(row: str, mutation: Mutation, check: str) -> None:
    """Fail if the check does not find the mistake, or reports it in other words."""
    together = tuple(m for m in ROWS[row].mutations if check in m.caught_by)
    chosen = list(executors(row, mutation, check, together))  # a failed build is none
    with pytest.raises(FAILURES, match=REPORTS[check]):
        run(row, chosen)


def reported(row: str, mutation: Mutation, check: str) -> bool:
    """Return whether the check finds the mistake and reports it in its own words."""
    for executor in executors(row, mutation, check, ROWS[row].mutations):
        try:
            run(row, [executor])
        except FAILURES as failure:
            if re.search(REPORTS[check], str(failure)):
                return True
    return False


def main(rows: list[str]) -> int:
    """Print for each row and mistake the checks that must find it and that do."""
    if missing := missing_for_cpu() or missing_for_device():
        print(missing, file=sys.stderr)
        return 2
    began = time.perf_counter()
    trials = []
    for row in rows or ROWS:
        for mutation in ROWS[row].mutations:
            seen = [check for check in CHECKS if reported(row, mutation, check)]
            must = list(mutation.caught_by)
            trial = {"row": row, "mistake": mutation.name, "must": must, "seen": seen}
            trials.append(trial)
            print(f"{row}: {mutation.name}: {seen}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    table = {"seeds": list(SEEDS), "dtype": DTYPE, "seconds": seconds, "trials": trials}
    print(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
