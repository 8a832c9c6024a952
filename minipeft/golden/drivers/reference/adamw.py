"""AdamW in the NumPy column."""

from minipeft.golden.tensors import Array
from minipeft.reference import adamw
from minipeft.reference.adamw import AdamW, State
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import dynamic_map


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
) -> tuple[Array, Array, Array]:
    """Return the next weight and moments."""
    config = AdamW(lr, (beta1, beta2), eps, weight_decay)
    W, state = adamw.step(W, grad, State(t, m, v), config)
    return W, adamw.decode(state.m), adamw.decode(state.v)


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
    config = AdamW(lr, (beta1, beta2), eps, weight_decay)
    m = Blockwise(m_codes, m_absmax, dynamic_map(), adamw.BLOCKSIZE, W.shape)
    v = Blockwise(v_codes, v_absmax, dynamic_map(False), adamw.BLOCKSIZE, W.shape)
    W, state = adamw.step(W, grad, State(t, m, v), config)
    arrays = adamw.to_arrays(state)
    names = ("m_codes", "m_absmax", "v_codes", "v_absmax")
    return W, *(arrays[name] for name in names)
