"""`make gpu` with stand-ins for the GPU, the clock, and the programs that it starts."""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipeft.cupy import executor
from tests.cuda import on_gpu

ROOT = Path(__file__).parents[2]
FACTS = {"minipeft": "1", "name": "A CPU"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Load the tool with a device that does not exist."""
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools/gpu.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_tool", tool)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "gpu")
    monkeypatch.setattr(tool.executor, "missing", lambda: None)
    monkeypatch.setattr(tool, "too_old", lambda: None)
    monkeypatch.setattr(tool, "facts", lambda: dict(FACTS))
    monkeypatch.setattr(tool, "find_sanitizer", lambda: Path("/cuda/sanitizer"))
    return tool


@pytest.fixture
def started(gpu, monkeypatch):
    """Record the started steps on a false clock; a step takes the time in `takes`."""
    told = SimpleNamespace(now=0.0, names=[], takes={}, failing=set())

    def run(step, seconds):
        told.names.append(step.name)
        wanted = told.takes.get(step.name, 10.0)
        told.now += min(wanted, seconds)
        if wanted > seconds:
            if step.goes_on:
                told.takes[step.name] = wanted - seconds
            return gpu.Record("unfinished", seconds)
        verdict = "failed" if step.name in told.failing else "passed"
        return gpu.Record(verdict, wanted, said=["the last | line"])

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: told.now))
    return told


def written(gpu):
    found = json.loads((gpu.RESULTS / "gpu.json").read_text("utf-8"))
    assert found["facts"] == FACTS
    return {name: step["verdict"] for name, step in found["steps"].items()}


def test_without_a_gpu_one_line_and_no_failure(gpu, started, monkeypatch, capsys):
    monkeypatch.setattr(gpu.executor, "missing", lambda: "There is no GPU.")
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "gpu: nothing ran. There is no GPU.\n"
    assert started.names == []
    assert not gpu.RESULTS.exists()


@pytest.mark.parametrize(
    ("package", "found", "sentence"),
    [
        ("torch", "2.10.1+cu130", "torch is 2.10.1+cu130; version 2.11 or newer is"),
        ("transformers", "4.57.0", "transformers is 4.57.0; version 5 or newer is"),
        ("transformers", None, "transformers is not installed; version 5 or newer is"),
        ("torch", "2.13.0", "has no CUDA; a build with CUDA is needed."),
    ],
)
def test_what_is_missing_is_one_sentence(monkeypatch, gpu, package, found, sentence):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def version(name):
        if name == package and found is None:
            raise gpu.PackageNotFoundError
        return found if name == package else "9.0"

    monkeypatch.undo()
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools/gpu.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_tool", tool)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tool, "version", version)
    assert sentence in tool.too_old()


@pytest.mark.parametrize("missing", [None, "There is no GPU."], ids=["gpu", "none"])
def test_a_stage_that_is_not_there_is_refused_and_the_stages_are_listed(
    gpu, started, monkeypatch, capsys, missing
):
    monkeypatch.setattr(gpu.executor, "missing", lambda: missing)
    assert gpu.main(["--help"]) == 0
    text, listed = capsys.readouterr().out.split("Stages:\n\n")
    assert text.startswith(gpu.__doc__)
    stages = gpu.stages()
    assert [line.split()[0] for line in listed.splitlines()] == [*stages]
    for line, steps in zip(listed.splitlines(), stages.values(), strict=True):
        assert steps[0].name in line
        assert line.endswith(f" {steps[-1].name} ({len(steps)})")
        assert len(line) <= 88
    for wrong in (["bench"], ["tests", "bench"]):
        assert gpu.main(wrong) == 2
        said = capsys.readouterr().out
        assert said == (
            f"gpu: nothing ran. There is no stage 'bench'. Stages:\n\n{listed}"
        )
    assert started.names == []


def test_with_a_gpu_everything_runs_once_and_is_written(gpu, started):
    assert gpu.main([]) == 0
    steps = [step for stage in gpu.stages().values() for step in stage]
    assert started.names == [step.name for step in steps]
    assert written(gpu) == dict.fromkeys(started.names, "passed")
    assert gpu.main([]) == 0
    assert len(started.names) == len(steps)  # no time is left
    text = (gpu.RESULTS / "gpu.md").read_text("utf-8")
    assert text.startswith("## minipeft on A CPU\n\n- minipeft: 1\n")
    assert "| racecheck | passed | 10 | the last \\| line |" in text


def test_the_stages_hold_what_only_a_device_can_show(gpu):
    stages = gpu.stages()
    texts = [" ".join(s.command) for stage in stages.values() for s in stage]
    for end in (
        " ".join(("pytest -q -m gpu", *gpu.MARKED)),
        "minipeft.cli verify cupy",
        "minipeft.cli verify torch --device cuda",
        f"-m minipeft.lab.blocks {gpu.RESULTS / 'spike.json'}",
        *(
            f"/cuda/sanitizer --error-exitcode 1 --report-api-errors no --tool {tool} "
            f"{gpu.PYTHON} -m tests.cuda.on_gpu"
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ),
    ):
        assert sum(text.endswith(end) for text in texts) == 1
    for file in (ROOT / "chapters").glob("[0-9]*.py"):
        assert sum(f"{file} --device cuda" in text for text in texts) == 1
    for size in (1024, 2048, 4096, 8192):
        assert sum(f"--size {size} " in text for text in texts) == 1
    benches = [s.name for name in ("kernels", "steps") for s in stages[f"bench-{name}"]]
    assert sorted(benches) == sorted(f"bench {name}" for name in gpu.bench.PAIRS)
    names = [step.name for stage in stages.values() for step in stage]
    assert len(names) == len(set(names))


def test_one_failure_is_named_and_the_rest_runs(gpu, started, capsys):
    started.failing.add("vectors, torch")
    assert gpu.main([]) == 1
    found = written(gpu)
    assert [n for n, v in found.items() if v != "passed"] == ["vectors, torch"]
    said = capsys.readouterr().out
    assert "\nfailed: vectors, torch\n" in said
    text = (gpu.RESULTS / "gpu.md").read_text("utf-8")
    assert "What vectors, torch said last:\n\n```text\nthe last | line\n```" in text


def test_a_stage_lasts_nine_minutes_at_most_and_the_next_go_takes_the_rest(
    gpu, started, capsys
):
    started.takes = {"memcheck": 300.0, "racecheck": 400.0}
    assert gpu.main(["sanitizers"]) == 0
    assert started.now == gpu.LIMIT
    assert started.names == ["memcheck", "racecheck"]
    assert "\nunfinished: racecheck, synccheck, initcheck\n" in capsys.readouterr().out
    assert gpu.main(["sanitizers"]) == 0
    assert started.names[2:] == ["racecheck", "synccheck", "initcheck"]
    assert set(written(gpu).values()) == {"passed"}
    gpu.main(["sanitizers"])  # all have verdicts, so they run anew
    assert started.names[5:] == ["memcheck", "racecheck"]


def test_a_step_longer_than_a_stage_fails(gpu, started):
    started.takes = {"agreement": 1e4}
    assert gpu.main(["tests"]) == 1
    assert written(gpu) == {"agreement": "failed"}
    text = (gpu.RESULTS / "gpu.md").read_text("utf-8")
    assert "does not end within 540 seconds a go" in text


@pytest.mark.parametrize(("seconds", "code"), [(1500.0, 0), (1e5, 1)])
def test_a_report_goes_on_where_it_stopped_but_not_for_ever(
    gpu, started, seconds, code
):
    started.takes = {"report 8192": seconds}
    assert gpu.main([]) == code
    goes = 3 if code == 0 else gpu.GOES
    assert started.names.count("report 8192") == goes
    record = json.loads((gpu.RESULTS / "gpu.json").read_text())["steps"]["report 8192"]
    assert record["goes"] == goes
    assert record["seconds"] == min(seconds, gpu.GOES * gpu.LIMIT)


def test_results_of_another_device_or_a_damaged_file_are_not_taken_up(gpu, started):
    gpu.main(["tests"])
    assert set(gpu.Results.read(FACTS).records) == {"agreement"}
    assert gpu.Results.read(FACTS | {"name": "Another"}).records == {}
    (gpu.RESULTS / "gpu.json").write_text("{")
    assert gpu.Results.read(FACTS).records == {}


def test_benches_and_reports_stand_in_the_page(gpu, started):
    row = gpu.bench.Measurement("LoRA", "peft", 1.0, 2.0, 0.5, 0.4, 0.6, 3, 4)
    gpu.RESULTS.mkdir()
    name = f"bench-{next(iter(gpu.bench.PAIRS))}.json"
    (gpu.RESULTS / name).write_text(json.dumps(vars(row)))
    (gpu.RESULTS / "report-1024").mkdir()
    (gpu.RESULTS / "report-1024" / "gpu-report.md").write_text("## 1024\n")
    gpu.main(["tests"])
    text = (gpu.RESULTS / "gpu.md").read_text("utf-8")
    assert "| LoRA | peft | 1.000 | 2.000 | 0.50 | 0.40 to 0.60 |" in text
    assert text.endswith("\n\n## 1024\n")


# A program


def test_a_program_passes_or_fails_and_its_last_words_are_kept(gpu):
    said = "import os; print(1); print(os.environ['HF_HUB_OFFLINE'])"
    passed = gpu.run(gpu.Step("x", (sys.executable, "-c", said)), 60)
    assert (passed.verdict, passed.said) == ("passed", ["1"])
    failing = "import sys; print('a'); sys.exit('b')"
    failed = gpu.run(gpu.Step("x", (sys.executable, "-c", failing)), 60)
    assert failed.verdict == "failed"
    assert set(failed.said) == {"a", "b"}


def test_no_program_inherits_settings_of_torchs_allocator(gpu, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    said = "import os; print('PYTORCH_ALLOC_CONF' in os.environ)"
    assert gpu.run(gpu.Step("x", (sys.executable, "-c", said)), 60).said == ["False"]


def test_when_the_time_is_over_all_that_a_program_started_ends(gpu, tmp_path):
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(p.pid, flush=True)\n"
        "p.wait()\n"
    )
    record = gpu.run(gpu.Step("x", (sys.executable, "-c", parent)), 3)
    assert record.verdict == "unfinished"
    status = Path(f"/proc/{record.said[0]}/stat")
    if sys.platform == "linux":
        for _ in range(100):
            if not status.exists() or status.read_text().split()[2] == "Z":
                return
            time.sleep(0.05)
        pytest.fail("the child lives")


@pytest.mark.parametrize("ends", [True, False])
def test_no_step_waits_for_what_it_left_in_another_session(gpu, ends):
    """Such a process holds the step's stdout open, and no signal reaches it."""
    left = [sys.executable, "-c", "import time; time.sleep(30)"]
    parent = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen({left}, start_new_session=True).pid, flush=True)\n"
        f"time.sleep({0 if ends else 30})\n"
    )
    began = time.monotonic()
    record = gpu.run(gpu.Step("x", (sys.executable, "-c", parent)), 3)
    os.kill(int(record.said[0]), signal.SIGKILL)
    assert record.verdict == ("passed" if ends else "unfinished")
    assert time.monotonic() - began < 20


