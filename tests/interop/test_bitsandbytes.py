"""A state dict of bitsandbytes is read and written again byte for byte."""

import json

import numpy as np
import pytest
import torch

from minipeft.errors import InputError
from minipeft.interop import bitsandbytes_format
from minipeft.interop.audit import same
from minipeft.interop.bitsandbytes_format import FourBitTensors, decode, read, write
from minipeft.torch import blockwise, double_quant
from minipeft.torch.codebook import FP4, NF4
from tests.interop.folders import InMemory

NAME = "model.layers.0.mlp.up_proj.weight"


def theirs(nested, kind, dtype, shape=(24, 64)):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    draw = torch.Generator().manual_seed(1)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False)
    weight = torch.randn(shape, generator=draw).to(dtype)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type=kind
    )
    layer.to("cpu")
    state = {
        f"model.layers.0.mlp.up_proj.{k}": v for k, v in layer.state_dict().items()
    }
    plain = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return state, plain


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_their_bytes_come_back(nested, kind, dtype):
    state, plain = theirs(nested, kind, dtype)
    q, found = read(NAME, InMemory(state))
    assert found == dtype
    assert same(decode(q, dtype), plain)
    ours = write(NAME, q, dtype)
    assert ours.keys() == state.keys()
    for name in state:
        assert same(ours[name].contiguous(), state[name].contiguous()), name


@pytest.mark.parametrize("nested", [False, True])
def test_what_we_write_they_decode_alike(nested):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    q = (double_quant if nested else blockwise).quantize(W, NF4)
    state = write(NAME, q, torch.float32)
    prefix = f"{NAME}."
    parts = {n.removeprefix(prefix): t for n, t in state.items() if n != NAME}
    weight = bnb.nn.Params4bit.from_prequantized(state[NAME], parts, device="cpu")
    plain = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert same(plain, decode(q, torch.float32))


def test_a_checkpoint_reads_as_if_it_were_plain():
    W = torch.randn(24, 64)
    q = double_quant.quantize(W, FP4)
    state = write(NAME, q, torch.bfloat16) | {"model.norm.weight": torch.ones(3)}
    tensors = FourBitTensors(InMemory(state))
    assert tensors.about.keys() == {NAME, "model.norm.weight"}
    assert tensors.about[NAME].dtype == torch.bfloat16
    assert same(tensors.read(NAME), decode(q, torch.bfloat16))
    assert b"".join(tensors.pieces("model.norm.weight")) == np.ones(3, "f4").tobytes()


def state_text(state, text):
    key = next(k for k in state if bitsandbytes_format.STATE in k)
    return {
        **state,
        key: torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()),
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: {k: v for k, v in s.items() if "quant_map" not in k},
            "no quant_map",
        ),
        (lambda s: {**s, f"{NAME}.absmax": torch.ones(3)}, "has 3 scales, not 24"),
        (lambda s: {**s, NAME: s[NAME][:-1]}, "has 767 codes, not 768"),
        (lambda s: state_text(s, "{"), "is damaged"),
        (lambda s: state_text(s, json.dumps({"blocksize": -1})), "is damaged"),
    ],
)
def test_damage_is_one_sentence(change, sentence):
    state = write(NAME, blockwise.quantize(torch.randn(24, 64)), torch.float32)
    with pytest.raises(InputError, match=sentence):
        read(NAME, InMemory(change(state)))


def test_another_codebook_is_refused():
    q = blockwise.quantize(torch.randn(4, 4), NF4 * 0.5)
    with pytest.raises(InputError, match="does not know; use NF4"):
        write(NAME, q, torch.float32)
