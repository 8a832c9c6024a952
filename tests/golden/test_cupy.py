"""The CUDA kernels pass the vectors: compiled for the CPU, and on a GPU if present."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from minipeft.cupy import paged
from minipeft.cupy.executor import missing, use
from minipeft.golden.implementations import functions
from minipeft.golden.runner import verify
from minipeft.golden.vectors import load_all
from tests.cuda import mutation_runs
from tests.cuda.executors import CpuExecutor
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import needs_cpu_build
from tests.golden.commands import ROOT
from tests.golden.test_verify import SLOWNESS

# The column does not train or merge and makes no tables. Its kernels take no rows of
# another length than a multiple of 8 codes, no tables of a caller, and no bias.
ABSENT = {"qlora_backward", "qlora_requantize", "codebook_normal_float"}
SKIPPED = {"qlora_forward": {1, 3, 4, 11, 13, 14}, "codebook_table": {3, 4}}
SKIPPED |= {"lora_batched_forward": {11, 25, 26}}

# For each kernel a mistake that only the vectors find.
MISTAKES = {
    "blockwise": "a tie goes up",
    "double_quant": "the next block's scale",
    "adamw": "v from the new gradient only",
    "qlora": "swapped nibbles",
}
SECONDS = 15  # for all cases of a column
ALL = [*MISTAKES, "paged", "codebook", "lora_batched"]


def outcomes(row, executor, status):
    with use(executor):
        found = list(verify(functions("cupy"), load_all([row])))
    return [(o.file, o.case.tcId, o.detail) for o in found if o.status == status]


@needs_cpu_build
@pytest.mark.parametrize("row", ALL)
def test_the_kernels_pass_on_a_cpu(row):
    assert not outcomes(row, CpuExecutor(), "fail")


@needs_cpu_build
@pytest.mark.parametrize("row", ALL)
def test_nothing_else_is_skipped(row):
    for file, number, reason in outcomes(row, CpuExecutor(), "skip"):
        operation = file.removesuffix(".json")
        absent = reason == f"cupy has no function {operation}"
        assert operation in ABSENT if absent else number in SKIPPED[operation]


@needs_cpu_build
@pytest.mark.parametrize("row", MISTAKES)
def test_a_mistake_in_a_kernel_is_found(row):
    seen = tuple(m for m in ROWS[row].mutations if "values" in m.caught_by)
    built = mutation_runs.program(row, "values", seen)
    assert outcomes(row, CpuExecutor(mutants={row: (built, MISTAKES[row])}), "fail")


@needs_cpu_build
def test_a_mistake_in_the_page_table_is_found(monkeypatch):
    def first_in_first_out(p, page):
        return p if page in p.device else touch(p, page)

    touch = paged.touch
    monkeypatch.setattr(paged, "touch", first_in_first_out)
    assert outcomes("paged", CpuExecutor(), "fail")


@needs_cpu_build
def test_a_write_back_that_is_forgotten_is_found(monkeypatch):
    def clean(p, page):
        return evict(replace(p, device=dict.fromkeys(p.device, False)), page)

    evict = paged.evict
    monkeypatch.setattr(paged, "evict", clean)
    assert outcomes("paged", CpuExecutor(), "fail")


@pytest.mark.gpu
def test_the_kernels_pass_on_a_gpu():
    if missing():
        pytest.skip(str(missing()))
    command = [sys.executable, "-m", "minipeft.cli", "verify", "cupy"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert time.perf_counter() - begun < SECONDS * SLOWNESS
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_run_on_a_gpu_that_is_recorded_took_seconds():
    steps = json.loads((ROOT / "chapters/results/gpu/gpu.json").read_text())["steps"]
    page = " ".join((ROOT / "site/verify.md").read_text("utf-8").split())
    took = [steps[f"vectors, {column}"]["seconds"] for column in ("cupy", "torch")]
    assert took[0] < SECONDS
    assert f"CuPy's column took {took[0]:.1f} s, and torch's" in page
    assert f"`--device cuda` {took[1]:.1f} s." in page


@pytest.mark.no_gpu
def test_without_a_gpu_one_sentence_says_so():
    if missing() is None:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "minipeft.cli", "verify", "cupy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "minipeft: CuPy" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
