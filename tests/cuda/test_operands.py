"""Each row of the CuPy column refuses operands of another layer before any launch."""

from types import SimpleNamespace

import numpy as np
import pytest

from minipeft.cupy import (
    adamw,
    blockwise,
    dora,
    double_quant,
    lora_batched,
    paged,
    qlora,
)
from minipeft.cupy.executor import use
from minipeft.errors import InputError
from tests.cuda.executors import NumpyExecutor


class LaunchedError(Exception):
    """A kernel was launched: its operands passed all checks."""


class NoLauncher:
    def launch(self, kernel, dtype, args, stream):
        raise LaunchedError


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def codes(n):
    return ones(n, dtype=np.uint8)


def stack(A, B, A_other, B_other):
    adapters = [SimpleNamespace(A=A, B=B, scaling=1.0)]
    lora_batched.stack([*adapters, SimpleNamespace(A=A_other, B=B_other, scaling=1.0)])
    raise LaunchedError  # no kernel is needed


def several(x, y, A, B, scaling, indices):
    adapters = lora_batched.Adapters(A, B, scaling)
    lora_batched.forward(x, y, adapters, indices.astype(np.int32))


def base(packed, absmax, codebook):
    return blockwise.Blockwise(packed, absmax, codebook, 8, (6, 16))


def nested_base(packed, absmax_codes, nested_absmax, offset, codebook):
    parts = packed, absmax_codes, nested_absmax, offset, codebook
    return double_quant.Nested(*parts, 8, 4, (6, 16))


def layer(x, A, B, scaling, bias, **parts):
    q = nested_base(**parts) if "offset" in parts else base(**parts)
    qlora.forward(x, q, lora_batched.Adapters(A, B, scaling), bias)


def step(W, grad, m, v):
    adamw.step(W, grad, adamw.State(0, m, v), adamw.AdamW())


def coded(shape, packed, absmax):
    return blockwise.Blockwise(packed, absmax, ones(256), adamw.BLOCKSIZE, shape)


def step_8bit(W, grad, m_packed, m_absmax, v_packed, v_absmax):
    m, v = coded((64, 65), m_packed, m_absmax), coded((64, 65), v_packed, v_absmax)
    adamw.step(W, grad, adamw.State(0, m, v), adamw.AdamW())


def step_paged(W, grad):
    p = paged.init([paged.zeros(ones(64, 65))], 1024, 2)
    paged.step(p, 0, W, grad, adamw.AdamW())


PARTS = {"packed": codes(48), "absmax": ones(12), "codebook": ones(16)}
NESTED = {
    **{"packed": codes(48), "absmax_codes": codes(12), "nested_absmax": ones(3)},
    **{"offset": ones(1), "codebook": ones(16)},
}
LAYER = {
    **{"x": ones(3, 16), "A": ones(1, 2, 16), "B": ones(1, 6, 2)},
    **{"scaling": ones(1), "bias": ones(6)},
}
STEP = {"W": ones(64, 65), "grad": ones(64, 65)}
CALLS = {
    "dora.row_norm": (
        lambda W, A, B: dora.row_norm(W, A, B, 1.0),
        {"W": ones(5, 7), "A": ones(2, 7), "B": ones(5, 2)},
    ),
    "lora_batched.stack": (
        stack,
        {
            **{"A": ones(2, 8), "B": ones(6, 2)},
            **{"A_other": ones(3, 8), "B_other": ones(6, 3)},
        },
    ),
    "lora_batched.forward": (
        several,
        {
            **{"x": ones(3, 8), "y": ones(3, 6), "A": ones(2, 2, 8)},
            **{"B": ones(2, 6, 2), "scaling": ones(2), "indices": ones(3)},
        },
    ),
    "blockwise.dequantize": (lambda **p: blockwise.dequantize(base(**p)), PARTS),
    "double_quant.dequantize": (
        lambda **p: double_quant.dequantize(nested_base(**p)),
        NESTED,
    ),
    "qlora.forward": (layer, {**LAYER, **PARTS}),
    "qlora.forward, nested": (layer, {**LAYER, **NESTED}),
    "qlora.forward, base alone": (
        lambda x, **parts: qlora.forward(x, base(**parts)),
        {"x": ones(3, 16), **PARTS},
    ),
    "adamw.step": (step, {**STEP, "m": ones(64, 65), "v": ones(64, 65)}),
    "adamw.step, 8 bits": (
        step_8bit,
        {
            **STEP,
            **{"m_packed": codes(64 * 65), "m_absmax": ones(17)},
            **{"v_packed": codes(64 * 65), "v_absmax": ones(17)},
        },
    ),
    "paged.step": (step_paged, STEP),
}
OPERANDS = [(call, name) for call, (_, given) in CALLS.items() for name in given]
FREE = {"qlora.forward": {("x", 0)}}  # the tokens
COUNTED = {*PARTS, *NESTED}  # codes and scales may have any shape of their size


def wrong(call, name, right):
    """Yield arrays with a wrong length or number of axes, and the transpose."""
    for axis, length in enumerate(right.shape):
        if (name, axis) not in FREE.get(call.split(",")[0], ()):
            first = right.take([0], axis)
            yield from [first] * (length > 1)
            yield np.concatenate([right, first], axis)
    if name not in COUNTED:
        yield right[None]
    if right.ndim > 1:
        yield right[0].copy()
        yield np.ascontiguousarray(right.swapaxes(-1, -2))


@pytest.mark.parametrize("call", CALLS)
def test_right_operands_are_launched(call):
    function, given = CALLS[call]
    with use(NumpyExecutor(NoLauncher())), pytest.raises(LaunchedError):
        function(**given)


@pytest.mark.parametrize(("call", "name"), OPERANDS)
def test_an_operand_of_another_layer_is_refused(call, name):
    function, given = CALLS[call]
    with use(NumpyExecutor(NoLauncher())):
        for array in wrong(call, name, given[name]):
            with pytest.raises(InputError):
                function(**{**given, name: array})


@pytest.mark.parametrize("bits", [32, 8])
def test_the_state_of_a_transposed_weight_is_refused(bits):
    W, turned = ones(64, 65), ones(65, 64)
    with use(NumpyExecutor(NoLauncher())):
        state = adamw.init(W, bits)
        with pytest.raises(InputError, match="m of the state has shape"):
            adamw.step(turned, turned, state, adamw.AdamW())
        p = paged.init([paged.zeros(W, bits)], 1024, 2)
        with pytest.raises(InputError, match="m of the state has shape"):
            paged.step(p, 0, turned, turned, adamw.AdamW())
