"""Functions that a reader calls refuse arguments of another type, each by its name."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab import (
    chat,
    data,
    information,
    models,
    power_law,
    spectra,
    task,
    text,
    train,
    tuning,
)
from minipeft.values import checked
from tests.operands import annotations_off

ROOMS = (chat, data, models, task, text, train, tuning)
ROOMS += (information, power_law, spectra)  # a reader gives them numbers of their own
# Public functions of these files that are not `checked`, with reasons.
OTHERWISE = {
    "data.sha256": "is given bytes that were read",
    "models.cached": "is given a name that was checked",
    "models.check_name": "is given what the command line read",
    "models.folder_of": "is given what the command line read",
    "models.recompute_blocks": "takes any model",
    "models.transformers_tokenizer": "is given a folder that was found",
    "train.train": "checks its own, and says more",
    "tuning.curves": "is given what `tune` returned",
}


def is_checked(function):
    return inspect.getsource(inspect.unwrap(function)).startswith("@checked\n")


def public():
    """Yield the public functions that take something, by their names."""
    for room in ROOMS:
        for name, member in vars(room).items():
            own = getattr(member, "__module__", None) == room.__name__
            if not own or not inspect.isfunction(member) or name.startswith("_"):
                continue
            if inspect.signature(member).parameters:
                yield f"{room.__name__.rpartition('.')[2]}.{name}", member


PUBLIC = dict(public())
CHECKED = {name: function for name, function in PUBLIC.items() if is_checked(function)}


def fitting(hint):
    """Return a value of the annotated type."""
    hint = getattr(hint, "array_type", hint)
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return fitting(inner[0])
    if kind is Literal:
        return inner[0]
    if kind in (Sequence, Iterable, list):
        return []
    if kind is Mapping or kind is dict:
        return {}
    if kind is tuple:
        return tuple(map(fitting, inner))
    if kind is Callable:
        return print
    made = {
        **{int: 1, float: 1.0, str: "x", bytes: b"x", Path: Path("x")},
        **{torch.Tensor: torch.ones(1, 1), np.ndarray: np.ones(1)},
        **{nn.Module: nn.Linear(1, 1), Any: None, type(None): None},
    }
    return made[kind] if kind in made else object.__new__(kind)


def takes(hint, value):
    """Tell whether the annotation allows this odd value."""
    hint = getattr(hint, "array_type", hint)
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(takes(one, value) for one in inner)
    if kind is Any:
        return True
    return type(value) is (type(None) if kind is None else kind)


def test_what_a_reader_calls_is_checked_or_says_why_not():
    assert PUBLIC.keys() - CHECKED.keys() == OTHERWISE.keys()


@pytest.mark.parametrize("name", sorted(CHECKED))
def test_an_argument_of_another_type_is_refused_by_its_name(name):
    function = CHECKED[name]
    hints = get_type_hints(function)
    hints.pop("return", None)
    good, tried = {key: fitting(hint) for key, hint in hints.items()}, 0
    with annotations_off():
        for key, hint in hints.items():
            odd_ones = (object(), None, "text", True, 1 + 2j, [object()])
            for odd in (odd for odd in odd_ones if not takes(hint, odd)):
                tried += 1
                with pytest.raises(
                    InputError, match=rf"^{key} is .*; give one of type \w.*\.$"
                ):
                    function(**{**good, key: odd})
    assert tried or set(hints.values()) == {Any}


def test_what_fits_is_let_through():
    @checked
    def taking(
        whole: int, real: float, pair: tuple[int, int], texts: Sequence[str] | None
    ) -> object:
        return whole, real, pair, texts

    given = (np.int64(2), np.float32(1.5), [1, 2], ("a", "b"))
    assert taking(*given) == given
    assert taking(1, 2, (1, 2), texts=None) == (1, 2, (1, 2), None)
    for odd, said in {
        (True, 1.0, (1, 2), None): r"whole is True; give one of type int\.",
        (1, "1", (1, 2), None): r"real is '1'; give one of type float\.",
        (
            1,
            1.0,
            (1, 2, 3),
            None,
        ): r"pair is of type tuple; give .* tuple\[int, int\]\.",
        (
            1,
            1.0,
            (1, 2),
            "ab",
        ): r"texts is 'ab'; give .* Sequence\[str\] \| None\.",
        (1, 1.0, (1, 2), (1,)): r"texts is of type tuple; give one of type Sequence",
    }.items():
        with pytest.raises(InputError, match=said):
            taking(*odd)


def test_a_split_with_a_typing_mistake_is_refused():
    """It chose no entry, and an empty list came back."""
    with annotations_off(), pytest.raises(InputError, match=r"^split is 'valid'; give"):
        data.devils_dictionary("valid")
