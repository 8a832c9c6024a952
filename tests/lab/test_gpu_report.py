"""`minipeft gpu-report` as a whole, with a CPU as the device and a false clock.

Only CuPy's own calls are missing; a stand-in checks their order.
"""

import io
import json
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from minipeft import cli, kernels
from minipeft.cupy.executor import missing, use
from minipeft.errors import InputError
from minipeft.lab import machine_code
from minipeft.lab.gpu import (
    device,
    examination,
    gpu_report,
    peers,
    trials,
)
from minipeft.lab.gpu.examination import Ceilings, Checked
from minipeft.lab.gpu.launches import Launch
from minipeft.lab.gpu.trials import TABLE, Sizes
from tests.cuda import toolchain
from tests.cuda.executors import CpuExecutor
from tests.cuda.toolchain import needs_cpu_build

pytestmark = pytest.mark.slow

SIZES = Sizes(out_features=32, in_features=256, r=4, adapters=3)
FILES = {"gpu-report.md", "gpu-report.json"}
INSTANCES = {
    (f"{kernel.row}.{kernel.template} {note}".strip(), dtype)
    for kernel, note, _ in TABLE
    for dtype in kernel.dtypes or ("float32",)
}
COUNTERPARTS = {
    "blockwise.quantize NF4",
    "blockwise.quantize FP4",
    "blockwise.dequantize NF4",
    "blockwise.dequantize FP4",
    "qlora.product",
    "adamw.adamw_8bit",
}
TICK = 2e-6
SLOTS = 1e12  # instructions a second


class FakeDevice:
    """Every call takes two microseconds; a copy takes one millisecond."""

    place = "cpu"

    def facts(self):
        return {"name": "A CPU", "memory": "1 GB"}

    def pace(self):
        return "90", SLOTS

    def elapsed(self, call):
        return 1e-3 if call == self.copy else TICK

    def copy(self):
        pass

    def copying(self, size):
        assert size == examination.COPIED
        return self.copy

    def multiplying(self, dtype, n):
        if dtype == "tf32":
            raise InputError("needs torch with CUDA")
        return lambda: None


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(device, "ROUNDS", 3)
    monkeypatch.setattr(device, "WARM_UPS", 1)
    monkeypatch.setattr(device, "CupyDevice", FakeDevice)
    monkeypatch.setattr(trials, "Sizes", lambda *of: SIZES)
    monkeypatch.setattr(examination, "in_turn", here)
    monkeypatch.setattr(machine_code, "disassemble", toolchain.disassemble)


def here(tasks):
    """Examine in this process, on the stand-ins."""
    return (examination.examined(task, FakeDevice()) for task in tasks)


def made(folder, executor):
    """Run the command on a stand-in for the GPU; return its exit code and its files."""
    with use(executor):
        code = cli.main(["gpu-report", "--out", str(folder)])
    return code, json.loads((folder / "gpu-report.json").read_text())


def only(monkeypatch, *templates):
    """Leave some kernels only in the table."""
    table = [row for row in TABLE if row[0].template in templates]
    monkeypatch.setattr(examination, "TABLE", table)


@needs_cpu_build
def test_the_whole_report(tmp_path, capsys):
    code, found = made(tmp_path / "new", CpuExecutor())
    said = capsys.readouterr()
    assert code == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    assert said.out == (tmp_path / "new" / "gpu-report.md").read_text()
    assert {(k["kernel"], k["dtype"]) for k in found["kernels"]} == INSTANCES
    progress = [line for line in said.err.splitlines() if line.endswith(" 2.0 µs")]
    assert len(progress) == len(INSTANCES)
    assert found["bandwidth"] == 2 * examination.COPIED / 1e-3
    assert found["products"]["float16"] == 2 * examination.MATRIX**3 / TICK
    assert found["products"]["tf32"] == "needs torch with CUDA"
    assert {k["seconds"] for k in found["kernels"]} == {TICK}
    assert {k["in_a_row"] for k in found["kernels"]} == {TICK / examination.LAYERS}
    assert "WRONG" not in said.out
    beside = {k["kernel"] for k in found["kernels"] if k["peer"] is not None}
    assert beside == COUNTERPARTS


class Spoiled(CpuExecutor):
    """A device on which one kernel writes a wrong bit and another does not run."""

    def launch(self, kernel, dtype, args):
        if (kernel.template, dtype) == ("row_norm", "float32"):
            raise RuntimeError("an illegal memory access\nand more")
        super().launch(kernel, dtype, args)
        if (kernel.template, dtype) == ("expand", "float16"):
            out = args[list(kernel.arguments).index("out")]
            out.reshape(-1).view(np.uint8)[5] ^= 1


