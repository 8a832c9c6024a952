"""Prefix tuning in the torch column."""

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import prefix
from minipeft.torch.attention import Head
from minipeft.torch.prefix import Prefix, Reparametrization


def prefix_forward(
    Q: Array, K: Array, V: Array, P_K: Array, P_V: Array, mask: Array | None = None
) -> Array:
    """Return what the head makes of prefix and text; the mask is the text's."""
    seen = None if mask is None else to_torch(mask).bool()
    head = Head(to_torch(Q), to_torch(K), to_torch(V), seen)
    return to_numpy(prefix.forward(head, Prefix(to_torch(P_K), to_torch(P_V))))


def prefix_expand(
    P: Array, W_down: Array, b_down: Array, W_up: Array, b_up: Array
) -> tuple[Array, Array]:
    """Return the keys and values that the network stands for."""
    network = Reparametrization(*P.shape, *W_up.T.shape).to(DEVICE)
    down = {"down.weight": to_torch(W_down), "down.bias": to_torch(b_down)}
    up = {"up.weight": to_torch(W_up), "up.bias": to_torch(b_up)}
    network.load_state_dict({"P": to_torch(P), **down, **up})
    expanded = prefix.expand(network)
    return to_numpy(expanded.K), to_numpy(expanded.V)
