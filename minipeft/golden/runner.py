"""Run an implementation over the vectors and judge every answer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minipeft.golden.compare import difference
from minipeft.golden.errors import Accident, Refused, Unsupported
from minipeft.golden.implementations import COLUMNS, Implementation, functions
from minipeft.golden.processes import Worker
from minipeft.golden.vectors import Case, Note, Tensors, VectorFile

__all__ = ["Outcome", "implementation", "judge", "verify"]

OUR_WAY = "minipeft"


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    file: str
    case: Case
    notes: dict[str, Note]  # of the case's flags
    status: str  # pass, fail or skip
    detail: str = ""  # why it failed or was skipped
    way: str = ""  # where the result is `acceptable`: whose way it goes


def implementation(name: str, timeout: float = 120.0) -> Implementation:
    """Find an implementation by name; what may crash runs in a process of its own.

    Raises:
        InputError: if there is no such module.
        Unavailable: if it needs a package or a device that is missing here.
    """
    return functions(name) if name in COLUMNS else Worker(name, timeout)


def verify(
    implementation: Implementation, files: Iterable[VectorFile]
) -> Iterator[Outcome]:
    """Judge every case of every file, in order."""
    for file in files:
        for case in file.cases:
            yield judge(implementation, file, case)


def judge(implementation: Implementation, file: VectorFile, case: Case) -> Outcome:
    """Run one case and compare the answer with the vector."""
    notes = {flag: file.notes[flag] for flag in case.flags}

    def outcome(status: str, detail: str = "", way: str = "") -> Outcome:
        return Outcome(file.name, case, notes, status, detail, way)

    try:
        answer = implementation.run(case)
    except Unsupported as reason:
        return outcome("skip", str(reason))
    except Accident as accident:
        return outcome("fail", str(accident))
    except Refused as refusal:
        return outcome(*_judge_refusal(case, str(refusal)))
    return outcome(*_judge_answer(case, answer))


def _judge_refusal(case: Case, why: str) -> tuple[str, str, str]:
    if case.result == "invalid":
        return "pass", "", ""
    ways = [way.by for way in case.alternatives if way.outputs is None]
    if case.result == "acceptable" and not case.outputs:
        ways = [OUR_WAY]
    if ways:
        return "pass", "", ways[0]
    return "fail", f"refused a valid input: {why}", ""


def _judge_answer(case: Case, answer: Tensors) -> tuple[str, str, str]:
    if case.result == "invalid":
        return "fail", "answered, where it must refuse the input", ""
    detail = "answered, where it should refuse the input"
    if case.outputs:
        found = _disagreement(case, answer, case.outputs)
        if found is None:
            return "pass", "", OUR_WAY if case.result == "acceptable" else ""
        detail = found
    for way in case.alternatives:
        if way.outputs and _disagreement(case, answer, way.outputs) is None:
            return "pass", "", way.by
    return "fail", detail, ""


def _disagreement(case: Case, answer: Tensors, expected: Tensors) -> str | None:
    if set(answer) != set(expected):
        return f"returned {sorted(answer)}, expected {sorted(expected)}"
    for name, tensor in expected.items():
        magnitude = case.magnitudes.get(name)
        found = difference(case.compare[name], answer[name], tensor, magnitude)
        if found:
            return f"{name} {found}"
    return None
