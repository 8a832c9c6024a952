"""The torch column in `torch.compile(fullgraph=True)`; compiled.py has the checks."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.properties import compiled, modules

NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")),
    reason="torch.compile needs a C++ compiler, such as g++",
)


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.properties.compiled"]
    # Without trying the compiler on the instructions of each generation of processors,
    # and without a process of workers, each of which imports torch.
    settings = {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **settings}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("check", [c.__name__ for c in compiled.CHECKS])
def test_compiled(report, check):
    passed = f"passed {check}\n" in report.stdout
    assert passed, report.stdout + report.stderr


def test_every_module_that_computes_is_among_them():
    names = {check.__name__ for check in compiled.CHECKS}
    assert set(modules.EXAMPLES) == modules.computing()
    for module, builds in modules.EXAMPLES.items():
        assert names & {f"module_{build.__name__}" for build in builds}, module
