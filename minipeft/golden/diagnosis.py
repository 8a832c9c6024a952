"""Find one cause for many failures; print one case in full.

A cause is a change of the inputs or of the outputs after which the reference gives the
answer of the implementation. A cause is searched for when the simplest cases fail. It
must explain each of these and most of all wrong answers. A change that leaves the
right answer as it is explains nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minipeft.golden.arguments import FLOATS
from minipeft.golden.compare import difference
from minipeft.golden.errors import Unsupported
from minipeft.golden.implementations import functions, plain_values
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.runner import Outcome
from minipeft.golden.tensors import Array, Tensor, numpy_dtype
from minipeft.golden.vectors import Tensors

Arrays = Mapping[str, Array]
Question = tuple[dict[str, Any], dict[str, Any]]  # tensors, parameters
Change = Callable[[Arrays, Any], Question]

NEAR = 2.0**-10  # of the largest value; sums in another order differ less
SHARE = 0.25  # of the error at most remains once the cause is known
MOST = (
    0.8  # of the wrong answers; twice the scaling is alpha where r is 2, not elsewhere
)


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


def _one_step_too_few(tensors: Arrays, parameters: Any) -> Question:
    t = parameters["t"]
    if t == 0:  # the correction is 1 - beta**0: 0/0 for every weight
        return {**tensors, "W": np.full_like(tensors["W"], np.nan)}, dict(parameters)
    return dict(tensors), {**parameters, "t": t - 1}


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
    "the correction counts one step too few": _one_step_too_few,
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
}

DTYPE = "the result has another dtype, and is right but for that"


def causes(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Name one cause for each operation whose simplest cases fail, if one is found."""
    failed: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "fail" and outcome.answer and outcome.case.outputs:
            failed.setdefault(outcome.case.operation, []).append(outcome)
    for operation, found in failed.items():
        plain = [o for o in found if any(n.kind == "BASIC" for n in o.notes.values())]
        explained = {
            cause: sum(_explains(cause, outcome) for outcome in found)
            for cause in (DTYPE, *QUESTIONS, *ANSWERS)
            if plain and all(_explains(cause, outcome) for outcome in plain)
        }
        cause = max(explained, key=lambda cause: explained[cause], default="")
        if cause and explained[cause] >= MOST * len(found):
            yield (
                f"{operation}: {cause}. This explains {explained[cause]} of "
                f"{len(found)} wrong answers."
            )


def _explains(cause: str, outcome: Outcome) -> bool:
    """Tell whether the reference with this cause gives the same wrong answer."""
    answer, case = outcome.answer or {}, outcome.case
    wrong = {k for k in answer if not _right(outcome, k, answer[k])}
    if answer.keys() != case.outputs.keys() or not wrong:
        return False
    if cause == DTYPE:
        return all(_right_in_another_dtype(outcome, name) for name in wrong)
    in_answer = cause in ANSWERS
    said = _changed(cause, case.outputs) if in_answer else _asked(cause, outcome)
    return bool(said) and all(
        _accounts(answer[name], tensor, case.outputs[name])
        if name in wrong
        else _right(outcome, name, tensor)
        for name, tensor in said.items()
    )


def _right(outcome: Outcome, name: str, got: Tensor) -> bool:
    case = outcome.case
    if name not in case.outputs:
        return False
    magnitude = case.magnitudes.get(name)
    return not difference(case.compare[name], got, case.outputs[name], magnitude)


def _accounts(got: Tensor, said: Tensor, expected: Tensor) -> bool:
    """Tell whether what is said leaves little of the error."""
    left, largest = _distance(got, said), np.abs(said.numbers())
    near = NEAR * float(largest[np.isfinite(largest)].max(initial=0))
    return left <= near and left < SHARE * _distance(got, expected)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; infinity for another shape, NaN or infinity."""
    if a.shape != b.shape:
        return np.inf
    x, y = a.numbers(), b.numbers()
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.where(same, 0.0, np.abs(x - y))
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


def _right_in_another_dtype(outcome: Outcome, name: str) -> bool:
    """Tell whether one rounding, of the answer or of the output, makes it right."""
    case, got = outcome.case, (outcome.answer or {})[name]
    expected, magnitude = case.outputs[name], case.magnitudes.get(name)
    if got.dtype == expected.dtype or got.shape != expected.shape:
        return False
    if {got.dtype, expected.dtype} - {*FLOATS, "float64"}:  # no rounding to codes
        return bool((got.numbers() == expected.numbers()).all())
    try:
        pairs = ((_to(got, expected.dtype), expected), (got, _to(expected, got.dtype)))
    except Unsupported:
        return False
    rule = case.compare[name]
    return any(not difference(rule, a, b, magnitude) for a, b in pairs)


def _to(tensor: Tensor, dtype: str) -> Tensor:
    with np.errstate(all="ignore"):
        return Tensor.from_array(tensor.numbers().astype(numpy_dtype(dtype)))


def _changed(cause: str, outputs: Tensors) -> Tensors:
    try:
        with np.errstate(all="ignore"):
            return {
                name: Tensor.from_array(ANSWERS[cause](name, tensor.to_array()))
                for name, tensor in outputs.items()
            }
    except Unsupported:  # no bfloat16 here
        return {}


def _asked(cause: str, outcome: Outcome) -> Tensors:
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
    names = OPERATIONS[question.operation].outputs
    return {n: Tensor.from_array(v) for n, v in zip(names, values, strict=True)}


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
