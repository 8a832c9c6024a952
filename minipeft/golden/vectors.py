"""Read the files of vectors."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Tensor

V1 = Path(__file__).parent / "v1"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Note:
    """The meaning of a flag."""

    kind: str
    description: str
    effect: str
    links: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """An accepted answer of another library; without outputs: a refusal."""

    name: str  # the name that a profile lists
    by: str
    outputs: Tensors | None
    compare: dict[str, str]  # with its magnitudes; empty: those of the case
    magnitudes: Tensors


@dataclass(frozen=True)
class Question:
    """The function to call, and its arguments."""

    operation: str
    parameters: dict[str, Any]
    inputs: Tensors

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Question":
        """Read the object that `to_json` wrote."""
        inputs = _tensors(value["inputs"])
        return cls(value["operation"], value["parameters"], inputs)

    def to_json(self) -> dict[str, Any]:
        """Return the object that a program reads on stdin."""
        return {
            "operation": self.operation,
            "parameters": self.parameters,
            "inputs": {name: tensor.to_json() for name, tensor in self.inputs.items()},
        }


@dataclass(frozen=True)
class Case:
    """One test: a question, and the expected outputs."""

    question: Question
    tcId: int  # noqa: N815  # the name in the file
    comment: str
    flags: tuple[str, ...]
    result: str
    compare: dict[str, str]
    outputs: Tensors
    magnitudes: Tensors
    alternatives: tuple[Way, ...]

    @property
    def operation(self) -> str:
        """The name of the function that is called."""
        return self.question.operation


@dataclass(frozen=True)
class VectorFile:
    """All cases of one operation."""

    name: str
    notes: dict[str, Note]
    cases: tuple[Case, ...]


def load(path: Path) -> VectorFile:
    """Read one file.

    Raises:
        InputError: if the file is absent or damaged.
    """
    if not path.exists():
        raise InputError(f"{path} is missing; run: python -m minipeft.golden.generate")
    try:
        return _file(path.name, json.loads(path.read_text(encoding="utf-8")))
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path} is damaged ({reason[:200]}); install minipeft again"
        ) from None


def _file(name: str, content: Mapping[str, Any]) -> VectorFile:
    notes = {
        flag: Note(n["kind"], n["description"], n["effect"], tuple(n["links"]))
        for flag, n in content["notes"].items()
    }
    cases = tuple(
        _case(content["method"], group, test)
        for group in content["testGroups"]
        for test in group["tests"]
    )
    return VectorFile(name, notes, cases)


def load_all(only: Iterable[str] = ()) -> Iterator[VectorFile]:
    """Read the files in the table's order: all, or those of some operations or rows."""
    wanted = set(only)
    choices = {*OPERATIONS, *(op.row for op in OPERATIONS.values())}
    if wanted - choices:
        raise InputError(
            f"there are no vectors for {', '.join(sorted(wanted - choices))}; "
            f"choose from {', '.join(sorted(choices))}."
        )
    for name, operation in OPERATIONS.items():
        if not wanted or wanted & {name, operation.row}:
            yield load(V1 / f"{name}.json")


def _case(operation: str, group: Mapping[str, Any], test: Mapping[str, Any]) -> Case:
    ways = (
        Way(
            way["name"],
            way["by"],
            _tensors(way["outputs"]) if "outputs" in way else None,
            way.get("compare", {}),
            _tensors(way.get("magnitudes", {})),
        )
        for way in test.get("alternatives", ())
    )
    return Case(
        question=Question(operation, group["parameters"], _tensors(test["inputs"])),
        tcId=test["tcId"],
        comment=test["comment"],
        flags=tuple(test["flags"]),
        result=test["result"],
        compare=group["compare"],
        outputs=_tensors(test.get("outputs", {})),
        magnitudes=_tensors(test.get("magnitudes", {})),
        alternatives=tuple(ways),
    )


def _tensors(named: Mapping[str, Any]) -> Tensors:
    return {name: Tensor.from_json(value) for name, value in named.items()}
