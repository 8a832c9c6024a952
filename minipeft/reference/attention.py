"""One head of attention: what a prefix attaches to."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Inexact, Shaped


@dataclass(frozen=True)
class Head:
    """What one head works on: queries, keys, values, and who may look at whom."""

    Q: Inexact[np.ndarray, "*batch queries d"]
    K: Inexact[np.ndarray, "*batch keys d"]
    V: Inexact[np.ndarray, "*batch keys d_v"]
    mask: Shaped[np.ndarray, "queries keys"] | None = None  # True: may look


class AttentionGradients(NamedTuple):
    """Gradients of a loss with respect to queries, keys and values."""

    Q: Inexact[np.ndarray, "*batch queries d"]
    K: Inexact[np.ndarray, "*batch keys d"]
    V: Inexact[np.ndarray, "*batch keys d_v"]


def causal(queries: int, keys: int) -> Shaped[np.ndarray, "queries keys"]:
    """Return the mask of a text that is read forwards.

    The last query stands at the last key: query i sees keys 0 … i + keys - queries.
    Keys beyond the queries come before the text, such as a cache or a prefix.
    """
    if keys < queries:
        raise InputError(
            f"{queries} queries and {keys} keys; every query needs its key."
        )
    return np.tri(queries, keys, keys - queries, dtype=bool)


def weights(head: Head) -> Inexact[np.ndarray, "*batch queries keys"]:
    r"""Return how much each query takes of each value: $P = softmax(Q K^T / \sqrt d)$.

    Raises:
        InputError: if a query may look at no key.

    Source: Attention is all you need (arXiv:1706.03762), equation 1.
    """
    logits = head.Q @ head.K.swapaxes(-1, -2) / sqrt(head.Q.shape[-1])
    if head.mask is not None:
        _check_mask(head.mask)
        logits = np.where(head.mask, logits, -np.inf)
    # Softmax does not notice a shift, and the largest exponent becomes 0.
    E = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return E / E.sum(axis=-1, keepdims=True)


def forward(head: Head) -> Inexact[np.ndarray, "*batch queries d_v"]:
    """Mix the values: $Y = P V$."""
    return weights(head) @ head.V


def backward(
    grad_y: Inexact[np.ndarray, "*batch queries d_v"], head: Head
) -> AttentionGradients:
    r"""Return the gradients of Q, K and V.

    With $G = \partial L/\partial Y$ the values get $P^T G$. Through the softmax goes
    $S = P \circ (G V^T - \sum_{keys} P \circ G V^T)$, and from it $S K / \sqrt d$ to
    the queries and $S^T Q / \sqrt d$ to the keys. A masked key has P = 0 and gets 0.
    """
    P = weights(head)
    share = grad_y @ head.V.swapaxes(-1, -2)
    S = P * (share - (P * share).sum(axis=-1, keepdims=True))
    S = S / sqrt(head.Q.shape[-1])
    return AttentionGradients(
        S @ head.K, S.swapaxes(-1, -2) @ head.Q, P.swapaxes(-1, -2) @ grad_y
    )


def _check_mask(mask: Shaped[np.ndarray, "queries keys"]) -> None:
    blind = np.flatnonzero(~mask.any(axis=-1))
    if blind.size:
        raise InputError(
            f"query {blind[0]} may look at no key; give every row of the mask a True."
        )