def test_a_program_ends_with_the_run_that_ctrl_c_ends(gpu, monkeypatch):
    begun = []

    class Interrupted(subprocess.Popen):
        def wait(self, *of, **how):
            if self in begun:
                return super().wait(*of, **how)
            begun.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    said = "import time; time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        gpu.run(gpu.Step("x", (sys.executable, "-c", said)), 60)
    (process,) = begun
    with process:
        assert process.wait(5) == -9


def test_a_step_whose_needs_are_not_met_is_left_out(gpu, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    record = gpu.run(gpu.Step("x", ("y",), ("sys", "no_such_module")), 60)
    assert record == gpu.Record("left out", said=["no_such_module is not installed"])
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    (step,) = gpu.stages()["sanitizers"]
    assert gpu.run(step, 60).said == ["nvidia-cuda-sanitizer-api is not installed"]


def test_a_chapter_whose_weights_are_not_here_is_left_out(gpu, monkeypatch, tmp_path):
    """Without a network it would fail after a minute, and its failure is no result."""
    monkeypatch.setenv("MINIPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", None)
    steps = [s for n, each in gpu.stages().items() if "chapters" in n for s in each]
    measured = [step for step in steps if step.models]
    assert {s.name[8:10] for s in measured} == {"02", "03", "06", "11", "12", "16"}
    for step in measured:
        record = gpu.run(step, 60)
        assert record.verdict == "left out"
        assert record.said[0].startswith("minilm is not on this machine; `minipeft ")
    gpu.models.cached("minilm").mkdir()
    assert gpu.missing(measured[0]) is None


def test_a_step_that_was_left_out_runs_once_its_needs_are_met(
    gpu, started, monkeypatch
):
    assert gpu.main([]) == 0
    results = gpu.Results.read(dict(FACTS))
    results.records["agreement"] = gpu.Record("left out", said=["pytest is not there"])
    results.write()
    ran = len(started.names)
    monkeypatch.setattr(gpu, "missing", lambda step: "pytest is not installed")
    gpu.main([])
    assert started.names[ran:] == []
    monkeypatch.setattr(gpu, "missing", lambda step: None)
    gpu.main([])
    assert started.names[ran:] == ["agreement"]
    assert set(written(gpu).values()) == {"passed"}


# Under a sanitizer


def test_under_a_sanitizer_every_row_runs_without_a_pool(monkeypatch):
    told, ran = [], []
    cuda = SimpleNamespace(set_allocator=told.append)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(on_gpu, "missing", lambda: None)

    def small(dtypes):
        assert isinstance(executor.current(), on_gpu.DeviceExecutor)
        ran.append(set(dtypes))

    rows = {name: SimpleNamespace(small=small) for name in on_gpu.ROWS}
    monkeypatch.setattr(on_gpu, "ROWS", rows)
    assert on_gpu.main() == 0
    assert told == [None]
    assert ran == [{"float32", "float16", "bfloat16"}] * len(rows)


def test_a_gpu_that_is_lost_under_a_sanitizer_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "missing", lambda: "There is no GPU.")
    assert on_gpu.main() == 1
    assert capsys.readouterr().out == "nothing ran. There is no GPU.\n"


