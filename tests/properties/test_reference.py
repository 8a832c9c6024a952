"""Laws of every public function of the reference."""

import re

import jaxtyping
import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.reference import linear
from tests.operands import (
    CALLED,
    OUT_OF_RANGE,
    ROWS,
    annotations_off,
    arguments,
    arrays,
    odd,
    public_functions,
    reshaped,
    retyped,
    substituted,
    variants,
)

functions = pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(row, name, id=f"{row.__name__.split('.')[-1]}.{name}")
        for row in ROWS
        for name in public_functions(row)
    ],
)


def call(row, name, given):
    """Call a function; if it is a generator, run it to its end."""
    return list(arrays(getattr(row, name)(**given)))


@functions
def test_nothing_given_is_changed_or_returned(row, name):
    for given in variants(row, name):
        before = [array.copy() for array in arrays(given)]
        returned = call(row, name, given)
        for array, copy in zip(arrays(given), before, strict=True):
            assert array.tobytes() == copy.tobytes()
            for result in returned:
                # Two page tables share pages, which are read-only.
                frozen = not (result.flags["W"] or array.flags["W"])
                assert frozen or not np.shares_memory(result, array)


@functions
def test_operands_that_do_not_fit_are_refused(row, name):
    given = arguments(row, name)
    with annotations_off():
        for path, wrong in reshaped(row, name):
            with pytest.raises(InputError):
                call(row, name, substituted(given, path, wrong))


@functions
def test_numbers_of_another_kind_are_refused(row, name):
    given = arguments(row, name)
    with annotations_off():
        for path, wrong in retyped(row, name):
            with pytest.raises(InputError, match="dtype"):
                call(row, name, substituted(given, path, wrong))


@functions
def test_numbers_out_of_range_are_refused(row, name):
    given = arguments(row, name)
    with annotations_off():
        for parameter in sorted(given.keys() & OUT_OF_RANGE.keys()):
            for value in OUT_OF_RANGE[parameter]:
                said = getattr(value, "__name__", str(value))  # names the value
                with pytest.raises(InputError, match=re.escape(said)):
                    call(row, name, {**given, parameter: value})


@functions
def test_what_an_operand_may_not_be_is_refused_by_name(row, name):
    given = arguments(row, name)
    with annotations_off(), np.errstate(all="raise"):
        for path, wrong in odd(row, name):
            with pytest.raises(InputError, match=rf"^[^\n]*\b({called(path)})\b.*\.$"):
                call(row, name, substituted(given, path, wrong))


def called(path):
    return CALLED.get(path, CALLED.get(path[-1], path[-1]))


def test_what_is_no_array_is_refused_by_name(monkeypatch):
    # The tests' own checks of annotations would refuse first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for wrong in ([[1.0, 2.0]], "ab", 1.0):
        with pytest.raises(InputError, match=r"^x is of type \w+; give an array"):
            linear.forward(wrong, np.ones((3, 2)))
