"""One head of attention: what a prefix attaches to."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minipeft.errors import InputError
from minipeft.shapes import Inexact, Shaped


@dataclass(frozen=True)
class Head:
    """What one head works on: queries, keys, values, and who may look at whom."""

    Q: Inexact[Tensor, "*batch queries d"]
    K: Inexact[Tensor, "*batch keys d"]
    V: Inexact[Tensor, "*batch keys d_v"]
    mask: Shaped[Tensor, "queries keys"] | None = None  # True: may look


def causal(queries: int, keys: int) -> Shaped[Tensor, "queries keys"]:
    """Return the mask of a text that is read forwards.

    The last query stands at the last key: query i sees keys 0 … i + keys - queries.
    Keys beyond the queries come before the text, such as a cache or a prefix.
    """
    if keys < queries:
        raise InputError(
            f"{queries} queries and {keys} keys; every query needs its key."
        )
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def weights(head: Head) -> Inexact[Tensor, "*batch queries keys"]:
    r"""Return how much each query takes of each value: $P = softmax(Q K^T / \sqrt d)$.

    Raises:
        InputError: if a query may look at no key.

    Source: Attention is all you need (arXiv:1706.03762), equation 1.
    """
    logits = head.Q @ head.K.transpose(-1, -2) / sqrt(head.Q.shape[-1])
    if head.mask is not None:
        _check_mask(head.mask)
        logits = logits.masked_fill(~head.mask, -torch.inf)
    return logits.softmax(dim=-1)


def forward(head: Head) -> Inexact[Tensor, "*batch queries d_v"]:
    """Mix the values: $Y = P V$; fused, so the weights are never stored."""
    if head.mask is not None:
        _check_mask(head.mask)
    return scaled_dot_product_attention(head.Q, head.K, head.V, head.mask)


def _check_mask(mask: Shaped[Tensor, "queries keys"]) -> None:
    blind = torch.nonzero(~mask.any(dim=-1))
    if len(blind):
        raise InputError(
            f"query {int(blind[0])} may look at no key; give every row of the mask a "
            "True."
        )
