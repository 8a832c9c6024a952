"""Global states of torch during a call do not change what the torch column computes."""

import pytest
import torch

from minipeft.torch import blockwise, codebook, double_quant
from tests.properties.ambient import STATES

under_every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES)


def assert_equal(found, expected):
    """Check that dataclasses or tensors are equal in every bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.device == expected.device
        assert torch.equal(found, expected)
    elif hasattr(expected, "__dataclass_fields__"):
        for name, value in vars(expected).items():
            assert_equal(getattr(found, name), value)
    else:
        assert found == expected


def weights():
    """Return normal blocks, zero blocks, and blocks with subnormal scales."""
    torch.manual_seed(0)
    return torch.randn(8, 40) * 10.0 ** -torch.arange(0, 48, 6.0)[:, None].clamp(max=44)


@under_every_state
@pytest.mark.parametrize("values", ["NF4", "FP4", "NF3", "NF2", "dynamic"])
def test_codecs(state, values):
    W = weights()
    codes = codebook.dynamic_map() if values == "dynamic" else getattr(codebook, values)
    q = blockwise.quantize(W, codes, 8)
    nested = double_quant.quantize(W, codes, 4, 8)
    back = blockwise.dequantize(q), double_quant.dequantize(nested, torch.bfloat16)
    with state():
        assert_equal(blockwise.quantize(W, codes, 8), q)
        assert_equal(double_quant.quantize(W, codes, 4, 8), nested)
        assert_equal(blockwise.dequantize(q, torch.float32), back[0])
        assert_equal(double_quant.dequantize(nested, torch.bfloat16), back[1])


@under_every_state
def test_tables(state):
    expected = [codebook.dynamic_map(False), codebook.normal_float(5)]
    codebook.dynamic_map_on.cache_clear()
    with state():
        found = [codebook.dynamic_map(False), codebook.normal_float(5)]
        cached = codebook.dynamic_map_on(torch.device("cpu"))
    assert_equal(found[0], expected[0])
    assert_equal(found[1], expected[1])
    assert_equal(cached, codebook.dynamic_map())
    assert not cached.is_inference()  # otherwise no later gradient could use it
