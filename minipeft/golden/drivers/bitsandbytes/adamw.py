"""AdamW in bitsandbytes, with states of 32 and of 8 bits, from a state handed in."""

from typing import Any

import torch
from bitsandbytes import optim

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array


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
    state = {"state1": to_torch(m.copy()), "state2": to_torch(v.copy())}
    made: Any = optim.AdamW32bit
    hyper = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    weight = torch.nn.Parameter(to_torch(W.copy()))
    optimizer = made([weight], **hyper, weight_decay=weight_decay)
    weight.grad = to_torch(grad)
    optimizer.state[weight] = {"step": t, **state}
    optimizer.initialized = True
    optimizer.step()
    return to_numpy(weight), to_numpy(state["state1"]), to_numpy(state["state2"])