@needs_cpu_build
def test_a_wrong_kernel_is_named_and_not_timed(tmp_path, capsys, monkeypatch):
    only(monkeypatch, "shrink", "expand", "row_norm")
    code, found = made(tmp_path, Spoiled())
    said = capsys.readouterr()
    assert code == 1
    wrong = {(k["kernel"], k["dtype"]): k["wrong"] for k in found["kernels"]}
    sentences = {name: text for name, text in wrong.items() if text}
    assert sentences == {
        ("lora_batched.expand", "float16"): "1 of 96 values of out differ, first at 2",
        ("dora.row_norm", "float32"): "does not run: an illegal memory access",
    }
    for (kernel, dtype), sentence in sentences.items():
        assert f"- {kernel} {dtype}: {sentence}" in said.out.splitlines()
        assert f"| {kernel} | {dtype} | **WRONG** |" in said.out
        assert f"{kernel} {dtype}: WRONG" in said.err.splitlines()
    for k in found["kernels"]:
        assert k["seconds"] == (0 if k["wrong"] else TICK)


def test_too_little_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    class Crowded(FakeDevice):
        def copying(self, size):
            raise MemoryError(f"out of memory allocating {size} bytes")

    monkeypatch.setattr(device, "CupyDevice", Crowded)
    with use(CpuExecutor()):
        assert cli.main(["gpu-report", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "minipeft: the device has too little free memory (out of mem" in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_too_little_memory_for_one_kernel_is_its_verdict(tmp_path, monkeypatch):
    class Full(CpuExecutor):
        def empty(self, shape, dtype, device):
            raise MemoryError("out of memory allocating 512 bytes")

    only(monkeypatch, "shrink")
    code, found = made(tmp_path, Full())
    assert code == 1
    assert {k["wrong"] for k in found["kernels"]} == {
        "does not run: too little free memory (out of memory allocating 512 bytes)"
    }


# A process for each kernel

SAYS_A_ROW = """
import json, sys
task = json.loads(sys.stdin.readline())
assert sys.stdin.readline() == "go\\n"
if task["dtype"] == "float16":
    print("cudaErrorIllegalAddress", file=sys.stderr)
    sys.exit(134)
if task["dtype"] == "bfloat16":
    import subprocess  # the child outlives its parent, and holds the pipes open
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
print("a library that talks")
print(json.dumps({"kernel": "k", "dtype": task["dtype"], "seconds": 1e-6}))
"""


def test_a_kernel_that_kills_its_process_spoils_no_other(tmp_path, monkeypatch):
    monkeypatch.undo()
    worker = (sys.executable, "-c", SAYS_A_ROW)
    monkeypatch.setattr(examination, "WORKER", worker)
    monkeypatch.setattr(examination, "LIMIT", 2)
    monkeypatch.setattr(device, "ROUNDS", 1)
    table = [row for row in TABLE if row[0].template in ("shrink", "expand")]
    monkeypatch.setattr(examination, "TABLE", table)
    written = []
    write = gpu_report.write
    monkeypatch.setattr(gpu_report, "write", lambda *a: (written.append(1), write(*a)))
    began = time.monotonic()
    assert gpu_report.run(tmp_path, FakeDevice(), SIZES) == 1
    assert time.monotonic() - began < 60
    found = json.loads((tmp_path / "gpu-report.json").read_text())["kernels"]
    assert len(written) == len(found) == 6  # after each
    verdicts = [
        None,
        "does not run: its process ended with 134: cudaErrorIllegalAddress",
        "does not end within 2 seconds",
    ]
    assert [k["wrong"] for k in found] == verdicts * 2


NOTES_ITS_TIMES = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
task = json.loads(sys.stdin.readline())
(folder / str(os.getpid())).touch()
print("x" * 10**6, file=sys.stderr)  # more than a pipe holds
sys.stdin.readline()
times = [time.monotonic()]
while len(list(folder.iterdir())) < 3:
    time.sleep(0.01)
times.append(time.monotonic())
print(json.dumps({"kernel": json.dumps(times), "dtype": task["dtype"]}))
"""


@pytest.fixture
def _three_at_once(monkeypatch, tmp_path):
    """Workers that have the device until three of them have begun."""
    monkeypatch.undo()
    worker = (sys.executable, "-c", NOTES_ITS_TIMES, str(tmp_path))
    monkeypatch.setattr(examination, "WORKER", worker)
    monkeypatch.setattr(examination, "AT_ONCE", 3)


TASKS = [
    examination.Task(0, dtype, SIZES, Ceilings(1e12, {})) for dtype in ("a", "b", "c")
]


@pytest.mark.usefixtures("_three_at_once")
def test_several_processes_prepare_and_one_uses_the_device():
    rows = list(examination.in_turn(TASKS))
    assert [(row.dtype, row.wrong) for row in rows] == [
        (task.dtype, None) for task in TASKS
    ]
    times = [t for row in rows for t in json.loads(row.kernel)]
    assert times == sorted(times)


def test_a_process_that_dies_before_it_gets_its_task_spoils_no_other(monkeypatch):
    monkeypatch.undo()
    start = subprocess.Popen

    def started(*of, **how):
        process = start(*of, **how)
        process.wait()
        return process

    monkeypatch.setattr(subprocess, "Popen", started)
    worker = (sys.executable, "-c", "import sys; sys.exit('no memory')")
    monkeypatch.setattr(examination, "WORKER", worker)
    verdict = "does not run: its process ended with 1: no memory"
    assert [row.wrong for row in examination.in_turn(TASKS)] == [verdict] * 3


def test_a_process_whose_report_ended_does_not_use_the_device(monkeypatch, capsys):
    """Its turn never came, and the next report may have begun."""
    given = io.StringIO(json.dumps(asdict(TASKS[0])) + "\n")
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(examination, "examined", lambda task, device, turn: turn())
    with pytest.raises(SystemExit, match="the report ended before"):
        examination.main()
    assert not capsys.readouterr().out


@pytest.mark.usefixtures("_three_at_once")
def test_processes_that_wait_end_with_the_report(monkeypatch):
    begun, start = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: begun.append(start(*a, **k)) or begun[-1]
    )
    rows = examination.in_turn(TASKS)
    next(rows)
    rows.close()
    assert [process.returncode for process in begun] == [0, -9, -9]


def test_the_host_is_done_before_the_device_is_asked_for():
    """Nothing of a trial touches the device before its turn."""

    class Refusing(CpuExecutor):
        def __getattribute__(self, name):
            if name in {"upload", "empty", "full", "launch", "adopt", "home"}:
                raise AssertionError(name)
            return super().__getattribute__(name)

    class TurnError(Exception):
        pass

    def stop():
        raise TurnError

    with use(Refusing()):
        for task in examination.tasks(SIZES, Ceilings(1e12, {})):
            with pytest.raises(TurnError):
                examination.examined(task, FakeDevice(), stop)


def test_a_report_goes_on_where_it_stopped(tmp_path, monkeypatch):
    table = [row for row in TABLE if row[0].template in ("shrink", "expand")]
    monkeypatch.setattr(examination, "TABLE", table)
    asked = []

    def examine(tasks):
        for task in tasks:
            asked.append(task.dtype)
            if len(asked) == 4:
                raise KeyboardInterrupt
            yield Checked(task.name, task.dtype, seconds=TICK)

    def rows(**how):
        gpu_report.run(tmp_path, FakeDevice(), **how)
        return json.loads((tmp_path / "gpu-report.json").read_text())["kernels"]

    monkeypatch.setattr(examination, "in_turn", examine)
    with pytest.raises(KeyboardInterrupt):
        rows(sizes=SIZES)
    assert len(rows(sizes=SIZES, resume=True)) == 6
    assert len(asked) == 4 + 3
    rows(sizes=SIZES, resume=True)
    assert len(asked) == 7  # nothing is left to do
    rows(sizes=Sizes(), resume=True)  # other sizes: all runs anew
    rows(sizes=SIZES)  # without --resume: all runs anew
    assert len(asked) == 7 + 6 + 6


def test_a_size_that_no_kernel_takes_is_one_sentence(capsys):
    with use(CpuExecutor()):
        assert cli.main(["gpu-report", "--size", "100"]) == 2
    assert "--size is 100; give a multiple of 256" in capsys.readouterr().err


class Noting(CpuExecutor):
    """Records its arguments and launches nothing."""

    def __init__(self):
        super().__init__()
        self.launched = []

    def launch(self, kernel, dtype, args):
        self.launched.append(args)


def test_launches_in_a_row_have_arrays_of_their_own():
    gpu, x = Noting(), np.arange(4, dtype=np.float32)
    given = {"x": x, "bad": None, "n": 4, "limit": 1.0}
    with use(gpu):
        Launch(kernels.FIRST_BAD, "float32", given, lambda: None).in_a_row(3)()
    arrays = [args[0] for args in gpu.launched]
    assert [args[1:] for args in gpu.launched] == [[None, 4, 1.0]] * 3
    assert all(np.array_equal(array, x) for array in arrays)
    assert len({array.ctypes.data for array in arrays}) == 3


def test_the_process_gets_the_task_and_gives_the_row(monkeypatch, capsys):
    task = examination.Task(3, "float16", SIZES, Ceilings(1e12, {"float32": 1e13}))
    given = io.StringIO(json.dumps(asdict(task)) + "\ngo\n")
    monkeypatch.setattr(sys, "stdin", given)
    row, seen = Checked("a", "float16", seconds=1e-6), []
    monkeypatch.setattr(examination, "examined", lambda *a: (seen.append(a), row)[1])
    examination.main()
    ((same, where, turn),) = seen
    assert same == task
    assert isinstance(where, FakeDevice)
    assert given.tell() < len(given.getvalue())
    turn()
    assert not given.read()
    assert Checked(**json.loads(capsys.readouterr().out)) == row


@needs_cpu_build
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys, monkeypatch):
    only(monkeypatch, "shrink")
    (tmp_path / "file").write_text("")
    with use(CpuExecutor()):
        assert cli.main(["gpu-report", "--out", str(tmp_path / "file" / "x")]) == 2
    assert "minipeft: cannot write" in capsys.readouterr().err


@pytest.mark.no_gpu
@pytest.mark.skipif(missing() is None, reason="there is a GPU")
def test_without_a_gpu_one_line_and_no_file(tmp_path):
    command = [sys.executable, "-m", "minipeft.cli", "gpu-report", "--out", "there"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"minipeft: {missing()}\n"
    assert not list(tmp_path.iterdir())


def test_numpy_and_cupy_are_all_it_needs():
    program = (
        "import sys\n"
        "for name in ('torch', 'bitsandbytes', 'transformers', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from minipeft.lab.gpu import device, gpu_report, peers\n"
        "print(peers.missing('cuda'))\n"
    )
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said == "bitsandbytes is not installed\n"


# bitsandbytes beside ours: its CPU functions have the names of its kernels.


@needs_cpu_build
def test_bitsandbytes_is_timed_on_the_same_tensors(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    only(monkeypatch, "quantize", "dequantize", "product", "adamw_8bit")
    _, found = made(tmp_path, CpuExecutor())
    peers_ = [k for k in found["kernels"] if k["kernel"] in COUNTERPARTS]
    assert {k["kernel"] for k in peers_} == COUNTERPARTS
    assert [k["peer"] for k in peers_] == [TICK] * len(peers_)
    for k in peers_:
        if k["kernel"].startswith("blockwise"):
            assert k["agreement"] == 1
        if k["kernel"] == "adamw.adamw_8bit":
            assert k["agreement"] > 0.99
        if k["kernel"] == "qlora.product":
            assert k["agreement"] is None  # it multiplies by its own codes


@needs_cpu_build
def test_a_peer_that_fails_spoils_nothing(tmp_path, capsys, monkeypatch):
    only(monkeypatch, "quantize")
    monkeypatch.setattr(peers, "missing", lambda _: None)

    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(peers.PEERS, fail))
    code, _ = made(tmp_path, CpuExecutor())
    assert code == 0
    out = capsys.readouterr().out
    assert "bitsandbytes was not measured: failed: ZeroDivisionError." in out
    assert "| not measured |" in out


@needs_cpu_build
def test_without_bitsandbytes_the_report_says_why(tmp_path, capsys, monkeypatch):
    only(monkeypatch, "quantize")
    monkeypatch.setattr(peers, "missing", lambda place: f"not on this {place}")
    code, _ = made(tmp_path, CpuExecutor())
    assert code == 0
    sentence = "bitsandbytes was not measured: not on this cpu."
    assert capsys.readouterr().out.count(sentence) == 1


def test_why_bitsandbytes_is_missing(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert peers.missing("cuda") == "bitsandbytes is not installed"
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.missing("cuda") == "this torch has no CUDA"
    assert peers.missing("cpu") is None
