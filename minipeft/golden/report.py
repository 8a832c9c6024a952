"""Report the results of a run: as a table, JSON, JUnit XML or a badge."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from textwrap import fill
from typing import Any
from xml.etree import ElementTree

from minipeft import __version__
from minipeft.golden import diagnosis, known
from minipeft.golden.errors import OTHER_CALL
from minipeft.golden.profiles import followed
from minipeft.golden.runner import Outcome

MANY = 4  # files that share a reason are counted instead of listed
STATUSES = ("pass", "fail", "known", "policy", "skip")


@dataclass(frozen=True)
class Run:
    """The contents of a report."""

    name: str
    outcomes: tuple[Outcome, ...]
    stopped: str = ""  # why the run ended early, or did not happen
    profile: str = ""  # the required profile, if any
    listed: known.Known = frozenset()


def text(run: Run) -> str:
    """Return the failures with their reasons, the latitude, the skips and the table."""
    outcomes = run.outcomes
    parts = [
        _causes(outcomes),
        *_failures(outcomes),
        _mended(run),
        _ways(outcomes),
        _skips(run),
        _table(outcomes),
        _verdicts(run),
    ]
    return "\n\n".join(part for part in parts if part)


def _causes(outcomes: Sequence[Outcome]) -> str:
    found = [f"  {cause}" for cause in diagnosis.causes(outcomes)]
    return (
        "\n".join(["Where the plainest cases fail, one cause:", *found])
        if found
        else ""
    )


def _failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """List the failures; explain a flag, or a wrong signature, only once per file."""
    told: set[tuple[str, str]] = set()
    failed = [outcome for outcome in outcomes if outcome.status == "fail"]
    wrong = [o for o in failed if o.detail.startswith(OTHER_CALL)]
    uncalled = Counter((outcome.file, outcome.detail) for outcome in wrong)
    for (file, detail), count in uncalled.items():
        cases = "1 case" if count == 1 else f"{count} cases"
        yield f"FAIL  {file}: {cases}\n      {detail}"
    for outcome in failed:
        if (outcome.file, outcome.detail) not in uncalled:
            file, notes = outcome.file, outcome.notes
            new = {flag: n for flag, n in notes.items() if (file, flag) not in told}
            told |= {(file, flag) for flag in new}
            yield failure(replace(outcome, notes=new))


def as_json(run: Run) -> str:
    """Return the same as one JSON object."""
    agreeing, choices = followed(run.outcomes)
    report = {
        "implementation": run.name,
        "minipeft": __version__,
        "totals": _count(run.outcomes),
        "verdicts": _three(run.outcomes),
        "profile": run.profile,
        "choices": {"all": choices, "as": agreeing},
        "causes": list(diagnosis.causes(run.outcomes)),
        "mended": known.mended(run.listed, run.outcomes),
        "stopped": run.stopped,
        "cases": [_case(outcome) for outcome in run.outcomes],
    }
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def as_junit(run: Run) -> str:
    """Return the same as JUnit XML: one suite for each file, one test for each case."""
    root = ElementTree.Element("testsuites", name=f"minipeft verify {run.name}")
    if run.stopped:
        one = {"name": "run", "tests": "1", "errors": "1"}
        suite = ElementTree.SubElement(root, "testsuite", one)
        test = ElementTree.SubElement(suite, "testcase", name=run.name)
        ElementTree.SubElement(test, "error", message=run.stopped)
    for file in _files(run.outcomes):
        cases = [outcome for outcome in run.outcomes if outcome.file == file]
        count = _count(cases)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=file,
            tests=str(len(cases)),
            failures=str(count["fail"]),
            skipped=str(count["skip"] + count["known"]),
        )
        for outcome in cases:
            _junit_case(suite, outcome)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_badge(run: Run) -> str:
    """Return a badge for shields.io: https://shields.io/badges/endpoint-badge."""
    count = _count(run.outcomes)
    asked = count["pass"] + count["fail"] + count["known"]
    failed = count["fail"] or run.stopped
    color = "red" if failed else "yellow" if count["known"] else "brightgreen"
    badge = {
        "schemaVersion": 1,
        "label": "minipeft vectors v1",
        "message": "not run" if run.stopped else f"{count['pass']} of {asked}",
        "color": color,
    }
    return json.dumps(badge) + "\n"


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
        "exact": "" if outcome.exact is None else outcome.exact,
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
    if outcome.status == "known":
        said = f"a known failure: {outcome.detail}"
        ElementTree.SubElement(test, "skipped", message=said)


def failure(outcome: Outcome) -> str:
    """Describe a failure: the difference, the reason for the test, its effect."""
    case = outcome.case
    lines = [
        f"FAIL  {outcome.file} tcId {case.tcId}: {case.comment}",
        f"      {outcome.detail}",
    ]
    told = [flag for flag in case.flags if flag not in outcome.notes]
    lines += [f"      {', '.join(told)}: as above"] if told else []
    for flag, note in outcome.notes.items():
        lines += _wrapped(f"{flag} ({note.kind}): {note.description}")
        lines += _wrapped(f"effect: {note.effect}")
        lines += [f"      {link}" for link in note.links]
    return "\n".join(lines)


