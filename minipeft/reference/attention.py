"""One head of attention: what a prefix attaches to."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Bool, Float, check_shapes

Queries = Float[np.ndarray, "*batch queries d"]
Keys = Float[np.ndarray, "*batch keys d"]
Values = Float[np.ndarray, "*batch keys d_v"]
Mixed = Float[np.ndarray, "*batch queries d_v"]
Shares = Float[np.ndarray, "*batch queries keys"]
Mask = Bool[np.ndarray, "... queries keys"]


@dataclass(frozen=True)
class Head:
    """What one head works on: queries, keys, values, and who may look at whom."""

    Q: Queries
    K: Keys
    V: Values
    mask: Mask | None = None  # True: may look


class AttentionGradients(NamedTuple):
    """Gradients of a loss with respect to queries, keys and values."""

    Q: Queries
    K: Keys
    V: Values


def causal(queries: int, keys: int) -> Mask:
    """Return the mask of a text that is read forwards.

    The last query stands at the last key: query i sees keys 0 … i + keys - queries.
    Keys beyond the queries come before the text, such as a cache or a prefix.

    Raises:
        InputError: if there are fewer keys than queries.
    """
    if keys < queries:
        raise InputError(
            f"{queries} queries and {keys} keys; every query needs its key."
        )
    return np.tri(queries, keys, keys - queries, dtype=bool)


def weights(head: Head) -> Shares:
    r"""Return how much each query takes of each value: $P = softmax(Q K^T / \sqrt d)$.

    Raises:
        InputError: if the parts do not fit each other, or a query may look at no key.

    Source: Attention is all you need (arXiv:1706.03762), equation 1.
    """
    check_fits(head)
    logits = head.Q @ head.K.swapaxes(-1, -2) / sqrt(head.Q.shape[-1])
    if head.mask is not None:
        logits = np.where(head.mask, logits, -np.inf)
    # Softmax does not notice a shift, and the largest exponent becomes 0.
    E = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return E / E.sum(axis=-1, keepdims=True)


def forward(head: Head) -> Mixed:
    """Mix the values: $Y = P V$.

    Raises:
        InputError: if the parts do not fit each other, or a query may look at no key.
    """
    return weights(head) @ head.V


def backward(grad_y: Mixed, head: Head) -> AttentionGradients:
    r"""Return the gradients of Q, K and V.

    With $G = \partial L/\partial Y$ the values get $P^T G$. Through the softmax goes
    $S = P \circ (G V^T - \sum_{keys} P \circ G V^T)$, and from it $S K / \sqrt d$ to
    the queries and $S^T Q / \sqrt d$ to the keys. A masked key has P = 0 and gets 0.

    Raises:
        InputError: if the parts do not fit each other, or a query may look at no key.
    """
    check_fits(head, grad_y)
    P = weights(head)
    share = grad_y @ head.V.swapaxes(-1, -2)
    S = P * (share - (P * share).sum(axis=-1, keepdims=True))
    S = S / sqrt(head.Q.shape[-1])
    return AttentionGradients(
        S @ head.K, S.swapaxes(-1, -2) @ head.Q, P.swapaxes(-1, -2) @ grad_y
    )


def check_fits(head: Head, grad_y: Mixed | None = None) -> None:
    """Refuse parts of different heads, and masks that are not booleans.

    A mask of numbers is ambiguous: 0 hides a key in some, and shows it in others that
    are added to the logits.
    """
    check_shapes(
        {
            "Q": (head.Q, "... queries d"),
            "K": (head.K, "... keys d"),
            "V": (head.V, "... keys d_v"),
            "grad_y": (grad_y, "... queries d_v"),
        }
    )
    queries, keys, mask = head.Q.shape[-2], head.K.shape[-2], head.mask
    if not keys:
        raise InputError("there are 0 keys; give every query at least one.")
    if mask is None:
        return
    if mask.dtype != bool:
        raise InputError(
            f"the mask has dtype {mask.dtype}; give booleans, True where a query may "
            "look at a key."
        )
    if mask.shape not in ((queries, keys), (*head.Q.shape[:-1], keys)):
        raise InputError(
            f"the mask has shape {mask.shape}; these queries and keys need "
            f"({queries}, {keys}), or one such mask for each text."
        )
    blind = np.argwhere(~mask.any(axis=-1))
    if blind.size:
        raise InputError(
            f"query {blind[0, -1]} may look at no key; give every row of the mask a "
            "True."
        )
