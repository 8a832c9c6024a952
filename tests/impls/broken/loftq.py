"""Bugs of LoftQ."""

from itertools import islice

import numpy as np

from minipeft.golden.drivers.reference import loftq as right
from minipeft.reference import blockwise, loftq, lora
from minipeft.reference.codebook import NF4
from tests.impls.broken import bug

F32 = np.float32


@bug("loftq_init", "Basic")
def approximates_the_weight_itself(W, r, alpha, blocksize, steps):
    packed, absmax, delta = right.loftq_init(W, r, alpha, blocksize, steps)
    if not delta.any():
        return packed, absmax, delta
    U, S, V = np.linalg.svd(W.astype(np.float64), full_matrices=False)
    return packed, absmax, ((U[:, :r] * S[:r]) @ V[:r]).astype(F32)


@bug("loftq_init", "Scaling")
def forgets_the_scaling_in_loftq(W, r, alpha, blocksize, steps):
    packed, absmax, delta = right.loftq_init(W, r, alpha, blocksize, steps)
    return packed, absmax, delta * F32(alpha / r)


@bug("loftq_init", "FullRank")
def refuses_full_rank_in_loftq(W, r, alpha, blocksize, steps):
    if r == min(W.shape):
        raise ValueError("r must be smaller than W")
    return right.loftq_init(W, r, alpha, blocksize, steps)


@bug("loftq_init", "Representable")
def always_leaves_an_update(W, r, alpha, blocksize, steps):
    packed, absmax, delta = right.loftq_init(W, r, alpha, blocksize, steps)
    q = blockwise.quantize(W, NF4, blocksize)
    exact = np.array_equal(blockwise.dequantize(q), W)
    return packed, absmax, (delta + F32(1e-2) if exact else delta)


@bug("loftq_init", "OutOfRange")
def steps_once_at_least(W, r, alpha, blocksize, steps):
    return right.loftq_init(W, r, alpha, blocksize, max(steps, 1))


@bug("loftq_init", "ZeroRank")
def keeps_one_rank(W, r, alpha, blocksize, steps):
    return right.loftq_init(W, max(r, 1), alpha, blocksize, steps)


@bug("loftq_init", "ExcessiveRank")
def cuts_the_rank_in_loftq(W, r, alpha, blocksize, steps):
    return right.loftq_init(W, min(r, *W.shape), alpha, blocksize, steps)


@bug("loftq_init", "InvalidAlpha")
def takes_any_alpha_in_loftq(W, r, alpha, blocksize, steps):
    return right.loftq_init(W, r, abs(alpha), blocksize, steps)


@bug("loftq_init", "InvalidBlocksize")
def rounds_the_block_size(W, r, alpha, blocksize, steps):
    power = 2 ** (blocksize.bit_length() - 1)
    return right.loftq_init(W, r, alpha, power, steps)


@bug("loftq_init", "Alternation", "3 steps, pair 2 is best")
def ignores_the_number_of_steps(W, r, alpha, blocksize, steps):
    return right.loftq_init(W, r, alpha, blocksize, min(steps, 1))


@bug("loftq_init", "Alternation", "5 steps, pair 1 is best")
def keeps_the_second_pair(W, r, alpha, blocksize, steps):
    if steps < 5:
        return right.loftq_init(W, r, alpha, blocksize, steps)
    _, (q, initial) = islice(loftq.alternate(W, r, alpha, NF4, blocksize), 2)
    return q.packed, q.absmax, lora.delta(initial)
