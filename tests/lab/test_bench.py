"""The clock of comparisons: alternating turns, ratios of neighbours, equal results."""

import hashlib
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipeft.errors import InputError
from minipeft.lab import bench, bench_files, memory_peak, timing
from minipeft.lab.timing import Pair, check, measure, table


class Clock:
    """A clock that advances only when a turn advances it."""

    def __init__(self):
        self.now, self.turns = 0.0, []

    def turn(self, name, durations):
        """Return a turn that takes the next of `durations`."""
        durations = iter(durations)

        def run():
            self.turns.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def pair(clock, ours, theirs, target=1.0):
    mine, yours = clock.turn("ours", ours), clock.turn("theirs", theirs)
    return Pair("step", "peer", mine, yours, target, "a note")


def test_turns_alternate_and_the_first_is_not_counted(clock):
    measured = pair(clock, [99, 1, 1, 1], [99, 2, 2, 2])
    assert measure(measured, 3).ratio == 0.5
    assert clock.turns[:2] == ["ours", "theirs"]
    pairs = [tuple(clock.turns[i : i + 2]) for i in (2, 4, 6)]
    assert set(pairs) == {("ours", "theirs"), ("theirs", "ours")}
    assert pairs[0] != pairs[1] != pairs[2]


def test_a_slow_minute_does_not_tilt_the_ratio(clock):
    """The result is the median of ratios of neighbours, not the ratio of medians."""
    row = measure(pair(clock, [0, 1, 10, 1, 1], [0, 2, 20, 2, 2]), 4)
    assert (row.ratio, row.smallest, row.largest) == (0.5, 0.5, 0.5)
    assert (row.ours, row.theirs) == (1000, 2000)
    row = measure(pair(clock, [0, 1, 4, 9], [0, 4, 1, 3]), 3)
    assert (row.ratio, row.smallest, row.largest) == (3, 0.25, 4)


@pytest.mark.parametrize(("target", "verdict"), [(0.5, "reached"), (0.49, "not")])
def test_the_table_says_what_was_not_reached(clock, target, verdict):
    row = measure(pair(clock, [0, 1], [0, 2], target), 1)
    last = table([row]).splitlines()[-1]
    assert last.startswith("| step | peer | 1000.0 | 2000.0 | 0.50 | 0.50 to 0.50 |")
    assert ("**not reached**" in last) == (verdict == "not")
    assert last.endswith("reached; a note |" if verdict == "reached" else "; a note |")


@pytest.mark.parametrize("distance", [0.2, math.nan, math.inf])
def test_things_that_differ_are_not_timed(distance):
    check("equal", 0.1, 0.1)
    with pytest.raises(InputError, match="timing them would compare different things"):
        check("different", distance, 0.1)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--threads", "-1"], "--threads is -1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(line, sentence, capsys):
    assert bench.main(line) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "minipeft.lab.bench_pairs", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert bench.main([]) == 2
    assert "`pip install '.[peers]'`" in capsys.readouterr().err


def test_a_pair_from_its_check_to_the_file(tmp_path):
    """A process of its own runs the pair, because peers warn on import."""
    for peer in ("bitsandbytes", "peft"):
        if not find_spec(peer):
            pytest.skip(f"needs {peer}")
    out = tmp_path / "bench.json"
    line = [sys.executable, "-m", "minipeft.lab.bench", "--only", "pissa"]
    line += ["--rounds", "1", "--out", str(out)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.count("| PiSSA start |")) == (0, 1)
    facts = json.loads(out.read_text())
    assert [row["against"] for row in facts["rows"]] == ["peft, niter 4"]
    assert "error above the best" in facts["rows"][0]["note"]


def test_an_unknown_pair_names_the_choices(monkeypatch, capsys):
    pairs = SimpleNamespace(PAIRS={"lora": None, "dora": None})
    monkeypatch.setitem(sys.modules, "minipeft.lab.bench_pairs", pairs)
    other = SimpleNamespace(PAIRS={})
    monkeypatch.setitem(sys.modules, "minipeft.lab.bench_model", other)
    monkeypatch.setitem(sys.modules, "minipeft.lab.bench_files", other)
    assert bench.main(["--only", "lorra"]) == 2
    said = capsys.readouterr().err
    assert "no pair's name contains 'lorra'; choose of ['lora', 'dora']" in said


# On CUDA: events, and the device's own allocator


class Event:
    """An event on a device; it keeps the time of the clock when it is recorded."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = Event.now

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, other):
        return other.at - self.at


def test_cuda_is_timed_between_events_and_the_cpu_by_its_process(monkeypatch, clock):
    def run(milliseconds):
        Event.now += milliseconds
        clock.now += 100

    slept, devices = [], []
    guard = lambda device: nullcontext(devices.append(device))  # noqa: E731
    monkeypatch.setattr(timing.torch.cuda, "device", guard)
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(timing.time, "process_time", lambda: clock.now)
    assert timing.cost("cuda", run, 2.5) == 2.5e-3
    assert timing.cost("cuda:1", run, 4.0) == 4e-3
    assert devices == ["cuda", "cuda:1"]
    assert slept == [timing.SLEEP] * 2  # so that the host is ahead of the device
    assert timing.cost("cpu", run, 2.5) == 100


def test_a_pair_is_timed_by_the_clock_that_is_given(monkeypatch):
    ours, theirs = (lambda: None), (lambda: None)
    pair = Pair("a", "b", ours, theirs, 1.0)
    row = measure(pair, 3, lambda turn: 2.0 if turn is ours else 4.0)
    assert (row.ours, row.theirs, row.ratio) == (2000, 4000, 0.5)


def test_the_peak_on_cuda_is_what_its_allocator_says(monkeypatch):
    cuda, told = memory_peak.torch.cuda, []
    monkeypatch.setattr(cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda _: told.append("reset"))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _: 350)
    assert memory_peak.peak_bytes(lambda: told.append("run"), "cuda") == 250
    assert told == ["run", "reset", "run"]


def test_no_chapter_times_a_device_by_a_clock_of_the_host():
    chapters = (Path(__file__).parents[2] / "chapters").glob("*.py")
    assert [p.name for p in chapters if "process_time" in p.read_text()] == []


def test_a_merge_and_an_audit_are_timed_against_a_copy(monkeypatch):
    sizes = {"DEPTH": 1, "WIDTH": 64, "INNER": 96, "GROUPED": 32, "WORDS": 100}
    for name, size in sizes.items():
        monkeypatch.setattr(bench_files, name, size)
    bench_files.folders.cache_clear()
    for build in bench_files.PAIRS.values():
        made = build()
        made.ours()
        assert len(made.theirs()) == len(made.theirs()) > 0
        assert made.target == 2
    root = bench_files.folders()
    base = (root / "base" / "model.safetensors").read_bytes()
    assert bench_files.hashed(root / "base" / "model.safetensors") == (
        hashlib.sha256(base).hexdigest()
    )
    assert (root / "base-copy" / "model.safetensors").read_bytes() == base
    bench_files.folders.cache_clear()
