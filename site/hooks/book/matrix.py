"""What the golden vectors found in other libraries, drawn from `results/`."""

import json
import re
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

Found = dict[str, Any]
STATUSES = ("pass", "fail", "policy", "skip")


def read(folder: Path) -> dict[str, list[Found]]:
    """Return each library's results, the newest version first; `none.json` last."""
    libraries = {}
    for library in sorted(path for path in folder.glob("*") if path.is_dir()):
        paths = sorted(library.glob("*.json"), key=version, reverse=True)
        libraries[library.name] = [json.loads(p.read_text("utf-8")) for p in paths]
    return libraries


def version(path: Path) -> list[int]:
    """Return a version as numbers that can be ordered."""
    return [int(digits) for digits in re.findall(r"\d+", path.stem)]


def table(folder: Path) -> str:
    """Draw operations by libraries: how many of the cases that are asked are right."""
    newest = {
        name: found[0] for name, found in read(folder).items() if "version" in found[0]
    }
    operations = sorted({op for found in newest.values() for op in found["operations"]})
    heads = (f"[{name} {found['version']}](#{name})" for name, found in newest.items())
    lines = [
        f"| | {' | '.join(heads)} |",
        f"|:--|{':-:|' * len(newest)}",
        *(
            f"| `{op}` | {' | '.join(cell(found, op) for found in newest.values())} |"
            for op in operations
        ),
    ]
    return "\n".join(lines)


def cell(found: Found, operation: str) -> str:
    """Say how many cases pass, of those that are right or wrong."""
    count = found["operations"].get(operation)
    if count is None:
        return ""
    right, wrong = count.get("pass", 0), count.get("fail", 0)
    return f"{right} of {right + wrong}" if wrong else f"{right}"


def deviations(folder: Path) -> list[Found]:
    """Return the named deviations: what a library does instead, and in which cases."""
    path = folder / "deviations.toml"
    named: list[Found] = tomllib.loads(path.read_text("utf-8"))["deviation"]
    return named


def details(folder: Path) -> str:
    """List for each library where it was run, the least failing cases, and why."""
    named = deviations(folder)
    return "\n\n".join(
        section(name, versions, [d for d in named if d["library"] == name])
        for name, versions in read(folder).items()
    )


def section(name: str, versions: list[Found], named: list[Found]) -> str:
    """Tell about one library, and what changed since the version before."""
    found = versions[0]
    if "reason" in found:
        return f"## {name}\n\nNot run on {found['date']}: `{found['reason']}`"
    agreeing = ", ".join(f"{k} {n}" for k, n in found["choices"]["as"].items())
    parts = [
        f"## {name} {{ #{name} }}",
        f"Version {found['version']} on {found['date']}, {found['cases']} cases, "
        f"Python {found['python']} on {found['system']}"
        f"{''.join(f', {feature}' for feature in found['cpu'])}.",
        f"Choices as each profile makes them, of {found['choices']['all']}: {agreeing}."
        if agreeing
        else "",
        "\n".join(failures(found)) or "Nothing fails.",
        "\n".join(reasons(found["version"], named)),
        changes(*versions[:2]) if len(versions) > 1 else "",
    ]
    return "\n\n".join(part for part in parts if part)


def failures(found: Found) -> list[str]:
    """Show of each operation the failing case with the least input."""
    lines = []
    for operation, count in found["operations"].items():
        if "smallest" in count:
            case = count["smallest"]
            links = "".join(f" <{link}>" for link in case["links"][:2])
            lines.append(
                f"- `{operation}` {count['fail']} fail; tcId {case['tcId']}, "
                f"{case['comment']}: `{case['detail'].replace('`', '')}` "
                f"({', '.join(case['flags'])}){links}"
            )
    return lines


def reasons(number: str, named: list[Found]) -> list[str]:
    """Say what the library does instead, and name the cases that fail by it."""
    lines = [
        f"- {d['name']} ({d['kind']}): {d['what']} "
        + ", ".join(f"`{op}` {spans(cases)}" for op, cases in d["cases"].items())
        for d in named
        if d["version"] == number
    ]
    return ["What stands behind them:", "", *lines] if lines else []


def spans(numbers: list[int]) -> str:
    """Write runs of numbers as spans: 9\N{EN DASH}12, 14."""
    runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    told = [[number for _, number in run] for _, run in runs]
    return ", ".join(
        f"{run[0]}\N{EN DASH}{run[-1]}" if run[1:] else f"{run[0]}" for run in told
    )


def changes(new: Found, old: Found) -> str:
    """Name the cases that fail in one of two versions alone.

    A later case, that the older version was never asked, is told apart.
    """
    fail, failed = failing(new), failing(old)
    unasked = {case for case in fail - failed if is_later(case, old)}
    said = [
        f"{what}: {', '.join(f'`{case}`' for case in sorted(cases))}"
        for what, cases in (
            ("newly failing", fail - failed - unasked),
            ("mended", failed - fail),
            ("failing in cases that are new", unasked),
        )
        if cases
    ]
    before = old.get("version", "the last attempt")
    return f"Since {before}: {'; '.join(said) or 'no other failure'}."


def failing(found: Found) -> set[str]:
    """Return the cases that fail, each as operation:tcId."""
    return {
        f"{operation}:{number}"
        for operation, count in found.get("operations", {}).items()
        for number in count.get("failed", ())
    }


def is_later(case: str, found: Found) -> bool:
    """Tell whether a case was appended after the result: its number is too high."""
    operation, _, number = case.partition(":")
    count = found.get("operations", {}).get(operation, {})
    asked = sum(n for status, n in count.items() if status in STATUSES)
    return int(number) > asked > 0
