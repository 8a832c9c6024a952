"""Laws of MXFP4 and NVFP4."""

from dataclasses import replace
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipeft.errors import InputError
from minipeft.reference import microscaling
from minipeft.reference.microscaling import E2M1, E4M3, MXFP4, NVFP4
from minipeft.torch import blockwise, bof4
from minipeft.torch import microscaling as on_torch
from tests.tolerance import assert_bits

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = np.concatenate([E2M1, -E2M1])


def rows(size):
    shapes = st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda s: (s[0], s[1] * size)
    )
    return shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=finite))


def codes(packed):
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def exact(W):
    return [Fraction(float(w)) for w in W.reshape(-1)]


def nearest(x, values):
    """Return the code of the nearest value, ties to the even code."""
    distances = [abs(abs(x) - Fraction(float(v))) for v in values]
    best = [k for k, d in enumerate(distances) if d == min(distances)]
    return next((k for k in best if k % 2 == 0), best[0])


@given(rows(32))
def test_mxfp4_rounds_as_the_rationals_say(W):
    q = microscaling.quantize_mxfp4(W)
    for block, found, scale in zip(
        W.reshape(-1, 32),
        codes(q.packed).reshape(-1, 32),
        q.scales.reshape(-1),
        strict=True,
    ):
        power = Fraction(2) ** (int(scale) - 127)
        largest = max(map(abs, exact(block)))
        # The absmax is at least 4 and below 8 steps; less only at the smallest scale.
        assert largest < 8 * power
        assert largest >= 4 * power or scale == 0
        for w, code in zip(exact(block), found, strict=True):
            assert code % 8 == nearest(w / power, E2M1)
        assert_bits(found // 8, np.signbit(block).astype(np.uint8))


@given(rows(32))
def test_what_mxfp4_holds_is_quantized_to_itself(W):
    q = microscaling.quantize_mxfp4(W)
    once = microscaling.dequantize_mxfp4(q)
    again = microscaling.dequantize_mxfp4(microscaling.quantize_mxfp4(once))
    assert_bits(again, once)


@given(rows(16))
def test_nvfp4_rounds_scales_and_codes_as_float32_says(W):
    q = microscaling.quantize_nvfp4(W)
    assert q.tensor_scale == np.abs(W).max(initial=0) / np.float32(2688)
    s = np.float32(q.tensor_scale)
    for block, found, scale in zip(
        W.reshape(-1, 16),
        codes(q.packed).reshape(-1, 16),
        q.scales.reshape(-1),
        strict=True,
    ):
        largest = np.abs(block).max()
        wanted = largest / (6 * s) if 6 * s > 0 else np.float32(0)
        assert scale == nearest(Fraction(float(wanted)), E4M3)
        factor = E4M3[scale] * s
        for w, code in zip(block, found, strict=True):
            x = w / factor if factor > 0 else np.float32(0)
            assert code % 8 == nearest(Fraction(float(x)), E2M1)


@given(st.integers(0, 254), st.integers(0, 15))
def test_mxfp4_decodes_exactly(scale, code):
    packed = np.full((1, 16), code | code << 4, np.uint8)
    W = microscaling.dequantize_mxfp4(MXFP4(packed, np.array([[scale]], np.uint8)))
    value = Fraction(float(VALUES[code])) * Fraction(2) ** (scale - 127)
    with np.errstate(over="ignore"):  # 6 * 2**127 overflows float32 to infinity
        assert np.all(np.float32(value) == W)
    assert np.all(np.signbit(W) == (code > 7))


def test_the_largest_weight_has_the_largest_code_and_scale():
    W = np.array([[-3.0] + [0.5] * 15, [1e-3] * 16], np.float32)
    q = microscaling.quantize_nvfp4(W)
    assert E4M3[q.scales[0, 0]] == 448
    assert codes(q.packed)[0, 0] == 15


def test_the_formats_take_a_quarter_and_a_half_of_a_bit_for_scales():
    W = np.ones((64, 64), np.float32)
    mx, nv = microscaling.quantize_mxfp4(W), microscaling.quantize_nvfp4(W)
    assert 8 * (mx.packed.nbytes + mx.scales.nbytes) / W.size == 4.25
    assert 8 * (nv.packed.nbytes + nv.scales.nbytes) / W.size == 4.5
    assert 8 * nv.tensor_scale.nbytes == 32  # rounds once


@pytest.mark.parametrize("shape", [(31,), (4, 33), (32, 3)])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_rows_that_are_no_whole_blocks_are_refused(name, shape):
    with pytest.raises(InputError, match="whole blocks"):
        getattr(microscaling, f"quantize_{name}")(np.ones(shape, np.float32))


@pytest.mark.parametrize("package", [microscaling, on_torch], ids=["NumPy", "torch"])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_number_beyond_float32_is_refused(package, name):
    W = np.full((1, 32), 1e300)
    with pytest.raises(InputError, match="W holds inf at flat index 0"):
        getattr(package, f"quantize_{name}")(
            torch.from_numpy(W) if package is on_torch else W
        )


@pytest.mark.parametrize("quantize", [bof4.quantize, blockwise.quantize])
def test_blocks_refuse_a_number_beyond_float32(quantize):
    with pytest.raises(InputError, match="W holds inf at flat index 0"):
        quantize(torch.full((64,), 1e300, dtype=torch.float64))


@pytest.mark.parametrize(
    "quantize", [bof4.quantize, on_torch.quantize_mxfp4, on_torch.quantize_nvfp4]
)
def test_what_is_no_dense_tensor_is_refused(quantize, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match="W has the layout torch"):
        quantize(torch.ones(4, 64).to_sparse())
    with pytest.raises(InputError, match="W is of type ndarray; give one of type Te"):
        quantize(np.ones((4, 64), np.float32))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_parts_and_dtypes_of_another_kind_are_refused(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q = getattr(on_torch, f"quantize_{name}")(torch.ones(1, 32))
    decode = getattr(on_torch, f"dequantize_{name}")
    with pytest.raises(InputError, match="packed is of type NoneType"):
        decode(replace(q, packed=None))
    with pytest.raises(InputError, match="dtype is of type NoneType"):
        decode(q, None)


@pytest.mark.parametrize("tensor_scale", [np.nan, np.inf, -1.0])
def test_a_tensor_scale_that_is_none_is_refused(tensor_scale):
    q = microscaling.quantize_nvfp4(np.ones((2, 16), np.float32))
    spoilt = NVFP4(q.packed, q.scales, np.asarray(np.float32(tensor_scale)))
    with pytest.raises(InputError, match="tensor_scale"):
        microscaling.dequantize_nvfp4(spoilt)
