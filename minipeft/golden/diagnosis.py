"""Find one cause for many failures; print one case in full.

A cause is a change of the inputs or of the outputs after which the reference gives the
answer of the implementation. A cause is searched for when the simplest cases fail.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minipeft.golden.implementations import functions, plain_values
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.runner import Outcome
from minipeft.golden.tensors import Array, Tensor
from minipeft.golden.vectors import Tensors

Arrays = Mapping[str, Array]
Question = tuple[dict[str, Any], dict[str, Any]]  # tensors, parameters
Change = Callable[[Arrays, Any], Question]

NEAR = 2.0**-10  # of the largest value; sums in another order differ less


def _alpha(factor: Callable[[int], float]) -> Change:
    def change(tensors: Arrays, parameters: Any) -> Question:
        r = len(tensors["A"])
        return dict(tensors), {**parameters, "alpha": factor(r) * parameters["alpha"]}

    return change


def _set(name: str, value: Callable[[Any, Arrays], Any]) -> Change:
    def change(tensors: Arrays, parameters: Any) -> Question:
        changed = value(parameters[name], tensors)
        return dict(tensors), {**parameters, name: changed}

    return change


def _tensor(name: str, other: Callable[[Array], Any]) -> Change:
    def change(tensors: Arrays, parameters: Any) -> Question:
        return {**tensors, name: other(tensors[name])}, dict(parameters)

    return change


def _unscaled(tensors: Arrays, parameters: Any) -> Question:
    plain = {"alpha": float(len(tensors["A"]))}
    if "rank_stabilized" in parameters:
        plain["rank_stabilized"] = False
    return dict(tensors), {**parameters, **plain}


def _swapped(packed: Array) -> Array:
    return packed >> 4 | packed << 4


# Changes of the inputs.
QUESTIONS: dict[str, Change] = {
    "the scaling is alpha, not alpha/r": _alpha(float),
    "the scaling is alpha/sqrt(r), not alpha/r": _alpha(lambda r: r**0.5),
    "the scaling is alpha/r, not alpha/sqrt(r)": _set(
        "rank_stabilized", lambda value, _: False
    ),
    "the scaling is left out": _unscaled,
    "the scaling of the adapter is left out": _set("scaling", lambda *_: 1.0),
    "the update is missing": _tensor("B", np.zeros_like),
    "the update has the other sign": _tensor("B", np.negative),
    "the bias is missing": _tensor("bias", np.zeros_like),
    "d is left out": _tensor("d", np.ones_like),
    "b is left out": _tensor("b", np.ones_like),
    "the magnitude is left out": _tensor("magnitude", np.ones_like),
    "l is left out": _tensor("l", np.ones_like),
    "l scales the other side": _set(
        "side", lambda side, _: "input" if side == "output" else "output"
    ),
    "W is read as its transpose": _tensor("W", lambda W: W.T.copy()),
    "the logits are not divided by sqrt(d)": _tensor(
        "Q", lambda Q: Q * Q.shape[-1] ** 0.5
    ),
    "the logits are divided by d, not sqrt(d)": _tensor(
        "Q", lambda Q: Q / Q.shape[-1] ** 0.5
    ),
    "the mask is ignored": _tensor("mask", np.ones_like),
    "the correction counts one step too few": _set("t", lambda t, _: max(t - 1, 0)),
    "the correction counts one step too many": _set("t", lambda t, _: t + 1),
    "the moments are not corrected": _set("t", lambda t, _: 10**6),
    "the weight does not decay": _set("weight_decay", lambda *_: 0.0),
    "the first code is read from the low bits": _tensor("packed", _swapped),
    "the scales are left out": _tensor("absmax", np.ones_like),
}

# Changes of the outputs.
ANSWERS: dict[str, Callable[[str, Array], Array]] = {
    "the first code stands in the low bits": lambda name, a: (
        _swapped(a) if name == "packed" else a
    ),
    "absmax is stored as its reciprocal": lambda name, a: (
        1 / a if name == "absmax" else a
    ),
    "the result is transposed": lambda name, a: a.T.copy() if a.ndim == 2 else a,
    "the sign of the result is turned": lambda name, a: (
        a if a.dtype == np.uint8 else -a
    ),
    "the result has another dtype, and is right but for that": lambda name, a: a,
}


def causes(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Name one cause for each operation whose simplest cases fail, if one is found."""
    failed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "fail" and outcome.answer and outcome.case.outputs:
            failed.setdefault(outcome.case.operation, []).append(outcome)
    for operation, found in failed.items():
        plain = [o for o in found if any(n.kind == "BASIC" for n in o.notes.values())]
        cause = next((c for c in (*QUESTIONS, *ANSWERS) if _all(c, plain)), None)
        if plain and cause:
            explained = sum(_explains(cause, outcome) for outcome in found)
            yield (
                f"{operation}: {cause}. This explains {explained} of {len(found)} "
                "wrong answers."
            )


