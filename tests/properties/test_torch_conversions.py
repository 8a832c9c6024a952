"""Models that are cast, quantized, merged and put back: dtypes, layers, files."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.errors import InputError
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import (
    adapted,
    inject,
    merge,
    trainable_parameters,
    unload,
)
from minipeft.torch.qlora import QuantizedLinear, quantize_linears
from tests.agreement.on_torch import CONFIGS
from tests.properties.test_torch_programs import (
    ROWS,
    SPLIT,
    Model,
    each_row,
    plain,
    same_up_to_float64,
    start,
    trained,
)

X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.mark.parametrize("row", SPLIT)
def test_a_weight_without_memory_is_not_taken_apart(row):
    with torch.device("meta"):
        model = Model()
    with pytest.raises(
        InputError, match=r"^0: W is on the device meta, and has no val"
    ):
        start(model, row)
    assert not adapted(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_row
def test_a_model_of_another_dtype_trains_and_so_does_one_that_was_cast(row, dtype):
    model = trained(start(plain(row).to(dtype), row))
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in trainable_parameters(model)} == {wide}
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    for cast in (dtype, torch.float32):
        y = model(x.to(model[0].weight.dtype))
        y.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in trainable_parameters(model))
        torch.optim.SGD(trainable_parameters(model), 1e-3).step()
        model.zero_grad()
        model.to(cast)


def square():
    """Return Conv1D and Linear layers that are square: a transpose would fit them."""
    torch.manual_seed(0)
    layers = (Conv1D(8, 8), nn.Tanh(), Conv1D(8, 8), nn.Linear(8, 8))
    return nn.Sequential(*layers).eval().double()


ON_FOUR_BITS = CONFIGS | {"ia3": IA3Config(["2"]), "pissa": ROWS["pissa"]}


@pytest.mark.parametrize("row", [*ON_FOUR_BITS, "loftq"])
def test_what_is_merged_after_four_bits_is_a_file_of_the_model_it_was(row):
    """Weights of a Conv1D are transposed; a square one would be loaded in silence."""
    model = square()
    if row != "loftq":
        quantize_linears(model, blocksize=8)
    config = ROWS[row] if row == "loftq" else ON_FOUR_BITS[row]
    merge(trained(inject(model, config, ["0", "2", "3"])))
    x = X.double()
    y, drawn = model(x), torch.get_rng_state()
    for twin in (copy.deepcopy(model), model):
        back = unload(twin)
        assert torch.equal(torch.get_rng_state(), drawn)
        kinds = [Conv1D, nn.Tanh, Conv1D, nn.Linear]
        assert [type(layer) for layer in back] == kinds
        with torch.random.fork_rng():
            again = square()
        again.load_state_dict(back.state_dict())
        assert torch.equal(again(x), back(x))
        same_up_to_float64(again(x), y)  # a Conv1D adds in another order


def test_a_single_conv1d_in_four_bits_remembers_its_kind_and_mode():
    conv1d, called = Conv1D(8, 8).eval(), []
    conv1d.register_forward_hook(lambda *_: called.append(1))
    layer = QuantizedLinear.from_linear(conv1d)
    assert not layer.training
    layer(X)
    assert called == [1]
    back = unload(merge(inject(nn.Sequential(layer), ROWS["lora"], ["0"])))[0]
    assert type(back) is Conv1D
    back(X)
    assert called == [1, 1]
