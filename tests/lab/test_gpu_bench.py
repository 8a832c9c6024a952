"""`minipeft.lab.gpu.bench` on a CPU, tiny, beside the peers' own CPU code."""

import builtins
import json
from pathlib import Path

import pytest

from minipeft.lab.gpu import bench

torch = pytest.importorskip("torch")
SIZES = bench.Sizes(width=64, inner=160, heads=4, blocks=1, vocabulary=64)
SHORT = {"qlora-512": bench.qlora_step(16), "qlora-2048": bench.qlora_step(24)}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench, "PAIRS", bench.PAIRS | SHORT)


@pytest.mark.filterwarnings("ignore")  # those of the peers
@pytest.mark.parametrize("name", bench.PAIRS)
def test_every_pair_is_measured_beside_its_peer(name):
    for package in ("bitsandbytes", "peft", "transformers"):
        pytest.importorskip(package)
    row = bench.run(name, "cpu", SIZES)
    assert isinstance(row.theirs, float), row.theirs
    assert min(row.ours, row.theirs, row.our_peak, row.their_peak) > 0
    assert row.smallest <= row.ratio <= row.largest
    if name.startswith("qlora"):
        ours, theirs = (float(word.split()[-1]) for word in row.note.split(", "))
        assert round(ours, 1) == round(theirs, 1)


@pytest.mark.parametrize("name", ["nf4-quantize", "dora-step"])
def test_without_a_peer_ours_is_measured_alone(name, monkeypatch):
    real = builtins.__import__

    def without(module, *rest):
        if module.partition(".")[0] in ("bitsandbytes", "peft"):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    row = bench.run(name, "cpu", SIZES)
    assert row.theirs.endswith("is not installed")
    assert row.ours > 0
    assert row.ratio is row.their_peak is None
    assert row.theirs in bench.table([row])


def test_a_peer_that_fails_says_so():
    def build():
        raise ZeroDivisionError("no\nmore")

    assert bench._peer("peft", build) == "peft failed: no"


def test_the_command_writes_the_row(tmp_path, monkeypatch, capsys):
    row = bench.Measurement("LoRA", "peft", 1.0, 2.0, 0.5, 0.4, 0.6, 3, 4, "a note")
    monkeypatch.setattr(bench, "run", lambda name, device: row)
    file = tmp_path / "row.json"
    assert bench.main(["nf4-quantize", "--out", str(file)]) == 0
    assert bench.Measurement(**json.loads(file.read_text())) == row
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("| 0.50 | 0.40 to 0.60 | 0.0 | 0.0 | a note |")
    lines = out.splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_an_unknown_pair_is_one_sentence(capsys):
    assert bench.main(["nothing"]) == 2
    assert "there is no pair 'nothing'; choose of ['nf4-" in capsys.readouterr().err


def test_without_a_gpu_it_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["dora-step"]) == 2
    said = "bench: torch sees no CUDA device here; use --device cpu\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_chosen_is_measured_as_a_gpu(name, monkeypatch):
    """By events and the GPU's allocator; the host's clock would time the launches."""
    seen = []

    def measure(made, device, clock):
        seen.append((device, clock))
        return bench.Measurement("a", "b", 1.0, "not installed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = bench.Bench("a", "b", int, "not installed")
    monkeypatch.setattr(bench, "PAIRS", {"a": lambda sizes, place: made})
    monkeypatch.setattr(bench, "measure", measure)
    bench.run("a", name)
    ((device, clock),) = seen
    assert device == name
    assert (clock.func, clock.keywords) == (bench.timing.events, {"device": name})


def test_the_committed_run_is_summed_up():
    folder = Path(__file__).parents[2] / "chapters" / "results" / "gpu"
    said = bench.summary(folder)
    assert "name: NVIDIA" in said
    assert "vectors, torch" in said.split("\npassed: ")[1].split("\n")[0]
    assert all(f"\n| {name} |" in said for name in ("NF4 quantize", "DoRA step"))


def test_a_folder_without_results_is_told(tmp_path):
    assert bench.summary(tmp_path) == "no results of `make gpu` are here"
