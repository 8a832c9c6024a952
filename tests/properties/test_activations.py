"""The contract of every activation, in both columns: an activation cannot be merged."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from minipeft.reference import attention, bottleneck, prefix, prompt
from minipeft.torch import attention as torch_attention
from minipeft.torch import bottleneck as torch_bottleneck
from minipeft.torch import prefix as torch_prefix
from minipeft.torch import prompt as torch_prompt
from tests.bounds import bound, counted
from tests.properties.test_attention import assert_slopes, rounding
from tests.strategies import seeds
from tests.tolerance import assert_within, gamma


@dataclass(frozen=True)
class Activation:
    """One row: a function of arrays in both columns, and its gradients.

    off: the bound for the difference of two results, given the dtype and the arrays.
    """

    name: str
    shapes: Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]]
    forward: Callable[..., np.ndarray]
    backward: Callable[..., tuple]
    torch: Callable[..., torch.Tensor]
    off: Callable[..., np.ndarray]

    def values(self, seed, lead, dtype):
        rng = np.random.default_rng(seed)
        return [rng.standard_normal(s).astype(dtype) for s in self.shapes(lead)]


MASK = attention.causal(3, 5)
TORCH_MASK = torch.from_numpy(MASK)
NAMES = ("down", "down_bias", "up", "up_bias")
EMPTY = torch_bottleneck.init(None, 5, 3, 0.5)


def head(Q, K, V):
    return attention.Head(Q, K, V, MASK)


def torch_head(Q, K, V):
    return torch_attention.Head(Q, K, V, TORCH_MASK)


def off_head(dtype, Q, K, V, P_K=None, P_V=None):
    h = head(Q, K, V)
    if P_K is not None:
        h = prefix.attach(h, prefix.Prefix(P_K, P_V))
    # Each result is a sum with one product for each key.
    shares = rounding(h, dtype) + 2 * gamma(h.K.shape[-2], dtype)
    return shares * (attention.weights(h) @ abs(h.V))


def prefix_backward(G, Q, K, V, *parts):
    grads = prefix.backward(G, head(Q, K, V), prefix.Prefix(*parts))
    return (*grads[:3], grads.prefix.K, grads.prefix.V)


def adapter(down, down_bias, up, up_bias):
    # Inputs far from the corner of ReLU; half of the units are active for every x.
    far = down_bias + 40 * np.sign(down_bias).astype(down_bias.dtype)
    return bottleneck.Bottleneck(down, far, up, up_bias, 0.5)


def torch_adapter(x, down, down_bias, up, up_bias):
    far = down_bias + 40 * down_bias.detach().sign()
    parts = dict(zip(NAMES, (down, far, up, up_bias), strict=True))
    return functional_call(EMPTY, parts, (x,))


ROWS = (
    Activation(
        "attention",
        lambda lead: ((*lead, 3, 4), (*lead, 5, 4), (*lead, 5, 2)),
        lambda Q, K, V: attention.forward(head(Q, K, V)),
        lambda G, Q, K, V: attention.backward(G, head(Q, K, V)),
        lambda Q, K, V: torch_attention.forward(torch_head(Q, K, V)),
        off_head,
    ),
    Activation(
        "prefix",
        lambda lead: ((*lead, 3, 4), (*lead, 5, 4), (*lead, 5, 2), (2, 4), (2, 2)),
        lambda Q, K, V, *p: prefix.forward(head(Q, K, V), prefix.Prefix(*p)),
        prefix_backward,
        lambda Q, K, V, *p: torch_prefix.forward(
            torch_head(Q, K, V), torch_prefix.Prefix(*p)
        ),
        off_head,
    ),
    Activation(
        "prompt",
        lambda lead: ((*lead, 4, 3), (2, 3)),
        lambda X, P: prompt.forward(X, prompt.Prompt(P)),
        lambda G, X, P: prompt.backward(G, prompt.Prompt(P)),
        lambda X, P: torch_prompt.forward(X, torch_prompt.Prompt(P)),
        lambda dtype, X, P: 0 * prompt.forward(X, prompt.Prompt(P)),
    ),
    Activation(
        "bottleneck",
        lambda lead: ((*lead, 5), (3, 5), (3,), (5, 3), (5,)),
        lambda x, *parts: bottleneck.forward(x, adapter(*parts)),
        lambda G, x, *parts: bottleneck.backward(G, x, adapter(*parts)),
        torch_adapter,
        lambda dtype, x, *parts: 2 * bound(_counted_adapter(x, *parts), dtype),
    ),
)
each = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
leads = st.sampled_from([(), (2,), (2, 3)])


def _counted_adapter(x, *parts):
    a = adapter(*parts)
    sizes = (counted(getattr(a, name)) for name in NAMES)
    return bottleneck.forward(counted(x), bottleneck.Bottleneck(*sizes, a.scaling))


@each
@given(seed=seeds, lead=leads)
def test_outputs_agree_up_to_rounding(row, seed, lead):
    values = row.values(seed, lead, np.float32)
    y = row.torch(*map(torch.from_numpy, values)).detach().numpy()
    assert_within(y, row.forward(*values), row.off("float32", *values))


@each
@given(seed=seeds, lead=leads)
def test_gradients_are_the_slopes_of_the_reference(row, seed, lead):
    values = row.values(seed, lead, np.float64)
    y = row.forward(*values)
    G = np.random.default_rng(seed).standard_normal(y.shape)
    leaves = [torch.from_numpy(v.copy()).requires_grad_() for v in values]
    row.torch(*leaves).backward(torch.from_numpy(G))

    def loss(*moved):
        return float((G * row.forward(*moved)).sum())

    # The error of the outputs, and the error of the sum over them. Doubled, because the
    # step makes the operands a little larger.
    off = (abs(G) * row.off("float64", *values)).sum()
    noise = 2 * float(off + gamma(G.size, "float64") * (abs(G) * abs(y)).sum())
    assert_slopes(loss, values, row.backward(G, *values), noise, seed)
    assert_slopes(loss, values, [leaf.grad.numpy() for leaf in leaves], noise, seed)
