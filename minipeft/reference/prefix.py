"""Prefix tuning: trained keys and values before the keys and values of the text."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import attention, linear
from minipeft.reference.attention import Head, Keys, Mixed, Queries, Values
from minipeft.shapes import Float, Shaped, check_shapes
from minipeft.values import check_integer, check_kind


@dataclass(frozen=True)
class Prefix:
    """The virtual tokens of one head: their keys and values."""

    K: Shaped[np.ndarray, "num_virtual_tokens d"]
    V: Shaped[np.ndarray, "num_virtual_tokens d_v"]


@dataclass(frozen=True)
class Reparametrization:
    """A network whose output is the prefix; training it is more stable."""

    P: Shaped[np.ndarray, "num_virtual_tokens width"]
    W_down: Shaped[np.ndarray, "hidden width"]
    b_down: Shaped[np.ndarray, " hidden"]
    W_up: Shaped[np.ndarray, "both hidden"]  # keys, then values
    b_up: Shaped[np.ndarray, " both"]


class PrefixGradients(NamedTuple):
    """Gradients with respect to the head's queries, keys, values, and to the prefix."""

    Q: Queries
    K: Keys
    V: Values
    prefix: Prefix


def init(rng: np.random.Generator, num_virtual_tokens: int, d: int) -> Prefix:
    """Start from N(0, 1). The keys and values of real tokens are a better start.

    Raises:
        InputError: if there is no virtual token.
    """
    check_kind("rng", rng, np.random.Generator)
    check_integer("num_virtual_tokens", num_virtual_tokens, 1)
    check_integer("d", d, 1)
    K, V = rng.standard_normal((2, num_virtual_tokens, d)).astype(np.float32)
    return Prefix(K, V)


def init_reparametrized(
    rng: np.random.Generator, num_virtual_tokens: int, d: int, hidden: int
) -> Reparametrization:
    r"""Start the network: $P \sim N(0, 1)$, weights $U(\pm 1/\sqrt{fan\_in})$, bias 0.

    Source: Prefix-tuning (arXiv:2101.00190), section 4.3.
    """
    check_kind("rng", rng, np.random.Generator)
    check_integer("num_virtual_tokens", num_virtual_tokens, 1)
    check_integer("d", d, 1)
    check_integer("hidden", hidden, 1)
    P = rng.standard_normal((num_virtual_tokens, d)).astype(np.float32)
    bound = d**-0.5
    W_down = rng.uniform(-bound, bound, (hidden, d)).astype(np.float32)
    bound = hidden**-0.5
    W_up = rng.uniform(-bound, bound, (2 * d, hidden)).astype(np.float32)
    b_down, b_up = np.zeros(hidden, np.float32), np.zeros(2 * d, np.float32)
    return Reparametrization(P, W_down, b_down, W_up, b_up)


def expand(network: Reparametrization) -> Prefix:
    r"""Run the network: $[K, V] = \tanh(P W_\downarrow^T + b) W_\uparrow^T + b$.

    After training, the last output becomes the prefix and the network is deleted.

    Raises:
        InputError: if the parts do not fit each other.
    """
    _check_network(network)
    hidden = np.tanh(linear.forward(network.P, network.W_down, network.b_down))
    K, V = np.split(linear.forward(hidden, network.W_up, network.b_up), 2, axis=-1)
    return Prefix(K, V)


def expand_backward(grad: Prefix, network: Reparametrization) -> Reparametrization:
    """Return the gradients of P, weights and biases from those of the prefix.

    Raises:
        InputError: if the shapes of the parts or of the prefix contradict each other.
    """
    _check_network(network)
    check_kind("grad", grad, Prefix)
    check_shapes(
        {
            "half of b_up": (network.b_up[::2], "d"),
            "P": (network.P, "num_virtual_tokens width"),
            "the gradient of K": (grad.K, "num_virtual_tokens d"),
            "the gradient of V": (grad.V, "num_virtual_tokens d"),
        }
    )
    hidden = np.tanh(linear.forward(network.P, network.W_down, network.b_down))
    up = linear.backward(np.concatenate([grad.K, grad.V], -1), hidden, network.W_up)
    down = linear.backward(up.x * (1 - hidden**2), network.P, network.W_down)
    return Reparametrization(down.x, down.W, down.bias, up.W, up.bias)


def attach(head: Head, prefix: Prefix) -> Head:
    """Put the virtual tokens before the text: $[P_K; K]$, $[P_V; V]$, all visible.

    Raises:
        InputError: if the prefix is not one of this head.
    """
    attention.check_fits(head)
    check_kind("the prefix", prefix, Prefix)
    check_shapes(
        {
            "K": (head.K, "... keys d"),
            "V": (head.V, "... keys d_v"),
            "P_K": (prefix.K, "num_virtual_tokens d"),
            "P_V": (prefix.V, "num_virtual_tokens d_v"),
        }
    )
    batch, n = head.K.shape[:-2], len(prefix.K)
    K, V = (np.broadcast_to(p, (*batch, *p.shape)) for p in (prefix.K, prefix.V))
    mask = head.mask
    if mask is not None:
        mask = np.concatenate([np.ones((*mask.shape[:-1], n), bool), mask], axis=-1)
    return Head(
        head.Q.copy(),
        np.concatenate([K, head.K], axis=-2),
        np.concatenate([V, head.V], axis=-2),
        mask,
    )


def forward(head: Head, prefix: Prefix) -> Mixed:
    """Attend to the virtual tokens and the text together.

    Source: Prefix-tuning (arXiv:2101.00190), section 4.2.
    """
    return attention.forward(attach(head, prefix))


def backward(grad_y: Mixed, head: Head, prefix: Prefix) -> PrefixGradients:
    """Return the gradients; that of the shared prefix is a sum over the batch.

    Raises:
        InputError: if the prefix or the gradient is not one of this head.
    """
    grads, n = attention.backward(grad_y, attach(head, prefix)), len(prefix.K)
    K = grads.K[..., :n, :].reshape(-1, *prefix.K.shape).sum(axis=0)
    V = grads.V[..., :n, :].reshape(-1, *prefix.V.shape).sum(axis=0)
    text_K, text_V = grads.K[..., n:, :], grads.V[..., n:, :]
    return PrefixGradients(grads.Q, text_K, text_V, Prefix(K, V))


def gate(head: Head, prefix: Prefix) -> Float[np.ndarray, "*batch queries"]:
    r"""Return $\lambda$, the share of its attention that a query gives to the prefix.

    $Y = (1 - \lambda) \, attend(Q, K, V) + \lambda \, attend(Q, P_K, P_V)$, where
    $\lambda$ depends on the query. A fixed weight cannot depend on the query, so a
    prefix cannot be merged.

    Source: Towards a unified view (arXiv:2110.04366), section 3.1.
    """
    return attention.weights(attach(head, prefix))[..., : len(prefix.K)].sum(axis=-1)


def _check_network(network: Reparametrization) -> None:
    """Refuse parts of different networks, and an output that does not split in two."""
    check_kind("the network", network, Reparametrization)
    check_shapes(
        {
            "P": (network.P, "num_virtual_tokens width"),
            "W_down": (network.W_down, "hidden width"),
            "b_down": (network.b_down, "hidden"),
            "W_up": (network.W_up, "both hidden"),
            "b_up": (network.b_up, "both"),
        }
    )
    if len(network.W_up) % 2:
        raise InputError(
            f"W_up has {len(network.W_up)} rows; give as many for keys as for values."
        )
