"""The AdamW kernels, run on this CPU through their launchers."""

from dataclasses import replace

import numpy as np
import pytest

from minipeft.cupy import adamw as gpu
from minipeft.cupy.executor import use
from minipeft.errors import InputError
from tests.cuda.adamw_cases import agree, slope
from tests.cuda.blockwise_cases import gaussian
from tests.cuda.executors import DTYPES, CpuExecutor
from tests.cuda.toolchain import needs_cpu_build

pytestmark = needs_cpu_build
CONFIG = gpu.AdamW()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 5000])
def test_steps_with_states_of_float32(n, dtype):
    with use(CpuExecutor(seed=n)):
        agree(n, dtype, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4096, 4097, 4096 + 255, 4096 + 257, 3 * 8192 + 3])
def test_steps_with_states_of_eight_bits(n, dtype):
    with use(CpuExecutor(seed=n)):
        agree(n, dtype, 8, steps=5)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 32), ("float16", 8)])
def test_a_large_ragged_tensor(dtype, bits):
    with use(CpuExecutor()):
        agree(2**20 + 3, dtype, bits, steps=1)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, bits):
    W, grad = gaussian(5000), slope(5000, "float32", 0)
    grad[[4444, 4000]] = bad
    with use(CpuExecutor()):
        state = gpu.init(W, bits)
        before = [
            W.copy(),
            *(np.copy(getattr(s, "packed", s)) for s in (state.m, state.v)),
        ]
        with pytest.raises(InputError, match=f"{bad} at index 4000; skip this step"):
            gpu.step(W, grad, state, CONFIG)
    after = [W, *(getattr(s, "packed", s) for s in (state.m, state.v))]
    assert [a.tobytes() for a in after] == [b.tobytes() for b in before]


def test_a_gradient_too_large_for_eight_bits_is_named():
    W, grad = gaussian(5000), slope(5000, "float32", 0)
    grad[300] = 3e30
    with use(CpuExecutor()):
        state = gpu.init(W, 8)
        with pytest.raises(InputError, match="at index 300, whose square no moment"):
            gpu.step(W, grad, state, CONFIG)


@pytest.mark.parametrize("part", ["m", "v"])
def test_a_state_with_one_moment_in_eight_bits_is_refused(part):
    W, grad = gaussian(5000), slope(5000, "float32", 0)
    with use(CpuExecutor()):
        coded, plain = gpu.init(W, 8), gpu.init(W, 32)
        mixed = replace(plain, **{part: getattr(coded, part)})
        with pytest.raises(InputError, match="one moment of the state is in 8 bits"):
            gpu.step(W, grad, mixed, CONFIG)


def test_what_does_not_fit_is_refused():
    W = gaussian(5000)
    with use(CpuExecutor()):
        state = gpu.init(W)
        with pytest.raises(InputError, match="the gradient is float16"):
            gpu.step(W, W.astype(np.float16), state, CONFIG)
        with pytest.raises(InputError, match=r"the gradient has shape \(4000,\)"):
            gpu.step(W, W[:4000], state, CONFIG)
        with pytest.raises(InputError, match="m of the state has shape"):
            gpu.step(W[:4000], W[:4000], state, CONFIG)
        coded = gpu.init(W[:4096].reshape(64, 64), 8)
        with pytest.raises(InputError, match=r"m of the state has shape \(64, 64\)"):
            gpu.step(W[:4096], W[:4096], coded, CONFIG)
        with pytest.raises(InputError, match="W is float64; give one of"):
            gpu.init(W.astype(np.float64))
        m = state.m.astype(np.float16)
        with pytest.raises(InputError, match="m is float16; give one of"):
            gpu.step(W, W, gpu.State(0, m, state.v), CONFIG)
        with pytest.raises(InputError, match="bits is 4; choose 8 or 32"):
            gpu.init(W, 4)
        with pytest.raises(InputError, match="betas are"):
            gpu.AdamW(betas=(0.9, 1.0))
