"""The machine code of the kernels: resources and instructions, read without a GPU."""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minipeft.errors import InputError
from minipeft.kernels import compiler

WARP = 32


@dataclass(frozen=True)
class MachineCode:
    """The machine code of one kernel.

    Args:
        registers: of a thread.
        shared: bytes of a block.
        local: bytes of a thread in memory: spilled registers, or arrays on a stack.
        instructions: in order, without their addresses.
    """

    registers: int
    shared: int
    local: int
    instructions: tuple[str, ...]

    def count(self, name: str, bits: int) -> int:
        """Count the instructions of this name and width, as in `LDG.E.128`."""
        form = re.compile(rf"\b{name}\.\S*\b{bits}\b")
        return sum(bool(form.search(instruction)) for instruction in self.instructions)

    def occupancy(self, warps: int = 8) -> float:
        """Return the share of an A100's warps that can be resident at the same time.

        A multiprocessor has room for 64 warps and 32 blocks, 65,536 registers, which a
        warp gets in units of 256, and 164 KB of shared memory, of which every block
        takes 1 KB more than it asks for.

        Args:
            warps: of a block.

        Source: NVIDIA A100 architecture, white paper, 2020; for the 1 KB, CUDA's Ampere
            tuning guide; for the units, CUDA's occupancy calculator.
        """
        of_a_warp = -(-self.registers * WARP // 256) * 256
        by_registers = 65536 // of_a_warp // warps
        by_shared = 164 * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


def missing() -> str | None:
    """Say in one sentence why kernels cannot be disassembled; None where they can."""
    reason = compiler.missing()
    if reason or _tool():
        return reason
    return (
        "CUDA's disassembler is not found: "
        "`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`."
    )


def disassemble(row: str, architecture: str = "80") -> dict[str, MachineCode]:
    """Compile a file and return its machine code, by the C++ names of the instances.

    Args:
        row: the file in `minipeft/kernels` without its ending.
        architecture: of the device, as in "80".

    Raises:
        InputError: with the message of `missing`.
    """
    if reason := missing():
        raise InputError(reason)
    compiled = compiler.compile_row(row, architecture)
    return read(compiled.image, compiled.names)


def read(code: bytes, names: Mapping[str, str]) -> dict[str, MachineCode]:
    """Read machine code.

    Args:
        code: a cubin.
        names: {name in the result: name of the kernel in the cubin}.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        resources = _listing("--dump-resource-usage", file.name)
        parts = re.split(r"Function : (\S+)", _listing("-sass", file.name))
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {key: _kernel(name, resources, bodies[name]) for key, name in names.items()}


def _kernel(name: str, resources: str, body: str) -> MachineCode:
    line = re.findall(rf"Function {re.escape(name)}:\s+(REG:.*)", resources)[0]
    used = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body)
    local = used["LOCAL"] + used["STACK"]
    return MachineCode(used["REG"], used["SHARED"], local, tuple(instructions))


def _tool() -> Path | None:
    from cuda.pathfinder import find_nvidia_binary_utility

    found = [find_nvidia_binary_utility(name) for name in ("cuobjdump", "nvdisasm")]
    return Path(found[0]) if all(found) else None


def _listing(option: str, path: str) -> str:
    tool = _tool()
    assert tool is not None
    # cuobjdump calls nvdisasm, which is in the same folder.
    search = f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PATH": search}
    return subprocess.check_output([tool, option, path], text=True, env=environment)
