"""Run an implementation over the vectors and judge every answer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minipeft.golden.compare import difference
from minipeft.golden.errors import (
    OTHER_CALL,
    Accident,
    Late,
    NoAnswer,
    Refused,
    Unsupported,
    printable,
)
from minipeft.golden.implementations import COLUMNS, Implementation, functions
from minipeft.golden.processes import MODULE_TIMEOUT, worker
from minipeft.golden.vectors import Case, Note, Tensors, VectorFile, Way

__all__ = ["Outcome", "implementation", "is_exact", "judge", "unasked", "verify"]

OUR_WAY = "minipeft"
REFUSES = "refuses"  # the way of a refusal, where the vector has no outputs of ours
PATIENCE = 3  # time-outs after which the rest of an operation is skipped


@dataclass(frozen=True)
class Outcome:
    """The result of one case."""

    file: str
    case: Case
    notes: dict[str, Note]  # of the case's flags
    # pass, fail, skip; policy: it answers a case that minipeft refuses by choice;
    # known: a listed failure
    status: str
    detail: str = ""  # why it failed or was skipped
    way: str = ""  # for `acceptable` results: the name of the answer
    ways: tuple[str, ...] = ()  # all accepted answers that it agrees with
    exact: bool | None = None  # equal in every byte, not only within a bound
    answer: Tensors | None = None  # the returned outputs
    answered: bool = True  # False: a crash, silence, or an invalid answer
    late: bool = False


Judge = Callable[..., Outcome]


def implementation(
    name: str,
    timeout: float = MODULE_TIMEOUT,
    folder: Path | None = None,
    paths: Sequence[Path] = (),
) -> Implementation:
    """Find an implementation by name; compiled code gets a process of its own.

    Args:
        name: of a column, of a peer, or of a module.
        timeout: seconds that a case may take.
        folder: where a module is looked for first; None: here.
        paths: other folders that a module may be in, or may import from.

    Raises:
        InputError: if there is no such module.
        Unavailable: if a package or a device that it needs is missing.
    """
    return functions(name) if name in COLUMNS else worker(name, timeout, folder, paths)


def verify(
    implementation: Implementation, files: Iterable[VectorFile]
) -> Iterator[Outcome]:
    """Judge every case in order; after three time-outs skip the operation."""
    for file in files:
        late = 0
        for case in file.cases:
            if late == PATIENCE:
                yield unasked(file, case, f"not asked after {PATIENCE} time-outs")
                continue
            outcome = judge(implementation, file, case)
            late += outcome.late
            yield outcome


def judge(implementation: Implementation, file: VectorFile, case: Case) -> Outcome:
    """Run one case and compare the answer with the vector."""

    def outcome(status: str, detail: str = "") -> Outcome:
        return _outcome(file, case, status, detail)

    try:
        answer = implementation.run(case)
    except Unsupported as reason:
        return outcome("skip", str(reason))
    except NoAnswer as silence:
        late = isinstance(silence, Late)
        failed = replace(outcome(""), status="fail", detail=printable(str(silence)))
        return replace(failed, answered=False, late=late)  # a crash is no policy
    except Accident as accident:
        return outcome("fail", str(accident))
    except Refused as refusal:
        return _judge_refusal(outcome, case, str(refusal))
    return replace(_judge_answer(outcome, case, answer), answer=answer)


def unasked(file: VectorFile, case: Case, why: str) -> Outcome:
    """Return the outcome of a case that was not run."""
    return replace(_outcome(file, case, "skip", why), answered=False)


def is_exact(case: Case, answer: Tensors | None, ways: Iterable[str]) -> bool | None:
    """Tell whether an answer equals one of the accepted outputs in every byte."""
    if answer is None:
        return None
    of = {OUR_WAY: case.outputs, **{way.name: way.outputs for way in case.alternatives}}
    return any(of[way] == answer for way in ways)


def _outcome(file: VectorFile, case: Case, status: str, detail: str) -> Outcome:
    notes = {flag: file.notes[flag] for flag in case.flags}
    if case.result == "policy" and status == "fail":
        # Where the function could not be called, it has chosen nothing.
        status = "skip" if detail.startswith(OTHER_CALL) else "policy"
    return Outcome(file.name, case, notes, status, printable(detail))


def _went(outcome: Outcome, answer: Tensors | None, ways: list[str]) -> Outcome:
    """Add the names of the accepted answers that a correct answer agrees with."""
    exact = is_exact(outcome.case, answer, ways)
    chosen = outcome.case.result == "acceptable"
    way, all_ways = (ways[0], tuple(ways)) if chosen else ("", ())
    return replace(outcome, way=way, ways=all_ways, exact=exact)


def _judge_refusal(outcome: Judge, case: Case, why: str) -> Outcome:
    if case.result in ("invalid", "policy"):
        return outcome("pass")
    ways = [way.name for way in case.alternatives if way.outputs is None]
    if case.result == "acceptable" and not case.outputs:
        ways = [REFUSES]
    if ways:
        return _went(outcome("pass"), None, ways)
    return outcome("fail", f"refused a valid input: {why}")


def _judge_answer(outcome: Judge, case: Case, answer: Tensors) -> Outcome:
    if case.result == "invalid":
        return outcome("fail", "answered, where it must refuse the input")
    if case.result == "policy":
        return outcome("policy", "answered, where minipeft refuses the input")
    detail: str | None = "answered, where it should refuse the input"
    ways = []
    if case.outputs:
        detail = _disagreement(case, answer, case.outputs)
        ways += [OUR_WAY] if detail is None else []
    ways += [
        way.name
        for way in case.alternatives
        if way.outputs and _disagreement(case, answer, way.outputs, way) is None
    ]
    if ways:
        return _went(outcome("pass"), answer, ways)
    return outcome("fail", detail or "")


def _disagreement(
    case: Case, answer: Tensors, expected: Tensors, way: Way | None = None
) -> str | None:
    rules, magnitudes = case.compare, case.magnitudes
    if way and way.compare:
        rules, magnitudes = way.compare, way.magnitudes
    if set(answer) != set(expected):
        return f"returned {sorted(answer)}, expected {sorted(expected)}"
    for name, tensor in expected.items():
        found = difference(rules[name], answer[name], tensor, magnitudes.get(name))
        if found:
            return f"{name} {found}"
    return None
