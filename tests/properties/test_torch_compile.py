"""The torch column inside `torch.compile(fullgraph=True)`; the laws are in compiled."""

import shutil
import subprocess
import sys

import pytest

from tests.properties import compiled

NEEDS_COMPILER = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")),
    reason="torch.compile needs a C++ compiler, such as g++",
)


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "tests.properties.compiled"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("check", [c.__name__ for c in compiled.CHECKS])
def test_compiled(report, check):
    passed = f"passed {check}\n" in report.stdout
    assert passed, report.stdout + report.stderr
