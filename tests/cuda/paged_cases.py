"""Cases of paged states for every check: the reference's bytes and its traffic."""

import re
from collections.abc import Collection
from dataclasses import asdict, replace

import numpy as np
import pytest

from minipeft.cupy import adamw as gpu_adamw
from minipeft.cupy import paged as gpu
from minipeft.errors import InputError
from minipeft.reference import adamw, paged
from tests.cuda.adamw_cases import CONFIG, same, slope
from tests.cuda.blockwise_cases import gaussian
from tests.cuda.executors import DTYPES
from tests.cuda.mutation import Mutation
from tests.tolerance import assert_bits


def agree(
    sizes: Collection[int], dtype: str, bits: int, page_size: int, budget: int
) -> None:
    """Step some tensors in turn, move pages, and compare weights, states, traffic."""
    W = [gaussian(n, dtype) for n in sizes]
    expected_W = list(W)
    p = gpu.init([gpu_adamw.init(w, bits) for w in W], page_size, budget)
    expected = paged.init([adamw.init(w, bits) for w in W], page_size, budget)
    last = expected.pages[-1].stop - 1
    for t in range(2):
        p = gpu.prefetch(gpu.touch(p, last), 0)
        expected = paged.prefetch(paged.touch(expected, last), 0)
        for i, n in enumerate(sizes):
            grad = slope(n, dtype, t)
            W[i], p = gpu.step(p, i, W[i], grad, gpu_adamw.AdamW(**CONFIG))
            expected_W[i], expected = step_ahead(expected, i, expected_W[i], grad)
            compare(p, expected, i)
            assert_bits(W[i], expected_W[i])
        p, expected = gpu.evict(p, last), paged.evict(expected, last)
    p, expected = gpu.resize(p, 1), paged.resize(expected, 1)
    compare(p, expected, 0)


def step_ahead(
    p: paged.Paged, tensor: int, W: np.ndarray, grad: np.ndarray
) -> tuple[np.ndarray, paged.Paged]:
    """Step the reference's pages; prefetch the next page while one is in use."""
    W, config = W.copy(), adamw.AdamW(**CONFIG)
    for i, page in enumerate(p.pages[tensor]):
        p = paged.touch(p, page)
        if page + 1 in p.pages[tensor] and p.budget > 1:
            p = paged.prefetch(p, page + 1)
        part = slice(i * p.page_size, (i + 1) * p.page_size)
        W[part], state = adamw.step(W[part], grad[part], p.device[page], config)
        p = replace(p, device={**p.device, page: state})
    return W, p


def compare(p: gpu.Paged, expected: paged.Paged, tensor: int) -> None:
    assert asdict(p.traffic) == asdict(expected.traffic)
    assert list(p.device) == list(expected.device)
    got, state = gpu.gather(p, tensor), paged.gather(expected, tensor)
    assert got.t == state.t
    same(got.m, state.m)
    same(got.v, state.v)


def bad_gradient_is_named(n: int, dtype: str) -> None:
    """Check that the message names the first bad value of the gradient, anywhere."""
    W = gaussian(n, dtype)
    p = gpu.init([gpu_adamw.init(W)], 256, 2)
    for at in (0, 13, n - 1):
        grad = slope(n, dtype, 0)
        grad[at + 24 :: 24] = np.inf  # later bad values, in the same block and beyond
        grad[at] = np.nan
        with pytest.raises(InputError) as refused:
            gpu.step(p, 0, W, grad, gpu_adamw.AdamW())
        named = int(re.search(r"at index (\d+)", str(refused.value))[1])
        assert_bits(np.array([named]), np.array([at]))
    assert p.traffic == gpu.Traffic()


def small(dtypes: Collection[str] = tuple(DTYPES)) -> None:
    """Run a few launches that reach every branch, for the slow checks."""
    for dtype in dtypes:
        agree([700, 257], dtype, 32, 256, 2)
        bad_gradient_is_named(2049, dtype)
    agree([4096 + 77], "float32", 8, 2048, 2)


MUTATIONS = (
    Mutation(
        "a group reads one too far",
        "value[GROUP];\n  load_padded<GROUP>(x, first, n, value);",
        "value[GROUP];\n  load_padded<GROUP>(x, first, n + 8, value);",
        1,
        ("addresses", "ptx"),
    ),
    Mutation(
        "only the first of a group is looked at",
        "atomicMin(bad, u64(first + i))",
        "atomicMin(bad, u64(first))",
        1,
        ("values", "ptx"),
    ),
    Mutation(
        "a store in place of the atomic",
        "atomicMin(bad, u64(first + i))",
        "*bad = u64(first + i)",
        1,
        ("values", "races"),
    ),
)
