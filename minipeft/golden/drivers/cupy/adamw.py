"""AdamW in the CuPy column."""

from minipeft.cupy import adamw
from minipeft.cupy.adamw import AdamW, State
from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.codebook import dynamic_map
from minipeft.cupy.executor import current
from minipeft.golden.tensors import Array

DEVICE = 0


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
    gpu, config = current(), AdamW(lr, (beta1, beta2), eps, weight_decay)
    W, grad, m, v = (gpu.upload(array, DEVICE) for array in (W, grad, m, v))
    after, state = adamw.step(W, grad, State(t, m, v), config)
    return tuple(gpu.download(array) for array in (after, state.m, state.v))


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
    gpu, config = current(), AdamW(lr, (beta1, beta2), eps, weight_decay)
    m = _moment(m_codes, m_absmax, signed=True)
    v = _moment(v_codes, v_absmax, signed=False)
    W, grad = gpu.upload(W, DEVICE), gpu.upload(grad, DEVICE)
    after, state = adamw.step(W, grad, State(t, m, v), config)
    parts = (part for q in (state.m, state.v) for part in (q.packed, q.absmax))
    return tuple(gpu.download(array) for array in (after, *parts))


def _moment(codes: Array, absmax: Array, signed: bool) -> Blockwise:
    gpu = current()
    packed, scales, codebook = (
        gpu.upload(array, DEVICE)
        for array in (codes.reshape(-1), absmax, dynamic_map(signed))
    )
    return Blockwise(packed, scales, codebook, adamw.BLOCKSIZE, codes.shape)
