"""torch's own linear layer, attention and AdamW. Packages: torch==2.13.0."""

from collections.abc import Callable

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array

Arrays = tuple[Array, ...]
Function = Callable[..., torch.Tensor]


def linear_forward(x: Array, W: Array, bias: Array | None = None) -> Array:
    """`torch.nn.functional.linear`."""
    b = None if bias is None else to_torch(bias)
    return to_numpy(linear(to_torch(x), to_torch(W), b))


def linear_backward(grad_y: Array, x: Array, W: Array) -> Arrays:
    """Its gradients, those of a bias of zeros among them."""
    leaves = [to_torch(x), to_torch(W), torch.zeros(len(W))]
    return _gradients(grad_y, leaves, lambda x, W, b: linear(x, W, b))


def attention_forward(Q: Array, K: Array, V: Array, mask: Array | None = None) -> Array:
    """`scaled_dot_product_attention`."""
    return to_numpy(_attention(mask)(to_torch(Q), to_torch(K), to_torch(V)))


def attention_backward(
    grad_y: Array, Q: Array, K: Array, V: Array, mask: Array | None = None
) -> Arrays:
    """Its gradients."""
    return _gradients(grad_y, [to_torch(Q), to_torch(K), to_torch(V)], _attention(mask))


def adamw_step(
    W: Array,
    grad: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Arrays:
    """One step of `torch.optim.AdamW` from a state that is handed in."""
    weight = torch.nn.Parameter(to_torch(W.copy()))
    weight.grad = to_torch(grad)
    optimizer = torch.optim.AdamW([weight], lr, (beta1, beta2), eps, weight_decay)
    state = {"exp_avg": to_torch(m.copy()), "exp_avg_sq": to_torch(v.copy())}
    optimizer.state[weight] = {"step": torch.tensor(float(t)), **state}
    optimizer.step()
    return to_numpy(weight), *(to_numpy(tensor) for tensor in state.values())


def _attention(mask: Array | None) -> Function:
    allowed = None if mask is None else to_torch(mask).bool()
    return lambda Q, K, V: scaled_dot_product_attention(Q, K, V, allowed)


def _gradients(grad_y: Array, leaves: list[torch.Tensor], function: Function) -> Arrays:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    found = torch.autograd.grad(function(*leaves), leaves, to_torch(grad_y))
    return tuple(to_numpy(gradient) for gradient in found)
