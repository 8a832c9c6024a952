"""The operations that golden vectors check, listed from the vectors themselves."""

import json
from pathlib import Path
from typing import Any


def table(folder: Path) -> str:
    """List each file: the function, its arguments, what it returns, how many cases."""
    lines = ["| function | arguments | returns | cases |", "|:--|:--|:--|--:|"]
    for path in sorted(folder.glob("*.json")):
        vectors = json.loads(path.read_text("utf-8"))
        arguments, outputs = signature(vectors)
        count = vectors["numberOfTests"]
        lines.append(
            f"| `{vectors['method']}` | {code(arguments)} | {code(outputs)} | {count} |"
        )
    return "\n".join(lines)


def signature(vectors: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return arguments and outputs; a tensor that some cases lack is `=None`."""
    groups = vectors["testGroups"]
    cases = [case["inputs"] for group in groups for case in group["tests"]]
    names = list(dict.fromkeys(name for inputs in cases for name in inputs))
    required = [n for n in names if all(n in inputs for inputs in cases)]
    optional = [f"{n}=None" for n in names if n not in required]
    return [*required, *groups[0]["parameters"], *optional], [*groups[0]["compare"]]


def code(names: list[str]) -> str:
    """Set names as code, so that a line may end between two of them."""
    return ", ".join(f"`{name}`" for name in names)
