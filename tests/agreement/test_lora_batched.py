"""Mixed batches in the torch column agree with the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.errors import InputError
from minipeft.reference import lora
from minipeft.reference import lora_batched as reference
from minipeft.torch import lora_batched
from minipeft.torch.linear import frozen
from minipeft.torch.lora import LoRA
from tests.agreement.on_torch import numpy, tensor
from tests.strategies import integers
from tests.tolerance import assert_bits, assert_sums

SIZES = st.integers(1, 4)


@given(data=st.data())
def test_a_batch_is_that_of_the_reference_and_a_loop(data):
    n, r, columns, rows, requests = (data.draw(SIZES) for _ in range(5))
    shapes = {"W": (rows, columns), "A": (n, r, columns), "B": (n, rows, r)}
    W, A, B = (data.draw(integers(shape)) for shape in shapes.values())
    x, bias = data.draw(integers((requests, 2, columns))), data.draw(integers((rows,)))
    scaling = np.resize(np.array([2, 0.5, -4], np.float32), n)
    choices = st.lists(st.integers(-1, n - 1), min_size=requests, max_size=requests)
    indices = np.array(data.draw(choices), np.int32)
    y = reference.forward(x, W, reference.Adapters(A, B, scaling), indices, bias)
    base = frozen(tensor(W), tensor(bias))
    stacked = lora_batched.Adapters(tensor(A), tensor(B), tensor(scaling))
    found = lora_batched.forward(tensor(x), base(tensor(x)), stacked, tensor(indices))
    assert_sums(numpy(found), y)
    for i, row in zip(indices, range(requests), strict=True):
        own = lora.LoRA(A[i], B[i], float(scaling[i]))
        nobody = lora.LoRA(A[i], 0 * B[i], 2.0)
        alone = lora.forward(x[row], W, own if i >= 0 else nobody, bias)
        assert_sums(y[row], alone)


def test_an_adapter_that_there_is_not_is_refused_in_both():
    W, A, B = np.ones((4, 5)), np.ones((2, 3, 5)), np.ones((2, 4, 3))
    pair = reference.Adapters(A, B, np.ones(2))
    for wrong in (2, -2):
        with pytest.raises(
            InputError, match=rf"adapter {wrong} is asked for; choose 0"
        ):
            reference.forward(np.ones((1, 5)), W, pair, np.array([wrong]))
    pool = lora_batched.Pool(nn.Sequential(nn.Linear(5, 4)), ["0"])
    pool.add("0", {"0": LoRA(torch.ones(3, 5), torch.ones(4, 3), 2.0)})
    with pytest.raises(InputError, match="there is no adapter '2'"), pool.serve(["2"]):
        pass


def test_rows_without_an_adapter_have_the_bits_of_the_base():
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((3, 5)), rng.standard_normal((4, 5))
    pair = reference.Adapters(np.ones((1, 2, 5)), np.ones((1, 4, 2)), np.ones(1))
    y = reference.forward(x, W, pair, np.array([-1, 0, -1]))
    assert_bits(y[::2], (x @ W.T)[::2])