def _wrapped(sentence: str, indent: int = 6) -> list[str]:
    first = " " * indent
    return [
        fill(
            sentence,
            88,
            initial_indent=first,
            subsequent_indent=first + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _mended(run: Run) -> str:
    names = known.mended(run.listed, run.outcomes)
    if not names:
        return ""
    return f"Known failures that pass now; take them out: {', '.join(names)}"


def _ways(outcomes: Sequence[Outcome]) -> str:
    ways: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.way and outcome.status == "pass":
            numbers = ways.setdefault((outcome.file, outcome.way), [])
            numbers.append(str(outcome.case.tcId))
    lines = [
        f"  {file}: as {way} in tcId {', '.join(numbers)}"
        for (file, way), numbers in ways.items()
    ]
    return "\n".join(["Where more than one answer is in use:", *lines]) if lines else ""


def _skips(run: Run) -> str:
    """List the skipped cases: by reason, or by file if a reason has only one file."""
    reasons: dict[str, Counter[str]] = {}
    absent: dict[str, None] = {}  # in order, each once
    for outcome in run.outcomes:
        if outcome.status != "skip":
            continue
        operation = outcome.case.operation
        if outcome.detail == f"{run.name} has no function {operation}":
            absent[operation] = None
        else:
            reasons.setdefault(outcome.detail, Counter())[outcome.file] += 1
    lines = []
    for why, files in reasons.items():
        if len(files) > MANY:
            lines.append(f"  {len(files)} files: {files.total()} ({why})")
        else:
            lines += [f"  {file}: {n} ({why})" for file, n in files.items()]
    if absent:
        lines += _wrapped(f"{run.name} has no function {', '.join(absent)}", 2)
    return "\n".join(["Skipped:", *lines]) if lines else ""


def _table(outcomes: Sequence[Outcome]) -> str:
    counts = {f: _count([o for o in outcomes if o.file == f]) for f in _files(outcomes)}
    shown = {file: c for file, c in counts.items() if c["skip"] < sum(c.values())}
    width = max((len(file) for file in shown), default=4)
    lines = [f"{'file':<{width}}  " + " ".join(f"{s:>6}" for s in STATUSES)]
    for file, count in shown.items():
        numbers = " ".join(f"{count[s]:>6}" for s in STATUSES)
        lines.append(f"{file:<{width}}  {numbers}")
    return "\n".join(lines) if shown else ""


def _verdicts(run: Run) -> str:
    """Return the three verdicts, the nearest profile, and the total."""
    count, three = _count(run.outcomes), _three(run.outcomes)
    agreeing, choices = followed(run.outcomes)
    nearest = sorted(agreeing, key=lambda name: -agreeing[name])
    lines = [
        f"{what}: {yes} of {yes + no}{unit}"
        for what, unit in _UNITS.items()
        for yes, no in [three[what].values()]
        if yes + no
    ]
    if choices:
        each = ", ".join(f"{name} {agreeing[name]}" for name in nearest)
        lines += _wrapped(
            f"choices as each profile makes them, of {choices}: {each}", 0
        )
    if run.profile:
        lines.append(f"the rule: profile {run.profile}")
    excused = f", {count['known']} failed as known" if count["known"] else ""
    lines.append(
        f"{run.name}: {count['pass']} passed, {count['fail']} failed{excused}, "
        f"{count['skip']} skipped of {len(run.outcomes)} cases"
        + (f"; {n} answered by another policy." if (n := count["policy"]) else ".")
    )
    return "\n".join(lines)


_UNITS = {
    "correct": "",
    "bit-exact": " answers",
    "policy": " refused as minipeft does (never a failure)",
}


def _three(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Count three verdicts: correct, equal in every byte, the same policy."""
    asked = [o for o in outcomes if o.status != "skip"]
    numbers = [o for o in asked if o.case.result != "policy"]
    policies = [o for o in asked if o.case.result == "policy"]
    exact = [o.exact for o in numbers if o.exact is not None]
    return {
        "correct": _yes_no([o.status == "pass" for o in numbers]),
        "bit-exact": _yes_no([bool(e) for e in exact]),
        "policy": _yes_no([o.status == "pass" for o in policies]),
    }


def _yes_no(found: Sequence[bool]) -> dict[str, int]:
    return {"yes": sum(found), "no": len(found) - sum(found)}


def _count(outcomes: Sequence[Outcome]) -> dict[str, int]:
    found = Counter(outcome.status for outcome in outcomes)
    return {status: found[status] for status in STATUSES}


def _files(outcomes: Sequence[Outcome]) -> Iterator[str]:
    return iter(dict.fromkeys(outcome.file for outcome in outcomes))
