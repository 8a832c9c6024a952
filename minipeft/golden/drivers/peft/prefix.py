"""Prefix tuning in peft: its encoder, and the cache that it hands to a model."""

from typing import Any

import torch
from peft import PrefixTuningConfig
from torch.nn.functional import pad, scaled_dot_product_attention

from minipeft.golden.drivers.bridge import DEVICE, to_numpy, to_torch
from minipeft.golden.drivers.peft.virtual import TASK, around
from minipeft.golden.errors import Unsupported
from minipeft.golden.tensors import Array


def prefix_forward(
    Q: Array, K: Array, V: Array, P_K: Array, P_V: Array, mask: Array | None = None
) -> Array:
    """Return torch's attention to the cache after the text was added to it."""
    if P_K.shape != P_V.shape or K.shape != V.shape:
        raise Unsupported("in peft keys and values have the same shape")
    config = PrefixTuningConfig(task_type=TASK, num_virtual_tokens=len(P_K))
    both = torch.cat([to_torch(P_K), to_torch(P_V)], dim=1)
    q, k, v = (to_torch(a).reshape(-1, 1, *a.shape[-2:]) for a in (Q, K, V))
    cache = _cache(P_K.shape[1], config, {"embedding.weight": both}, len(k))
    keys, values = cache.update(k, v, 0)
    seen = None
    if mask is not None:
        seen = pad(to_torch(mask).bool(), (len(P_K), 0), value=True)
        seen = seen.reshape(-1, 1, *seen.shape[-2:])
    y = scaled_dot_product_attention(q, keys, values, seen)
    return to_numpy(y.reshape(*Q.shape[:-1], -1))


def prefix_expand(
    P: Array, W_down: Array, b_down: Array, W_up: Array, b_up: Array
) -> tuple[Array, Array]:
    """Return the keys and values of `prefix_projection=True`."""
    if len(b_up) != 2 * P.shape[1]:
        raise Unsupported("in peft virtual tokens are as wide as keys")
    config = PrefixTuningConfig(
        task_type=TASK,
        num_virtual_tokens=len(P),
        prefix_projection=True,
        encoder_hidden_size=len(b_down),
    )
    arrays = {"0.weight": W_down, "0.bias": b_down, "2.weight": W_up, "2.bias": b_up}
    state = {f"transform.{name}": to_torch(array) for name, array in arrays.items()}
    state["embedding.weight"] = to_torch(P)
    (layer,) = _cache(P.shape[1], config, state, 1).layers
    return to_numpy(layer.keys[0, 0]), to_numpy(layer.values[0, 0])


def _cache(
    d: int, config: PrefixTuningConfig, state: dict[str, torch.Tensor], texts: int
) -> Any:
    model = around(torch.zeros(1, d, device=DEVICE), config)
    model.prompt_encoder["default"].load_state_dict(state)
    return model(inputs_embeds=torch.zeros(texts, 1, d, device=DEVICE))[1]
