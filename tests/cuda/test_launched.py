"""Plain eager code on a GPU launches kernels without torch's dispatcher.

The launches run here on the CPU build of the kernels.
"""

import pytest
import torch

from minipeft.errors import InputError
from minipeft.kernels import driver
from minipeft.torch import blockwise, double_quant, launches, operators, qlora
from tests.cuda.test_operators import Noting, base, same_bits, whole
from tests.cuda.toolchain import needs_cpu_build


@needs_cpu_build
@pytest.mark.parametrize("nested", [None, 64])
@pytest.mark.parametrize("rows", [2, 9])
def test_plain_eager_code_launches_without_the_dispatcher(monkeypatch, nested, rows):
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    (packed, absmax, codebook), _ = base(24, 64)
    q = blockwise.Blockwise(packed, absmax, codebook, 32, (24, 64))
    layer = qlora.QuantizedLinear(double_quant.nest(q, nested) if nested else q)
    x = whole(rows, 64, dtype=torch.float32).requires_grad_()
    for name in ("matmul_4bit", "dequantize", "dequantize_nested"):
        monkeypatch.setattr(operators, name, None)
    grad = whole(rows, 24, dtype=torch.float32, seed=3)
    with driver.use(Noting()) as launcher:
        y = layer(x)
        (got,) = torch.autograd.grad(y, x, grad)
    monkeypatch.setattr(launches, "GPUS", {"cuda"})
    W = layer.dequantize(torch.float32)
    same_bits(y.detach(), x.detach() @ W.T)
    same_bits(got, grad @ W)
    end = "_nested" if nested else ""
    few = f"product{end}" if rows <= launches.FEW else f"dequantize{end}"
    assert launcher.names == [few, f"dequantize{end}"]


def test_parts_that_were_exchanged_are_checked_again(monkeypatch):
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    layer = qlora.QuantizedLinear.from_linear(torch.nn.Linear(64, 24))
    known = operators._ready(layer, torch.float32)
    assert operators._ready(layer, torch.bfloat16) is known
    assert operators._ready(layer, torch.float64) is None
    layer.packed = layer.packed[:-16].clone()
    with pytest.raises(InputError, match="packed has 752 values where"):
        operators._ready(layer, torch.float32)
    layer.packed = known.weight[0]
    assert operators._ready(layer, torch.float32)
    assert layer.bfloat16().ready is None, "it would keep memory of another device"
