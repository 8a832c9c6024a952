"""The operations that golden vectors check, listed from the vectors themselves."""

import json
from pathlib import Path
from typing import Any


def table(folder: Path) -> str:
    """List each file: the call, what it returns, how many cases."""
    lines = ["| call | returns | cases |", "|:--|:--|--:|"]
    for path in sorted(folder.glob("*.json")):
        vectors = json.loads(path.read_text("utf-8"))
        call, outputs = signature(vectors)
        lines.append(f"| `{call}` | {outputs} | {vectors['numberOfTests']} |")
    return "\n".join(lines)


def signature(vectors: dict[str, Any]) -> tuple[str, str]:
    """Return the call and its outputs; an input that some cases lack is `=None`."""
    groups = vectors["testGroups"]
    cases = [case["inputs"] for group in groups for case in group["tests"]]
    names = list(dict.fromkeys(name for inputs in cases for name in inputs))
    required = [n for n in names if all(n in inputs for inputs in cases)]
    optional = [f"{n}=None" for n in names if n not in required]
    arguments = [*required, *groups[0]["parameters"], *optional]
    outputs = ", ".join(f"`{name}`" for name in groups[0]["compare"])
    return f"{vectors['method']}({', '.join(arguments)})", outputs