def test_make_starts_it_and_installs_nothing():
    makefile = (ROOT / "Makefile").read_text()
    for target, names in (
        ("gpu", "$(STAGE)"),
        ("test-gpu", "tests vectors sanitizers"),
    ):
        head, recipe = makefile.split(f"\n{target}:")[1].split("\n\n")[0].split("\n")
        assert head.strip().startswith("##")  # this target must not run pip
        assert recipe == f"\t@$(ON_GPU) tools/gpu.py {names}"


def test_every_test_for_a_device_stands_where_the_stage_looks(gpu):
    mark = "pytest.mark" + ".gpu"
    marked = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "tests").rglob("test_*.py")
        if re.search(rf"{mark}\b(?!\w)", file.read_text("utf-8"))
    }
    assert marked == set(gpu.MARKED)


def imported(file):
    """Return the modules that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_these_tests_need_no_package_that_the_stage_does_not_name(gpu):
    """A machine with a card has torch, CuPy, transformers, and what the stage asks."""
    left, seen = [*gpu.MARKED, "tests/conftest.py"], set()
    given = {"numpy", "torch", "transformers", "safetensors", "_pytest"}
    packages = {*given, *gpu.TESTING, *sys.stdlib_module_names}
    while left:
        file = ROOT / left.pop()
        for name in imported(file) - seen:
            seen.add(name)
            stem = name.replace(".", "/")
            ours = [
                p for p in (f"{stem}.py", f"{stem}/__init__.py") if (ROOT / p).is_file()
            ]
            left += ours
            top = name.split(".")[0]
            assert top in packages | {"tests", "minipeft"}, f"{file.name} needs {top}"
    assert {"minipeft.torch.paged", "tests.cuda.rows"} <= seen
