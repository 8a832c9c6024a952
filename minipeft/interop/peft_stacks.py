"""Which stack of experts of a base each pair A, B of a file belongs to.

The file says how the stacks of a module nest, and not which comes first. The shapes
say it: at most one way to give the pairs to the stacks fits.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import peft_experts, peft_update
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import About
from minipeft.interop.update import Update

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where a pair belongs.

    Attributes:
        name: of the stack, in the base.
        turned: whether the base stores it as (experts, in_features, out_features).
    """

    name: str
    turned: bool


def owner(module: str) -> tuple[str, str]:
    """Return the module that holds the parameters, and how deep a pair is nested."""
    found = re.fullmatch(r"(?P<owner>.+?)(?P<level>(?:\.base_layer)*)", module)
    assert found is not None
    level = peft_experts.NESTED * found["level"].count(".base_layer")
    return found["owner"], level


def parameters(module: str, config: Mapping[str, Any]) -> list[str]:
    """Return the names of a module's parameters that the settings name."""
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(w, str) for w in wanted):
        raise InputError(f"target_parameters is {wanted!r}; it must be a list of names")
    split = (target.rpartition(".") for target in wanted)
    found = [
        p
        for inside, _, p in split
        if f".{module}".endswith(f".{inside}" * bool(inside))
    ]
    return [*dict.fromkeys(found)]


def updates(
    module: str,
    parts: Mapping[str, Tensor],
    config: Mapping[str, Any],
    names: Mapping[str, About],
    upright: Container[str] = (),
) -> dict[str, Update]:
    """Return the updates of a module's stacks, by the base's names of these.

    Args:
        module: that holds the stacks.
        parts: by their names behind it.
        config: of the adapter.
        names: of the base's tensors, with their shapes.
        upright: as in `places`.

    Raises:
        InputError: the base has no such stacks.
    """
    levels = {part.removesuffix("lora_A") for part in parts if part.endswith("lora_A")}
    wanted = {f"{level}lora_{M}" for level in levels for M in "AB"}
    if set(parts) != wanted:
        odd = min(wanted ^ set(parts))
        raise InputError(f"{module} lacks or should not have {odd}; get the file again")
    pairs = {
        level: (parts[f"{level}lora_A"], parts[f"{level}lora_B"]) for level in levels
    }
    shapes = {level: (A.shape, B.shape) for level, (A, B) in pairs.items()}
    found = {}
    for level, place in places(module, shapes, config, names, upright).items():
        A, B = pairs[level]
        shape = names[place.name].shape
        if len(shape) == 2:
            both = {"lora_A": A, "lora_B": B}
            found[place.name] = peft_update.update(place.name, both, config)
        else:
            name = f"{module}.{place.name.rpartition('.')[2]}"
            update = peft_experts.update(name, A, B, config, shape[0])
            found[place.name] = replace(update, transposed=place.turned)
    return found


def places(
    module: str,
    shapes: Mapping[str, tuple[Shape, Shape]],
    config: Mapping[str, Any],
    names: Mapping[str, About],
    upright: Container[str] = (),
) -> dict[str, Place]:
    """Return the stack that each pair of a module belongs to.

    Args:
        module: that holds the stacks.
        shapes: of A and of B, by how deep they are nested.
        config: of the adapter.
        names: of the base's tensors, with their shapes.
        upright: names of the stacks that are surely (experts, out_features,
            in_features).

    Raises:
        InputError: no way fits, or several do.
    """
    own = [counterpart(f"{module}.{p}", names) for p in parameters(module, config)]
    stacks = [name for name in own if name is not None]
    if not stacks or len(stacks) != len(shapes):
        raise InputError(_other_stacks(module, stacks, len(shapes)))
    ways = _ways(shapes, stacks, names, upright)
    if not ways:
        raise InputError(
            f"the adapter's matrices of {module} have the shapes of another base's "
            "experts; give the base that it was trained on"
        )
    if len(ways) > 1:
        raise InputError(
            f"the experts of {module} are square, so that no shape says which way they "
            "are stored; load the model and the adapter, and merge there"
        )
    return ways[0]


def _ways(
    shapes: Mapping[str, tuple[Shape, Shape]],
    stacks: Sequence[str],
    names: Mapping[str, About],
    upright: Container[str],
) -> list[dict[str, Place]]:
    """Return every way to give the pairs to the stacks in which the shapes fit."""
    return [
        dict(zip(shapes, (Place(name, turned) for name in order), strict=True))
        for order in permutations(stacks)
        for turned in (False, True)
        if not (turned and any(name in upright for name in order))
        and all(
            _fit(shapes[level], names[name].shape, turned)
            for level, name in zip(shapes, order, strict=True)
        )
    ]


def _fit(pair: tuple[Shape, Shape], stack: Shape, turned: bool) -> bool:
    A, B = pair
    if len(stack) == 2:
        return not turned and A[1:] == stack[1:] and B[:1] == stack[:1]
    if len(stack) != 3 or len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        return False
    experts, rows, columns = stack
    if turned:
        rows, columns = columns, rows
    return (B[0], A[1]) == (rows, columns) and A[0] % experts == 0 < A[0]


def _other_stacks(module: str, stacks: Sequence[str], pairs: int) -> str:
    if stacks:
        return (
            f"the adapter holds {pairs} pairs A, B for {module}, and the base has "
            f"{len(stacks)} of the stacks that target_parameters names there; give the "
            "base that it was trained on"
        )
    return (
        f"the adapter changes {module}, which the base does not have; give the base "
        "that it was trained on"
    )
