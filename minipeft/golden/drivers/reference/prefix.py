"""Prefix tuning in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import prefix
from minipeft.reference.attention import Head
from minipeft.reference.prefix import Prefix, Reparametrization


def prefix_forward(
    Q: Array, K: Array, V: Array, P_K: Array, P_V: Array, mask: Array | None = None
) -> Array:
    """Return what the head makes of prefix and text; the mask is the text's."""
    head = Head(Q, K, V, None if mask is None else mask.astype(bool))
    return prefix.forward(head, Prefix(P_K, P_V))


def prefix_expand(
    P: Array, W_down: Array, b_down: Array, W_up: Array, b_up: Array
) -> tuple[Array, Array]:
    """Return the keys and values that the network stands for."""
    expanded = prefix.expand(Reparametrization(P, W_down, b_down, W_up, b_up))
    return expanded.K, expanded.V
