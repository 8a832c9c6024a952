"""Without a GPU the column imports; the first use says what is missing."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minipeft.cupy import blockwise, executor
from minipeft.errors import InputError
from minipeft.kernels import compiler


def test_importing_needs_no_cupy():
    """In a clean interpreter `import cupy` fails; the first use names the remedy."""
    program = (
        "import sys; sys.modules['cupy'] = None\n"
        "from minipeft.cupy import blockwise\n"
        "from minipeft.errors import InputError\n"
        "import numpy as np\n"
        "try: blockwise.quantize(np.zeros(4, np.float32))\n"
        "except InputError as error: print(error)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said.count("\n") == 1
    assert "pip install '.[cupy]'" in said


def test_compiling_needs_no_gpu(monkeypatch):
    pytest.importorskip("cuda.bindings")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert compiler.missing() is None
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InputError, match=r"`pip install '..cupy12.'` for CUDA 12"):
        compiler.compile_row("blockwise", "80")


def test_no_headers_is_one_sentence(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda _: None)
    with pytest.raises(InputError, match="`pip install nvidia-cuda-runtime`"):
        compiler.headers()


def test_a_gpu_that_the_compiler_does_not_know_is_named():
    pytest.importorskip("cuda.bindings")
    with pytest.raises(InputError, match="does not know the architecture sm_999"):
        compiler.compile_row("blockwise", "999")


def test_no_bfloat16_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(InputError, match="`pip install ml-dtypes`"):
        executor.numpy_dtype("bfloat16")


def test_no_device_is_one_sentence(monkeypatch):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda, "is_available", lambda: False)
    executor._device.cache_clear()
    with pytest.raises(InputError, match="finds no CUDA device: install or update"):
        blockwise.quantize(np.zeros(4, np.float32))


def test_no_compiler_is_one_sentence(monkeypatch):
    cupy = pytest.importorskip("cupy")

    def absent():
        raise RuntimeError("libnvrtc.so.13 not found")

    monkeypatch.setattr(cupy.cuda, "is_available", lambda: True)
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(nvrtc, "nvrtcVersion", absent)
    executor._device.cache_clear()
    with pytest.raises(InputError, match="`pip install nvidia-cuda-nvrtc`"):
        blockwise.quantize(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("marker", "outcome"),
    [("gpu", "skipped"), ("no_gpu", "skipped"), ("slow", "failed")],
)
def test_in_ci_a_gpu_excuses_a_skip_missing_or_there(monkeypatch, marker, outcome):
    from tests import conftest

    monkeypatch.setattr(conftest, "IN_CI", True)
    item = SimpleNamespace(get_closest_marker=lambda name: name == marker or None)
    report = SimpleNamespace(outcome="skipped", skipped=True)
    call = SimpleNamespace(excinfo=SimpleNamespace(value="there is a GPU"))
    hook = conftest.pytest_runtest_makereport(item, call)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert report.outcome == outcome


WITH_A_DEVICE = re.compile(r"is_available\(\)|(?<!\.)missing\(\)|a GPU|CUDA device")


def excused(part):
    return bool(re.search(r"pytest\.mark\.(no_)?gpu\b", ast.unparse(part)))


def skips_for_a_gpu(part):
    calls = [ast.unparse(n) for n in ast.walk(part) if isinstance(n, ast.Call)]
    skips = [c for c in calls if re.match(r"pytest\.(mark\.)?skip(if)?\(", c)]
    return any(WITH_A_DEVICE.search(call) for call in skips)


def test_each_skip_for_a_gpu_carries_a_marker_that_excuses_it():
    """The file, or the function with the skip, is marked `gpu` or `no_gpu`."""
    found = []
    for path in sorted(Path(__file__).parents[1].rglob("test_*.py")):
        text = path.read_text("utf-8")
        if "skip" not in text or not WITH_A_DEVICE.search(text):
            continue
        body = ast.parse(text).body
        whole = any(excused(part) for part in body if isinstance(part, ast.Assign))
        for part in body:
            if skips_for_a_gpu(part):
                found.append((path.name, whole or excused(part)))
    assert len(found) >= 7
    assert [name for name, marked in found if not marked] == []
