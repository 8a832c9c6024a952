"""AdamW in the torch column."""

from typing import Any

from minipeft.golden.drivers.bridge import to_numpy, to_torch
from minipeft.golden.tensors import Array
from minipeft.torch import adamw


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
    """Return the next weight and moments."""
    group = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    group |= {"weight_decay": weight_decay}
    return _step(W, grad, {"step": t, "m": m, "v": v}, group)


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
    """Return the next weight, and the codes and scales of both moments."""
    group = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    group |= {"weight_decay": weight_decay}
    state = {"m_codes": m_codes, "m_absmax": m_absmax}
    state |= {"v_codes": v_codes, "v_absmax": v_absmax}
    return _step(W, grad, {"step": t, **state}, group)


def _step(
    W: Array, grad: Array, arrays: dict[str, Any], group: dict[str, Any]
) -> tuple[Array, ...]:
    moved = to_torch(W).clone()
    names = [name for name in arrays if name != "step"]
    # A step writes in place, and `to_torch` may share the memory of the array.
    state = {"step": arrays["step"]} | {n: to_torch(arrays[n]).clone() for n in names}
    adamw.step(moved, to_torch(grad), state, group)
    return to_numpy(moved), *(to_numpy(state[name]) for name in names)
