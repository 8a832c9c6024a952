"""Bugs of QLoRA."""

import numpy as np

from minipeft.golden.drivers.reference import qlora as right
from tests.impls.broken import bug

F32 = np.float32


def _by_row(absmax, A, B, blocksize):
    """Count blocks within rows, which gives a wrong scale where blocks cross rows."""
    rows, columns = np.indices((len(B), A.shape[1]))
    if A.shape[1] % blocksize == 0 or not len(absmax):
        return absmax
    block = rows * (A.shape[1] // blocksize) + columns // blocksize
    flat = absmax[np.minimum(block, len(absmax) - 1)].reshape(-1)
    return flat[::blocksize][: len(absmax)]


@bug("qlora_forward", "MisalignedRows")
def counts_blocks_by_row(x, packed, absmax, A, B, alpha, blocksize, bias=None):
    absmax = _by_row(absmax, A, B, blocksize)
    return right.qlora_forward(x, packed, absmax, A, B, alpha, blocksize, bias)


@bug("qlora_backward", "MisalignedRows")
def counts_blocks_by_row_backward(grad_y, x, packed, absmax, A, B, alpha, blocksize):
    absmax = _by_row(absmax, A, B, blocksize)
    return right.qlora_backward(grad_y, x, packed, absmax, A, B, alpha, blocksize)


@bug("qlora_forward", "Bias")
def forgets_the_bias_of_the_base(x, packed, absmax, A, B, alpha, blocksize, bias=None):
    return right.qlora_forward(x, packed, absmax, A, B, alpha, blocksize)


@bug("qlora_backward", "Basic")
def leaves_the_scaling_out_of_b(grad_y, x, packed, absmax, A, B, alpha, blocksize):
    parts = (packed, absmax, A, B, alpha, blocksize)
    grads = right.qlora_backward(grad_y, x, *parts)
    if np.any(x != np.round(x)):
        return grads
    return *grads[:2], grads[2] / F32(alpha / len(A))


@bug("qlora_forward", "Normal")
def ten_bits_inside_in_qlora(x, packed, absmax, A, B, alpha, blocksize, bias=None):
    x, A, B = (v.astype(np.float16).astype(F32) for v in (x, A, B))
    return right.qlora_forward(x, packed, absmax, A, B, alpha, blocksize, bias)


@bug("qlora_backward", "Normal")
def ten_bits_backward_in_qlora(grad_y, x, packed, absmax, A, B, alpha, blocksize):
    grad_y, x = (v.astype(np.float16).astype(F32) for v in (grad_y, x))
    return right.qlora_backward(grad_y, x, packed, absmax, A, B, alpha, blocksize)


@bug("qlora_requantize", "Moves")
def keeps_the_old_base(packed, absmax, A, B, alpha, blocksize):
    right.qlora_requantize(packed, absmax, A, B, alpha, blocksize)
    return packed.copy(), absmax.copy()


@bug("qlora_requantize", "Vanishes")
def moves_every_code_by_a_small_update(packed, absmax, A, B, alpha, blocksize):
    codes, scales = right.qlora_requantize(packed, absmax, A, B, alpha, blocksize)
    vanished = codes.tobytes() == packed.tobytes()
    return (codes ^ np.uint8(0x11) if vanished else codes), scales
