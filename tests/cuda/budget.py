"""What every kernel may use of a GPU, read from the machine code.

    python -m tests.cuda.budget      measure, write budget.json, print what changed

Registers and shared memory bound how many threads a multiprocessor holds; local memory
is spilled registers; 128-bit loads and stores are those that move 16 bytes a thread.
"""

import json
from functools import cache
from pathlib import Path

from tests.cuda.rows import ROWS
from tests.cuda.toolchain import ARCHITECTURES, disassemble

FILE = Path(__file__).with_name("budget.json")
COLUMNS = ("registers", "shared", "local", "load128", "store128")
SMALLER_IS_BETTER = ("registers", "shared", "local")

Usage = dict[str, int]


@cache
def measure(row: str, architecture: str) -> dict[str, Usage]:
    """Read the machine code of a row's instances."""
    return {
        f"{row} {expression} sm_{architecture}": {
            "registers": code.registers,
            "shared": code.shared,
            "local": code.local,
            "load128": code.count("LDG", 128),
            "store128": code.count("STG", 128),
        }
        for expression, code in disassemble(row, architecture).items()
    }


def worse(measured: Usage, allowed: Usage) -> list[str]:
    """Say in words which numbers exceed the budget."""
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
    """Write the budget anew."""
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
