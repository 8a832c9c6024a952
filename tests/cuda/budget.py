"""What every kernel may use of a GPU, read from the machine code.

    python -m tests.cuda.budget      measure, write budget.json, print what changed

Registers and shared memory bound how many threads a multiprocessor holds; local memory
is spilled registers; 128-bit loads and stores are those that move 16 bytes a thread.
"""

import json
import re
import subprocess
from functools import cache
from pathlib import Path

from minipeft.cupy import kernels
from tests.cuda.rows import ROWS
from tests.cuda.toolchain import ARCHITECTURES, TOOLS, compile_device

FILE = Path(__file__).with_name("budget.json")
COLUMNS = ("registers", "shared", "local", "load128", "store128")
SMALLER_IS_BETTER = ("registers", "shared", "local")

Usage = dict[str, int]


@cache
def measure(row: str, architecture: str) -> dict[str, Usage]:
    """Read the machine code of a row's instances."""
    compiled = compile_device(row, "cubin", architecture, kernels.source(row))
    resources = _listing("--dump-resource-usage", compiled.image)
    code = _sections(_listing("-sass", compiled.image))
    usage = {}
    for expression, name in compiled.names.items():
        line = re.search(rf"Function {name}:\s+(REG:.*)", resources)[1]
        counts = dict(re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line))
        usage[f"{row} {expression} sm_{architecture}"] = {
            "registers": int(counts["REG"]),
            "shared": int(counts["SHARED"]),
            "local": int(counts["LOCAL"]) + int(counts["STACK"]),
            "load128": len(re.findall(r"\bLDG\.\S*\b128\b", code[name])),
            "store128": len(re.findall(r"\bSTG\.\S*\b128\b", code[name])),
        }
    return usage


def _listing(option: str, image: Path) -> str:
    path = {"PATH": f"{TOOLS}:/usr/bin:/bin"}  # cuobjdump calls nvdisasm
    command = [TOOLS / "cuobjdump", option, image]
    return subprocess.check_output(command, text=True, env=path)


def _sections(sass: str) -> dict[str, str]:
    parts = re.split(r"Function : (\S+)", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def worse(measured: Usage, allowed: Usage) -> list[str]:
    """Say in words what exceeds the budget."""
    complaints = []
    for column in COLUMNS:
        sign = 1 if column in SMALLER_IS_BETTER else -1
        if sign * measured[column] > sign * allowed[column]:
            complaints.append(f"{column} {allowed[column]} -> {measured[column]}")
    return complaints


def load() -> dict[str, Usage]:
    """Read the committed budget."""
    return {
        name: dict(zip(COLUMNS, values, strict=True))
        for name, values in json.loads(FILE.read_text())["kernels"].items()
    }


def main() -> None:
    """Renew the budget."""
    old = load() if FILE.exists() else {}
    new = {
        k: v for row in ROWS for a in ARCHITECTURES for k, v in measure(row, a).items()
    }
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            print(f"{name}: {old.get(name)} -> {new.get(name)}")
    lines = [f'    "{name}": {list(usage.values())}' for name, usage in new.items()]
    columns = json.dumps(COLUMNS)
    FILE.write_text(
        f'{{\n  "columns": {columns},\n  "kernels": {{\n'
        + ",\n".join(lines)
        + "\n  }\n}\n"
    )


if __name__ == "__main__":
    main()
