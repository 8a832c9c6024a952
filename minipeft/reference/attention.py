"""One head of attention, to which prefix tuning adds keys and values."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Bool, Float, check_array, check_shapes
from minipeft.values import check_integer, check_kind

Queries = Float[np.ndarray, "*batch queries d"]
Keys = Float[np.ndarray, "*batch keys d"]
Values = Float[np.ndarray, "*batch keys d_v"]
Mixed = Float[np.ndarray, "*batch queries d_v"]
Shares = Float[np.ndarray, "*batch queries keys"]
Mask = Bool[np.ndarray, "... queries keys"]


@dataclass(frozen=True)
class Head:
    """The inputs of one head: queries, keys, values, and a mask."""

    Q: Queries
    K: Keys
    V: Values
    mask: Mask | None = None  # True: the query may use the key


class AttentionGradients(NamedTuple):
    """Gradients of a loss with respect to queries, keys and values."""

    Q: Queries
    K: Keys
    V: Values


def causal(queries: int, keys: int) -> Mask:
    """Return the mask of a text read from left to right.

    The last query belongs to the last key: query i sees keys 0 … i + keys - queries. If
    there are more keys than queries, the first keys come from a cache or a prefix.

    Raises:
        InputError: if there are fewer keys than queries.
    """
    check_integer("queries", queries, 0)
    check_integer("keys", keys, 0)
    if keys < queries:
        raise InputError(
            f"{queries} queries and {keys} keys; every query needs its key."
        )
    return np.tri(queries, keys, keys - queries, dtype=bool)


def weights(head: Head) -> Shares:
    r"""Return the share of each value for each query: $P = softmax(Q K^T / \sqrt d)$.

    Raises:
        InputError: if the shapes contradict each other, or a mask hides all keys from a
            query.

    Source: Attention is all you need (arXiv:1706.03762), equation 1.
    """
    check_fits(head)
    logits = head.Q @ head.K.swapaxes(-1, -2) / sqrt(head.Q.shape[-1])
    if head.mask is not None:
        logits = np.where(head.mask, logits, -np.inf)
    # A constant added to all logits does not change softmax. With this one, the
    # largest exponent is 0 and nothing overflows.
    E = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return E / E.sum(axis=-1, keepdims=True)


def forward(head: Head) -> Mixed:
    """Return the mixed values: $Y = P V$.

    Raises:
        InputError: if the shapes contradict each other, or a mask hides all keys from a
            query.
    """
    return weights(head) @ head.V


def backward(grad_y: Mixed, head: Head) -> AttentionGradients:
    r"""Return the gradients of Q, K and V.

    With $G = \partial L/\partial Y$, the gradient of V is $P^T G$. The gradient of the
    logits is $S = P \circ (G V^T - \sum_{keys} P \circ G V^T)$; from it follow $S K /
    \sqrt d$ for Q and $S^T Q / \sqrt d$ for K. A hidden key has P = 0 and gets 0.

    Raises:
        InputError: if the shapes contradict each other, or a mask hides all keys from a
            query.
    """
    P = weights(head)
    check_shapes(
        {
            "P": (P, "... queries keys"),
            "grad_y": (grad_y, "... queries d_v"),
            "V": (head.V, "... keys d_v"),
        }
    )
    share = grad_y @ head.V.swapaxes(-1, -2)
    S = P * (share - (P * share).sum(axis=-1, keepdims=True))
    S = S / sqrt(head.Q.shape[-1])
    return AttentionGradients(
        S @ head.K, S.swapaxes(-1, -2) @ head.Q, P.swapaxes(-1, -2) @ grad_y
    )


def check_fits(head: Head) -> None:
    """Refuse parts of different heads, and masks that are not booleans.

    Masks of numbers have two meanings in use: in some, 0 hides a key; others are added
    to the logits, where 0 leaves a key visible.
    """
    check_kind("the head", head, Head)
    check_shapes(
        {
            "Q": (head.Q, "... queries d"),
            "K": (head.K, "... keys d"),
            "V": (head.V, "... keys d_v"),
        }
    )
    keys, mask = head.K.shape[-2], head.mask
    if not keys:
        raise InputError("there are 0 keys; give every query at least one.")
    if mask is not None:
        _check_mask(mask, head.Q.shape[:-1], keys)


def _check_mask(mask: Mask, queries: tuple[int, ...], keys: int) -> None:
    check_array("the mask", mask, "booleans")
    if mask.dtype != bool:
        raise InputError(
            f"the mask has dtype {mask.dtype}; give booleans, True where a query may "
            "look at a key."
        )
    if mask.shape not in ((queries[-1], keys), (*queries, keys)):
        raise InputError(
            f"the mask has shape {mask.shape}; these queries and keys need "
            f"({queries[-1]}, {keys}), or one such mask for each text."
        )
    blind = np.argwhere(~mask.any(axis=-1))
    if blind.size:
        raise InputError(
            f"query {blind[0, -1]} may look at no key; give every row of the mask a "
            "True."
        )
