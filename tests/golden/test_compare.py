"""The hex encoding and the three rules of comparison, at their limits."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from minipeft.errors import InputError
from minipeft.golden.compare import difference, gamma
from minipeft.golden.tensors import Tensor
from tests import tolerance

F32 = np.float32


def tensor(*values, dtype=F32):
    return Tensor.from_array(np.array(values, dtype))


def test_bits_survive():
    values = np.array([-0.0, np.nan, np.inf, 1e-45, 1.5], F32)
    assert Tensor.from_array(values).data == values.tobytes()
    assert Tensor.from_json(
        Tensor.from_array(values).to_json()
    ).to_array().tobytes() == (values.tobytes())


def test_data_is_little_endian_and_in_c_order():
    big = np.array([[1, 2], [3, 4]], ">u2").T
    with pytest.raises(InputError, match="choose one of"):
        Tensor.from_json(Tensor.from_array(big).to_json())
    fortran = np.asfortranarray(np.array([[1, 2], [3, 4]], ">f4"))
    assert Tensor.from_array(fortran).data == np.array([1, 2, 3, 4], "<f4").tobytes()


def test_bfloat16_has_numbers_without_its_package():
    values = np.array([1.5, -0.0, 3e38, 1e-40], bfloat16)
    found = Tensor.from_array(values).numbers()
    assert np.array_equal(found, values.astype(np.float64))


def test_a_scalar_keeps_its_shape():
    assert Tensor.from_array(F32(3)).shape == ()
    assert Tensor.from_array(F32(3)).to_array().shape == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"dtype": "float32", "shape": [1]}, "is no tensor"),
        (
            {"dtype": "float32", "shape": [1], "data": "00"},
            "has 4 bytes, but data holds 1",
        ),
        ({"dtype": "float32", "shape": [1], "data": "0g"}, "two hexadecimal digits"),
        ({"dtype": "float32", "shape": [1], "data": 7}, "two hexadecimal digits"),
        ({"dtype": "float32", "shape": [-1], "data": ""}, "give a list of sizes"),
        ({"dtype": "float32", "shape": 1, "data": ""}, "give a list of sizes"),
        ({"dtype": "float31", "shape": [0], "data": ""}, "choose one of uint8"),
        ({"dtype": ["x"], "shape": [0], "data": ""}, "choose one of uint8"),
    ],
)
def test_a_damaged_tensor_is_refused(value, said):
    with pytest.raises(InputError, match=said):
        Tensor.from_json(value)


def test_bitwise_sees_the_sign_of_zero_and_the_payload_of_nan():
    assert difference("bitwise", tensor(0.0), tensor(-0.0))
    nan = Tensor("float32", (1,), bytes.fromhex("0100c07f"))
    assert difference("bitwise", tensor(np.nan), nan)
    assert difference("bitwise", nan, nan) is None


def test_the_first_difference_is_named():
    got, expected = tensor(1, 2, 4), tensor(1, 3, 5)
    assert difference("bitwise", got, expected) == (
        "[1] is 2 (0x40000000), expected 3 (0x40400000); 2 of 3 values fail bitwise"
    )


@pytest.mark.parametrize("rule", ["bitwise", "ulp:9", "gamma:9"])
def test_dtype_and_shape_are_always_compared(rule):
    one = tensor(1.0)
    assert "is float64" in str(difference(rule, tensor(1.0, dtype=float), one, one))
    assert "shape [1, 1]" in str(difference(rule, tensor([1.0]), one, one))


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64])
def test_ulp_counts_steps_across_zero(dtype):
    smallest = np.nextafter(np.array(0, dtype), np.array(1, dtype))
    below, above = tensor(-smallest, dtype=dtype), tensor(smallest, dtype=dtype)
    assert difference("ulp:2", below, above) is None
    assert difference("ulp:1", below, above)
    zeros = tensor(0.0, dtype=dtype), tensor(-0.0, dtype=dtype)
    assert difference("ulp:1", *zeros) is None


def test_ulp_knows_nan_and_infinity():
    nan, largest = tensor(np.nan), tensor(np.finfo(F32).max)
    assert difference("ulp:1", nan, nan) is None
    assert difference("ulp:1", nan, largest)
    assert difference("ulp:1", largest, nan)
    assert difference("ulp:1", tensor(np.inf), largest) is None  # the next number


def test_gamma_is_the_bound_and_no_more():
    expected, magnitude = tensor(1.0), tensor(4.0)
    bound = gamma(800, "float32") * 4
    inside, outside = F32(1 + 0.99 * bound), F32(1 + 1.01 * bound)
    assert difference("gamma:800", tensor(inside), expected, magnitude) is None
    assert difference("gamma:800", tensor(outside), expected, magnitude)
    assert difference("gamma:800", tensor(np.nan), expected, magnitude)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gamma_is_that_of_the_other_tests(dtype):
    assert gamma(100, dtype) == tolerance.gamma(100, dtype)


@pytest.mark.parametrize("rule", ["close", "atol:1", "gamma:3"])
def test_an_unknown_rule_is_an_error(rule):
    with pytest.raises(InputError, match="compare rule"):
        difference(rule, tensor(1.0), tensor(1.0))
