"""Paged optimizer states, run on this CPU through their launchers."""

import numpy as np
import pytest

from minipeft.cupy import adamw, paged
from minipeft.cupy.executor import use
from minipeft.errors import InputError
from tests.cuda.adamw_cases import slope
from tests.cuda.blockwise_cases import gaussian
from tests.cuda.executors import DTYPES, CpuExecutor
from tests.cuda.paged_cases import agree, bad_gradient_is_named
from tests.cuda.toolchain import needs_cpu_build

pytestmark = needs_cpu_build


@pytest.mark.parametrize("budget", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float32", 8), ("bfloat16", 8), ("float32", 32), ("float16", 32)],
)
def test_the_bytes_and_the_traffic_of_the_reference(budget, dtype, bits):
    with use(CpuExecutor(seed=budget)):
        agree([5000, 1, 4096, 65], dtype, bits, 1024, budget)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [63, 64, 65, 5000])
def test_a_gradient_that_is_not_finite_touches_no_page(n, dtype):
    with use(CpuExecutor()):
        bad_gradient_is_named(n, dtype)


def test_a_gradient_too_large_for_eight_bits_touches_no_page():
    W, grad = gaussian(5000), slope(5000, "float32", 0)
    grad[4999] = 3e30
    with use(CpuExecutor()):
        p = paged.init([adamw.init(W, 8)], 1024, 2)
        with pytest.raises(InputError, match="at index 4999, whose square no moment"):
            paged.step(p, 0, W, grad, adamw.AdamW())
        assert not p.device
        assert not paged.gather(p, 0).m.absmax.any()


def test_the_state_of_another_tensor_touches_no_page():
    W = gaussian(4096)
    with use(CpuExecutor()):
        p = paged.init([adamw.init(W)], 256, 2)
        with pytest.raises(InputError, match=r"m of the state has shape \(4096,\)"):
            paged.step(p, 0, W[:3840], W[:3840], adamw.AdamW())
        assert not p.device


def test_what_is_out_of_range_is_refused():
    W = np.zeros(4096, np.float32)
    with use(CpuExecutor()):
        states = [adamw.init(W)]
        with pytest.raises(
            InputError, match="page_size is 100; choose a multiple of 256"
        ):
            paged.init(states, 100, 1)
        with pytest.raises(InputError, match="budget is 0; the device must hold"):
            paged.init(states, 256, 0)
        with pytest.raises(InputError, match="page is 16; choose 0 to 15"):
            paged.touch(paged.init(states, 256, 1), 16)
