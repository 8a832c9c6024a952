"""The CUDA kernels pass the vectors: compiled for the CPU, and on a GPU if present."""

import shutil
import subprocess
import sys

import pytest

from minipeft.cupy.executor import missing, use
from minipeft.golden.implementations import functions
from minipeft.golden.runner import verify
from minipeft.golden.vectors import load_all
from tests.cuda.executors import CpuExecutor


def test_the_kernels_pass_on_a_cpu():
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU")
    with use(CpuExecutor()):
        outcomes = list(verify(functions("cupy"), load_all(["blockwise"])))
    failed = [(o.file, o.case.tcId, o.detail) for o in outcomes if o.status != "pass"]
    assert not failed


@pytest.mark.gpu
def test_the_kernels_pass_on_a_gpu():
    if missing():
        pytest.skip(str(missing()))
    command = [sys.executable, "-m", "minipeft.cli", "verify", "cupy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_gpu_one_sentence_says_so():
    if missing() is None:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "minipeft.cli", "verify", "cupy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "minipeft: CuPy" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
