"""Cases of prefix_forward and prefix_expand."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Spec, gaussian, integers
from minipeft.golden.cases.attention import double_head, roundings
from minipeft.golden.cases.build import given, misfits, whole
from minipeft.reference import attention, prefix
from minipeft.reference.prefix import Prefix

PAPERS = ("https://arxiv.org/abs/2101.00190",)


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    yield File(
        operation="prefix_forward",
        header=(
            "Attention to [P_K; K] and [P_V; V]; a mask is that of the text alone.",
        ),
        source="minipeft.reference.prefix.forward",
        papers=PAPERS,
        specs=[*_exact(), *_normal(), *_misfits(), _masks()],
    )
    yield File(
        operation="prefix_expand",
        header=(
            "[K, V] = tanh(P W_down^T + b_down) W_up^T + b_up, split in the middle.",
        ),
        source="minipeft.reference.prefix.expand",
        papers=PAPERS,
        specs=[
            *(networks := list(_networks())),
            *misfits(
                "prefix_expand", replace(networks[0], roundings={}, magnitudes=None), ()
            ),
            _network("virtual tokens as wide as keys", (5, 4, 7, 4)),
        ],
    )


def _exact() -> Iterator[Spec]:
    K, V = (integers(f"equal {n}", (3, 2)) for n in "KV")
    P_K, P_V = (integers(f"equal P_{n}", (5, 2)) for n in "KV")
    Q = np.zeros((2, 2), np.float32)
    inputs = {"Q": Q, "K": K, "V": V, "P_K": P_K, "P_V": P_V}
    yield Spec("5 virtual tokens, 3 of text", ("EqualShares",), inputs, {})


def _normal() -> Iterator[Spec]:
    for comment, flag, batch, count, masked in [
        ("no mask", "Basic", (), 2, False),
        ("causal", "Causal", (), 3, True),
        ("one virtual token", "Causal", (), 1, True),
        ("a batch of two", "Batch", (2,), 2, True),
    ]:
        inputs = {n: gaussian(f"{comment} {n}", (*batch, 4, 3)) for n in "QKV"}
        for name in "KV":
            inputs[f"P_{name}"] = gaussian(f"{comment} P_{name}", (count, 3))
        if masked:
            inputs["mask"] = attention.causal(4, 4).astype(np.uint8)
        yield _bounded(Spec(comment, (flag,), inputs, {}))


def _bounded(spec: Spec) -> Spec:
    P = Prefix(*(spec.inputs[n].astype(np.float64) for n in ("P_K", "P_V")))
    head = prefix.attach(double_head(spec.inputs), P)
    size = attention.weights(head) @ np.abs(head.V)
    return replace(spec, roundings={"y": roundings(head)}, magnitudes={"y": size})


def _masks() -> Spec:
    inputs = {n: gaussian(f"two masks {n}", (2, 4, 3)) for n in "QKV"}
    inputs |= {f"P_{n}": gaussian(f"two masks P_{n}", (2, 3)) for n in "KV"}
    causal = np.tri(4)
    inputs["mask"] = np.stack([causal, causal[::-1, ::-1]]).astype(np.uint8)
    return _bounded(Spec("one mask for each text", ("Batch",), inputs, {}))


def _misfits() -> Iterator[Spec]:
    shapes = {"Q": (3, 2), "K": (4, 2), "V": (4, 5), "P_K": (2, 2), "P_V": (2, 5)}
    fine = whole("prefix_forward", "fits", "ShapeMismatch", shapes, {})
    fine = given(fine, mask=np.ones((3, 4), np.uint8))
    wrong = misfits("prefix_forward", fine, ())
    yield from (s for s in wrong if not s.comment.startswith("mask has one"))


def _networks() -> Iterator[Spec]:
    yield _network("two virtual tokens", (2, 4, 6, 3))
    yield _network("one virtual token", (1, 3, 5, 2))


def _network(comment: str, lengths: tuple[int, int, int, int]) -> Spec:
    count, width, hidden, d = lengths
    shapes = {
        "P": (count, width),
        "W_down": (hidden, width),
        "b_down": (hidden,),
        "W_up": (2 * d, hidden),
        "b_up": (2 * d,),
    }
    inputs = {n: gaussian(f"{comment} {n}", shape) for n, shape in shapes.items()}
    sizes = {n: np.abs(array.astype(np.float64)) for n, array in inputs.items()}
    # The slope of tanh is at most 1, and so is its value.
    inner = 1 + sizes["P"] @ sizes["W_down"].T + sizes["b_down"]
    both = inner @ sizes["W_up"].T + sizes["b_up"]
    K, V = np.split(both, 2, axis=-1)
    n = width + hidden + 8
    return Spec(
        comment=comment,
        flags=("Network",),
        inputs=inputs,
        parameters={},
        roundings={"K": n, "V": n},
        magnitudes={"K": K, "V": V},
    )
