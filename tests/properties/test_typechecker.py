"""The checks that the tests put behind every annotation find every mistake."""

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NewType, TypedDict, TypeVar

import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

from tests import typechecker
from tests.typechecker import REMEMBERED, check, likeness, once

W, x = np.ones((2, 3), np.float32), np.ones(3, np.float32)
Matrix = Float[np.ndarray, "rows columns"]


def product(W: Matrix, x: Float[np.ndarray, " columns"], side: Literal["left"]):
    return W @ x


class Turning:
    def turned(self, W: Matrix, how: str = "T") -> "Float[np.ndarray, 'columns rows']":
        return {"T": W.T, "not": W, "list": W.T.tolist()}[how]

    def rows(self, W: Matrix) -> Iterator[Float[np.ndarray, " columns"]]:
        return iter(W)


product, turned, rows = (
    once(f, check) for f in (product, Turning.turned, Turning.rows)
)


@pytest.mark.parametrize(
    "operands",
    [
        (W, x[:2], "left"),
        (W[0], x, "left"),
        (W.astype(np.int32), x, "left"),
        (W.tolist(), x, "left"),
        (W, x, "right"),
        (W, None, "left"),
        (W, x, None),
    ],
)
def test_a_call_that_is_unlike_one_that_passed_is_refused(operands):
    for _ in range(2):
        product(W, x, "left")
        with pytest.raises(TypeCheckError, match="parameters"):
            product(*operands)


def test_a_wrong_result_is_refused_after_a_right_one_of_the_same_call():
    class Changing(Turning):
        how = "T"

        def turned(self, W: Matrix) -> Float[np.ndarray, "columns rows"]:
            return super().turned(W, self.how)

    it, call = Changing(), once(Changing.turned, check)
    for how in ("not", "list"):
        for _ in range(2):
            it.how = "T"
            assert np.array_equal(call(it, W), W.T)
            it.how = how
            with pytest.raises(TypeCheckError, match="return value"):
                call(it, W)


def test_annotations_that_are_strings_are_looked_up_where_they_stand():
    for _ in range(2):
        turned(Turning(), W)
        with pytest.raises(TypeCheckError, match="return value"):
            turned(Turning(), W, "not")
    with pytest.raises(TypeCheckError, match="parameters"):
        turned(Turning(), x)
    assert len(list(rows(Turning(), W))) == 2


def test_a_call_like_one_that_passed_is_not_checked_again(monkeypatch):
    asked = []

    def asking(function):
        def asked_before(*args, **kwargs):
            asked.append(args)

        return asked_before

    def doubled(W: Matrix, s: float): ...

    call = once(doubled, asking)
    for operands in ((W, 1.0), (2 * W, 2.0), (W.T, 1.0), (W, 1), (W, 2)):
        call(*operands)
    assert [(args[0].shape, type(args[1])) for args in asked] == [
        ((2, 3), float),
        ((3, 2), float),
        ((2, 3), int),
    ]
    for n in range(REMEMBERED + 1):
        call(np.ones((1, n)), 1.0)
    call(W, 1.0)
    assert len(asked) == 3 + REMEMBERED + 1 + 1  # the oldest calls were forgotten
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    call(x, None)
    assert len(asked) == 3 + REMEMBERED + 1 + 1


Ways = Literal["left", "right"]
Way = TypeVar("Way", bound=Ways)


class Named(TypedDict):
    name: str


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (str, False),
        (bool | None, False),
        (dict[str, Callable[[str], int]], False),
        (Float[np.ndarray, "rows columns"], False),
        (Ways, True),
        (list[Ways], True),
        (Callable[[Ways], None], True),
        (Way, True),
        (NewType("Side", Ways), True),
        (Literal[True], True),
        (Annotated[str, 3], True),
        (Named, True),
        ("Ways", True),
        ("list[unknown]", True),  # for who cannot know, it may be
    ],
)
def test_whether_an_annotation_tells_texts_apart(annotation, expected):
    def function(x): ...

    function.__annotations__["x"] = annotation
    assert typechecker.has_literals(function) == expected


