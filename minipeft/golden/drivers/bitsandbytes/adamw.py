"""AdamW in bitsandbytes, with states of 32 and of 8 bits, from a state handed in."""

from typing import Any

import torch
from bitsandbytes import optim

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array

UNTYPED: Any = optim


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
) -> tuple[Array, ...]:
    """One step of `AdamW32bit`."""
    state = {"state1": m, "state2": v}
    settings = (lr, (beta1, beta2), eps, weight_decay)
    return _step(UNTYPED.AdamW32bit([_leaf(W)], *settings), grad, t, state)


def adamw8_step(
    W: Array,
    grad: Array,
    m_codes: Array,
    m_absmax: Array,
    v_codes: Array,
    v_absmax: Array,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Array, ...]:
    """One step of `AdamW8bit`, which gives small tensors such a state too."""
    state = {"state1": m_codes, "absmax1": m_absmax}
    state |= {"state2": v_codes, "absmax2": v_absmax}
    settings = (lr, (beta1, beta2), eps, weight_decay)
    return _step(UNTYPED.AdamW8bit([_leaf(W)], *settings), grad, t, state)


def _leaf(W: Array) -> torch.nn.Parameter:
    return torch.nn.Parameter(to_torch(W.copy()))


def _step(
    optimizer: Any, grad: Array, t: int, arrays: dict[str, Array]
) -> tuple[Array, ...]:
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = to_torch(grad)
    optimizer.fill_qmap()
    named = {"qmap1": "dynamic", "qmap2": "udynamic"}
    maps = {k: optimizer.name2qmap[n].to(weight.device) for k, n in named.items()}
    state = {name: to_torch(array.copy()) for name, array in arrays.items()}
    optimizer.state[weight] = {"step": t, **maps, **state}
    optimizer.initialized = True
    optimizer.step()
    return to_numpy(weight), *(to_numpy(tensor) for tensor in state.values())
