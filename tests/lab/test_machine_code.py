"""Occupancy from the numbers of machine code, which tests/cuda/test_budget.py reads."""

import pytest

from minipeft.errors import InputError
from minipeft.kernels import compiler
from minipeft.lab import machine_code
from minipeft.lab.machine_code import MachineCode


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 8, 1.0),
        (33, 0, 8, 6 * 8 / 64),  # 40 registers: 65536 // (40 * 256) blocks
        (255, 0, 8, 8 / 64),
        (32, 81 * 1024, 8, 2 * 8 / 64),  # 164 KB hold two blocks of 82
        (16, 0, 1, 32 / 64),  # no more than 32 blocks
        (16, 0, 32, 1.0),
    ],
)
def test_occupancy_of_an_a100(registers, shared, warps, expected):
    assert MachineCode(registers, shared, 0, ()).occupancy(warps) == expected


def test_instructions_are_counted_by_name_and_width():
    instructions = ("LDG.E.128.CONSTANT R4, [R2.64]", "LDG.E R1, [R2]", "LDS.128 R0")
    code = MachineCode(1, 0, 0, (*instructions, "@P0 LDG.E.128 R8, [R2.64]"))
    assert code.count("LDG", 128) == 2
    assert code.count("STG", 128) == 0


def test_what_is_missing_is_one_sentence(monkeypatch):
    pytest.importorskip("cuda.pathfinder")
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(machine_code, "_tool", lambda: None)
    with pytest.raises(InputError, match="`pip install nvidia-cuda-cuobjdump"):
        machine_code.disassemble("blockwise")
    monkeypatch.setattr(compiler, "missing", lambda: "no compiler.")
    assert machine_code.missing() == "no compiler."
