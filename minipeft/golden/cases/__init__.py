"""The cases, one file or package for each row of methods: `files()` yields them.

The author of a case writes its inputs and its reason; the reference computes the
expected outputs. `generate` defines the format of the files.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import numpy as np

from minipeft.golden.implementations import functions, plain_values
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.tensors import Array
from minipeft.golden.vectors import Note

Named = Mapping[str, Array]

# Refusals that are a choice: an answer is no error, and is counted separately.
POLICIES = frozenset(
    {"NotFinite", "ZeroRank", "InvalidAlpha", "BlindQuery", "SeedRange"}
)


@dataclass(frozen=True)
class Alternative:
    """An accepted answer of another library; without outputs: a refusal."""

    name: str  # of `golden.ways`
    outputs: Named | None
    roundings: Mapping[str, int] | None = None  # None: those of the case
    magnitudes: Named | None = None


@dataclass(frozen=True)
class Spec:
    """A case as its author writes it."""

    comment: str
    flags: tuple[str, ...]
    inputs: Named
    parameters: Mapping[str, Any]
    result: str = "valid"
    roundings: Mapping[str, int] = field(default_factory=dict)  # n of gamma:n
    outputs: Named | None = None  # None: the reference computes them
    magnitudes: Named | None = None  # None: the reference, on absolute values
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class File:
    """All cases of one operation."""

    operation: str
    header: tuple[str, ...]
    source: str  # the module that computes the outputs
    specs: Sequence[Spec]
    papers: tuple[str, ...] = ()  # the sources of the formula


def gaussian(
    seed: str, shape: tuple[int, ...], std: float = 1.0, dtype: Any = np.float32
) -> Array:
    """Draw normal values, the same in all NumPy versions, from PCG64 words."""
    words = np.random.PCG64(crc32(seed.encode())).random_raw(int(np.prod(shape)))
    inverse = NormalDist(0, std).inv_cdf
    values = [inverse(((int(word) >> 11) + 0.5) * 2.0**-53) for word in words]
    return np.array(values).reshape(shape).astype(dtype)


def integers(seed: str, shape: tuple[int, ...], largest: int = 4) -> Array:
    """Draw whole numbers from -largest to largest, none of them 0, as float32."""
    words = np.random.PCG64(crc32(seed.encode())).random_raw(int(np.prod(shape)))
    size = (words >> np.uint64(11)) % np.uint64(largest) + np.uint64(1)
    sign = 1 - 2 * (words >> np.uint64(63)).astype(np.int64)
    return (sign * size.astype(np.int64)).reshape(shape).astype(np.float32)


def catalogue() -> dict[str, Note]:
    """Return the note of every flag."""
    text = Path(__file__).with_name("notes.toml").read_text(encoding="utf-8")
    notes = tomllib.loads(text)
    return {
        flag: Note(n["kind"], n["description"], n["effect"], tuple(n.get("links", ())))
        for flag, n in notes.items()
    }


def used(file: File) -> dict[str, Note]:
    """Return the notes that at least one case refers to; basic ones name the papers."""
    notes, flags = catalogue(), {flag for spec in file.specs for flag in spec.flags}
    if flags - set(notes):
        raise KeyError(f"no note for {sorted(flags - set(notes))}")
    return {
        flag: replace(note, links=tuple(dict.fromkeys((*note.links, *file.papers))))
        if note.kind == "BASIC"
        else note
        for flag, note in notes.items()
        if flag in flags
    }


def reference(operation: str, inputs: Named, parameters: Mapping[str, Any]) -> Named:
    """Compute the outputs of an operation with the reference column."""
    function = functions("reference").find(operation)
    returned = function(**inputs, **plain_values(parameters))
    values = returned if isinstance(returned, tuple) else (returned,)
    return dict(zip(OPERATIONS[operation].outputs, values, strict=True))


def any_zero(operation: str, spec: Spec) -> Spec:
    """Accept 0 for -0 in an exact case: the order of a sum decides the sign."""
    outputs = reference(operation, spec.inputs, spec.parameters)
    sizes = {name: np.abs(array) for name, array in outputs.items()}
    return replace(spec, roundings=dict.fromkeys(outputs, 1), magnitudes=sizes)
