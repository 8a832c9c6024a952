"""The numbers of `minipeft gpu-report`: bounds, the median, the table, the JSON."""

import json
from dataclasses import replace

import pytest

from minipeft import kernels
from minipeft.lab import machine_code
from minipeft.lab.gpu import device, examination, gpu_report, slots
from minipeft.lab.gpu.examination import Ceilings, Checked
from minipeft.lab.gpu.gpu_report import Report
from minipeft.lab.gpu.launches import Launch
from tests.cuda import toolchain
from tests.cuda.executors import CpuExecutor
from tests.cuda.toolchain import needs_listing
from tests.lab.test_gpu_report import SLOTS, FakeDevice


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(device, "ROUNDS", 3)
    monkeypatch.setattr(device, "WARM_UPS", 1)
    monkeypatch.setattr(machine_code, "disassemble", toolchain.disassemble)


def test_the_roofline_is_the_longer_of_the_two_times():
    ceilings = Ceilings(1e9, {"float32": 1e12})
    assert ceilings.bound(1e6, 1e6) == (1e-3, "memory")
    assert ceilings.bound(1e6, 4e9) == (4e-3, "arithmetic")


def test_on_tensor_cores_the_rate_of_their_product_bounds():
    ceilings = Ceilings(1e9, {"float32": 1e12, "float16": 1e13})
    assert ceilings.bound(1e6, 4e10, None, "float16") == (4e-3, "arithmetic")


def test_ours_is_timed_before_the_peer(monkeypatch):
    order, ours = [], lambda: None
    trial = examination.Trial(kernels.ROW_NORM, "float16", "", ours, {})
    given = {"in_features": 8, "out_features": 4, "r": 2}
    recorder = examination.Recorder(CpuExecutor())
    recorder._noted.append(Launch(kernels.ROW_NORM, "float16", given, ours))
    monkeypatch.setattr(examination, "measure", lambda _, c: order.append(c) or 1.0)
    monkeypatch.setattr(examination, "_in_a_row", lambda *_: 0.0)
    monkeypatch.setattr(
        examination, "beside", lambda *_: (order.append("peer"), (None, None))[1]
    )
    ceilings = Ceilings(1e9, {"float32": 1e12, "float16": 1e13})
    examination.examine(recorder, trial, FakeDevice(), ceilings)
    assert order == [ours, "peer"]


def test_instructions_bound_where_they_take_longest():
    ceilings = Ceilings(1e9, {"float32": 1e12})
    assert ceilings.bound(1e6, 1e6, 5e-3) == (5e-3, "instructions")
    assert ceilings.bound(1e6, 1e6, 1e-4) == (1e-3, "memory")


@needs_listing
def test_the_instructions_of_a_launch_are_those_of_its_values():
    ceilings = Ceilings(1e9, {}, "90", SLOTS)
    for kernel, given, values in (
        (kernels.DEQUANTIZE, {"n": 3200}, 3200),
        (kernels.ROW_NORM, {"in_features": 2048, "out_features": 32, "r": 8}, 2**16),
        (
            kernels.PRODUCT_4BIT,
            {"in_features": 512, "out_features": 32, "tokens": 65},
            2 * 2**14,
        ),
        (kernels.SHRINK, {"in_features": 512, "tokens": 5, "r": 8}, None),
    ):
        launch = Launch(kernel, "float16", given, lambda: None)
        columns, r = given.get("in_features", 0), given.get("r", slots.RANK)
        size = slots.Size(columns, r, given.get("tokens", 1))
        cost = slots.cost(kernel, "float16", "90", size)
        expected = None if values is None else values / 32 * cost.cycles / SLOTS
        assert ceilings.instructions(launch) == expected


def test_where_machine_code_cannot_be_read_the_report_says_so(monkeypatch):
    monkeypatch.setattr(machine_code, "missing", lambda: "no disassembler")
    ceilings = Ceilings(1e12, {}, "90", SLOTS)
    launch = Launch(kernels.DEQUANTIZE, "float16", {"n": 1}, lambda: None)
    assert ceilings.instructions(launch) is None
    text = gpu_report.markdown(Report({"name": "X"}, ceilings, ROWS))
    assert "The instructions were not counted: no disassembler." in text


def test_without_a_rate_only_memory_bounds():
    ceilings = Ceilings(1e9, {"float32": "no cuBLAS"})
    assert ceilings.bound(1e6, 1e15) == (1e-3, "memory")


def test_the_median_after_the_warm_up():
    times, calls = iter([9.0, 1.0, 2.0]), []
    clock = FakeDevice()
    clock.elapsed = lambda call: next(times)
    assert examination.measure(clock, lambda: calls.append(1)) == 2
    assert len(calls) == device.WARM_UPS


ROWS = (
    Checked(
        "a.b", "float32", None, 4e-6, 3e-6, 8_000_000, 1e6, 1e-6, "memory", 8e-6, 0.5
    ),
    Checked(
        "a.c", "float16", None, 4e-6, 0.0, 8_000_000, 1e6, 3e-6, "memory", "no torch"
    ),
    Checked("a.d", "float16", None, 4e-6, 3e-6, 8_000_000, 1e6, 3e-6, "arithmetic"),
    Checked("a.e", "bfloat16", "all differ"),
)


def test_the_numbers_of_the_table():
    busy = Checked(
        "a.f", "float16", None, 4e-6, 3e-6, 8_000_000, 1e6, 3e-6, "instructions"
    )
    rows = (*ROWS, replace(busy, instructions=3e-6))
    text = gpu_report.markdown(Report({"name": "X"}, Ceilings(1e12, {}), rows))
    assert "The instructions were not counted" not in text
    assert "| 2000 | 3.0 | 3.0 | 75% | instructions |" in text
    assert "| a.b | float32 | 4.0 | 3.0 | 8.00 | 2000 |  | 1.0 | 25% | memory " in text
    assert "| memory | 8.0 | 0.50 | 50.0000% |" in text
    assert "| memory | not measured |  |  |" in text
    assert "| 75% | arithmetic |  |  |  |" in text
    assert "- a.e bfloat16: all differ" in text
    lines = [line for line in text.splitlines() if line.startswith("| a.")]
    header = next(line for line in text.splitlines() if line.startswith("| kernel"))
    assert {line.count("|") for line in lines} == {header.count("|")}


def test_the_json_holds_all_of_it():
    facts = {"name": "X"}
    made = Report(facts, Ceilings(1e12, {"tf32": "no", "float32": 1e13}), ROWS)
    found = json.loads(gpu_report.as_json(made))
    assert found["device"] == facts
    assert found["products"] == {"tf32": "no", "float32": 1e13}
    assert [Checked(**row) for row in found["kernels"]] == list(ROWS)
