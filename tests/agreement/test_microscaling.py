"""MXFP4 and NVFP4: the torch column has the bytes of the reference and of torch."""

import numpy as np
import pytest
import torch
from hypothesis import given

from minipeft.errors import InputError
from minipeft.reference import microscaling as reference
from minipeft.torch import microscaling
from tests.properties.test_microscaling import rows
from tests.tolerance import assert_bits


@given(rows(32))
def test_mxfp4_agrees_in_every_byte(W):
    ours = microscaling.quantize_mxfp4(torch.from_numpy(W))
    theirs = reference.quantize_mxfp4(W)
    assert_bits(ours.packed.numpy(), theirs.packed)
    assert_bits(ours.scales.numpy(), theirs.scales)
    decoded = microscaling.dequantize_mxfp4(ours).numpy()
    assert_bits(decoded, reference.dequantize_mxfp4(theirs))


@given(rows(16))
def test_nvfp4_agrees_in_every_byte(W):
    ours = microscaling.quantize_nvfp4(torch.from_numpy(W))
    theirs = reference.quantize_nvfp4(W)
    for name in ("packed", "scales", "tensor_scale"):
        assert_bits(getattr(ours, name).numpy(), np.asarray(getattr(theirs, name)))
    decoded = microscaling.dequantize_nvfp4(ours).numpy()
    assert_bits(decoded, reference.dequantize_nvfp4(theirs))


def test_the_scales_are_those_of_torchs_dtypes():
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert_bits(e4m3.numpy(), reference.E4M3)
    powers = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert_bits(powers.numpy(), np.ldexp(np.float32(1), np.arange(255) - 127))


@pytest.mark.parametrize(
    "spoil",
    [
        {"scales": torch.full((2, 1), 255, dtype=torch.uint8)},
        {"scales": torch.zeros(2, 2, dtype=torch.uint8)},
        {"packed": torch.zeros(2, 8, dtype=torch.uint8)},
    ],
    ids=["NaN", "a scale too many", "half a block"],
)
def test_parts_that_do_not_belong_together_are_refused(spoil):
    q = microscaling.quantize_mxfp4(torch.ones(2, 32))
    with pytest.raises(InputError):
        microscaling.dequantize_mxfp4(microscaling.MXFP4(**{**vars(q), **spoil}))