def _all(cause: str, outcomes: list[Outcome]) -> bool:
    return bool(outcomes) and all(_explains(cause, outcome) for outcome in outcomes)


def _explains(cause: str, outcome: Outcome) -> bool:
    """Tell whether the reference with this cause gives the same answer."""
    answer, case = outcome.answer or {}, outcome.case
    if answer.keys() != case.outputs.keys():
        return False
    if cause in ANSWERS:
        ours = {k: t.to_array() for k, t in case.outputs.items()}
        with np.errstate(all="ignore"):
            said: Arrays = {k: ANSWERS[cause](k, array) for k, array in ours.items()}
    else:
        said = _asked(cause, outcome)
    return bool(said) and all(
        _near(answer[k], Tensor.from_array(said[k])) for k in said
    )


def _asked(cause: str, outcome: Outcome) -> Arrays:
    """Return what the reference answers to the other question: nothing, if refused."""
    question = outcome.case.question
    arrays = {name: t.to_array() for name, t in question.inputs.items()}
    try:
        tensors, plain = QUESTIONS[cause](arrays, question.parameters)
        function = functions("reference").find(question.operation)
        with np.errstate(all="ignore"):
            returned = function(**tensors, **plain_values(plain))
    except Exception:  # the cause does not apply, or its inputs are refused
        return {}
    values = returned if isinstance(returned, tuple) else (returned,)
    return dict(zip(OPERATIONS[question.operation].outputs, values, strict=True))


def _near(got: Tensor, said: Tensor) -> bool:
    if got.shape != said.shape:
        return False
    a, b = got.numbers(), said.numbers()
    largest = np.abs(b[np.isfinite(b)]).max(initial=0)
    with np.errstate(invalid="ignore"):  # an infinity is near only to itself
        return bool(((a == b) | (np.abs(a - b) <= NEAR * largest)).all())


def explain(outcome: Outcome) -> str:
    """Print a case in full: inputs, expected outputs, actual outputs."""
    case = outcome.case
    lines = [f"{case.operation}:{case.tcId}  {case.comment}", f"result: {case.result}"]
    lines += [f"{name} = {value}" for name, value in case.question.parameters.items()]
    lines += _shown("", case.question.inputs)
    lines += _shown("expected ", case.outputs)
    for way in case.alternatives:
        lines.append(f"{way.name}: {way.by}")
        lines += _shown(f"{way.name} ", way.outputs or {})
    lines += _shown("got ", outcome.answer or {})
    said = f"{outcome.status}: {outcome.detail}" if outcome.detail else outcome.status
    return "\n".join([*lines, said, *causes([outcome])])


def _shown(prefix: str, tensors: Tensors) -> Iterator[str]:
    for name, tensor in tensors.items():
        yield f"{prefix}{name}: {tensor.dtype} {list(tensor.shape)}"
        if name == "packed":
            codes = [c for byte in tensor.data for c in (byte >> 4, byte & 15)]
            yield "  codes " + " ".join(map(str, codes))
        else:
            yield "  " + np.array2string(
                tensor.numbers(), threshold=200, prefix="  ", max_line_width=88
            )