def test_texts_are_alike_where_no_annotation_tells_them_apart():
    asked = []

    def asking(function):
        return lambda *args: asked.append(args)

    def named(name: str, last: bool): ...

    def sided(name: str, side: Ways): ...

    for function in (named, sided):
        call = once(function, asking)
        for operands in (("a", True), ("b", False), ("c", "left"), ("d", "left")):
            call(*operands)
    assert asked == [("a", True), ("c", "left"), *asked[2:]]
    assert len(asked) == 2 + 4


def test_a_call_like_one_that_was_refused_is_refused_with_the_same_words():
    runs = []

    def rows(W: Matrix, n: int) -> Matrix:
        runs.append(W)
        return W.tolist()

    call = once(rows, check)
    for _ in range(3):
        with pytest.raises(TypeCheckError, match=r"parameters of .*rows") as first:
            call(x, 1)
        with pytest.raises(TypeCheckError) as second:
            call(2 * x, 2)
        assert str(first.value) == str(second.value)
    assert not runs
    for count in (1, 2):  # refused by its result
        with pytest.raises(TypeCheckError, match="return value"):
            call(W, 1)
        assert len(runs) == count


@pytest.mark.parametrize("how", [once, jaxtyping.jaxtyped])
def test_a_call_that_is_refused_by_another_inside_is_made_each_time(how):
    runs = []

    @functools.partial(how, typechecker=check)
    def inner(side: Ways): ...

    @functools.partial(once, typechecker=check)
    def outer(side: str):
        runs.append(side)
        inner(side)

    with pytest.raises(TypeCheckError):
        inner("wrong")
    for _ in range(2):
        with pytest.raises(TypeCheckError, match=r"parameters of .*inner"):
            outer("wrong")
        outer("left")
    assert runs == ["wrong", "left"] * 2


def test_what_is_in_a_container_counts():
    for container in (tuple, list):
        assert likeness(container([W, x])) == likeness(container([0 * W, x + 1]))
        assert likeness(container([W, x])) != likeness(container([W, W]))
    assert likeness((W,)) != likeness([W])
    assert likeness({"W": W}) == likeness({"W": 0 * W})
    assert likeness({"W": W}) != likeness({"W": x}) != likeness({"x": x})
    assert likeness([[[[1]]]]) == likeness([[[[2]]]])
    deep = [[[[[1]]]]]
    for value in ({W.size}, iter(W), [1] * (typechecker.LONGEST + 1), deep):
        with pytest.raises(typechecker.UnlikeError):
            likeness(value)


def test_every_function_of_the_package_is_checked_this_way():
    from minipeft.reference import lora

    assert lora.forward.__code__.co_filename == typechecker.__file__
    with pytest.raises(TypeCheckError):
        lora.delta(W)


def test_functions_of_one_def_share_their_checks_and_run_their_own_code():
    made = []

    def asking(function):
        made.append(function)
        return check(function)

    def adding(n, annotation=int):
        def add(x: annotation) -> annotation:
            return add(x - 1) + n if x == 3 else x + n

        return once(add, asking)

    one, two = adding(1), adding(2)
    assert (one(1), two(1), one(3), two(3), two(True)) == (2, 3, 4, 6, 3)
    assert len(made) == 2  # the parameters, and with the result
    for call in (one, two):
        with pytest.raises(TypeCheckError, match=r"parameters of .*add"):
            call("1")
    assert not typechecker.checker_of(one.__wrapped__, asking).running.next
    assert (one(1), two(1)) == (2, 3)
    assert adding("!", str)("1") == "1!"  # of other annotations
    with pytest.raises(TypeCheckError, match=r"parameters of .*add"):
        adding("!", str)(1)
