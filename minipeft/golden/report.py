"""Say what a run found: a table for people, JSON and JUnit for machines."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import fill
from typing import Any
from xml.etree import ElementTree

from minipeft import __version__
from minipeft.golden.runner import Outcome

STATUSES = ("pass", "fail", "policy", "skip")


def text(name: str, outcomes: Sequence[Outcome]) -> str:
    """Return the failures with their reasons, the latitude, the skips and the table."""
    parts = [
        *(failure(o) for o in outcomes if o.status == "fail"),
        _ways(outcomes),
        _skips(outcomes),
        _table(outcomes),
        _verdict(name, outcomes),
    ]
    return "\n\n".join(part for part in parts if part)


def as_json(name: str, outcomes: Sequence[Outcome], stopped: str = "") -> str:
    """Return the same as one JSON object; `stopped`: why the run ended early."""
    report = {
        "implementation": name,
        "minipeft": __version__,
        "totals": _count(outcomes),
        **({"stopped": stopped} if stopped else {}),
        "cases": [_case(outcome) for outcome in outcomes],
    }
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def as_junit(name: str, outcomes: Sequence[Outcome], stopped: str = "") -> str:
    """Return the same as JUnit XML: one suite for each file, one test for each case."""
    root = ElementTree.Element("testsuites", name=f"minipeft verify {name}")
    if stopped:
        suite = ElementTree.SubElement(root, "testsuite", name="run", errors="1")
        test = ElementTree.SubElement(suite, "testcase", name=name)
        ElementTree.SubElement(test, "error", message=stopped)
    for file in _files(outcomes):
        cases = [outcome for outcome in outcomes if outcome.file == file]
        count = _count(cases)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=file,
            tests=str(len(cases)),
            failures=str(count["fail"]),
            skipped=str(count["skip"]),
        )
        for outcome in cases:
            _junit_case(suite, outcome)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    found = {
        "file": outcome.file,
        "tcId": case.tcId,
        "comment": case.comment,
        "flags": list(case.flags),
        "result": case.result,
        "status": outcome.status,
        "detail": outcome.detail,
        "way": outcome.way,
    }
    return {key: value for key, value in found.items() if value != ""}


def _junit_case(suite: ElementTree.Element, outcome: Outcome) -> None:
    case = outcome.case
    test = ElementTree.SubElement(
        suite,
        "testcase",
        classname=case.operation,
        name=f"tcId {case.tcId}: {case.comment}",
    )
    if outcome.status == "fail":
        element = ElementTree.SubElement(test, "failure", message=outcome.detail)
        element.text = failure(outcome)
    if outcome.status == "skip":
        ElementTree.SubElement(test, "skipped", message=outcome.detail)


def failure(outcome: Outcome) -> str:
    """Say what failed, why the test exists, and what breaks."""
    case = outcome.case
    lines = [
        f"FAIL  {outcome.file} tcId {case.tcId}: {case.comment}",
        f"      {outcome.detail}",
    ]
    for flag, note in outcome.notes.items():
        lines += _wrapped(f"{flag} ({note.kind}): {note.description}")
        lines += _wrapped(f"effect: {note.effect}")
        lines += [f"      {link}" for link in note.links]
    return "\n".join(lines)


def _wrapped(sentence: str) -> list[str]:
    indent = " " * 6
    return [fill(sentence, 88, initial_indent=indent, subsequent_indent=indent + "  ")]


def _ways(outcomes: Sequence[Outcome]) -> str:
    ways: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.way:
            numbers = ways.setdefault((outcome.file, outcome.way), [])
            numbers.append(str(outcome.case.tcId))
    lines = [
        f"  {file}: as {way} in tcId {', '.join(numbers)}"
        for (file, way), numbers in ways.items()
    ]
    return "\n".join(["Where more than one answer is in use:", *lines]) if lines else ""


def _skips(outcomes: Sequence[Outcome]) -> str:
    reasons = Counter((o.file, o.detail) for o in outcomes if o.status == "skip")
    lines = [f"  {file}: {n} ({why})" for (file, why), n in reasons.items()]
    return "\n".join(["Skipped:", *lines]) if lines else ""


def _table(outcomes: Sequence[Outcome]) -> str:
    width = max((len(file) for file in _files(outcomes)), default=4)
    lines = [f"{'file':<{width}}  " + " ".join(f"{s:>6}" for s in STATUSES)]
    for file in _files(outcomes):
        count = _count([o for o in outcomes if o.file == file])
        lines.append(
            f"{file:<{width}}  " + " ".join(f"{count[s]:>6}" for s in STATUSES)
        )
    return "\n".join(lines)


def _verdict(name: str, outcomes: Sequence[Outcome]) -> str:
    count = _count(outcomes)
    policy = count["policy"]
    return (
        f"{name}: {count['pass']} passed, {count['fail']} failed, "
        f"{count['skip']} skipped of {len(outcomes)} cases"
        + (f"; {count['policy']} answered by another policy." if policy else ".")
    )


def _count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    found = Counter(outcome.status for outcome in outcomes)
    return {status: found[status] for status in STATUSES}


def _files(outcomes: Sequence[Outcome]) -> Iterator[str]:
    return iter(dict.fromkeys(outcome.file for outcome in outcomes))
