"""Plain eager code on a GPU launches kernels without torch's dispatcher.

The launches run here on the CPU build of the kernels.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft.errors import InputError
from minipeft.kernels import driver
from minipeft.torch import (
    blockwise,
    dora,
    double_quant,
    launches,
    lora,
    operators,
    qlora,
    sharding,
)
from minipeft.torch.inject import inject
from tests.cuda.test_operators import Noting, base, drawn, same_bits, whole
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


@needs_cpu_build
@pytest.mark.parametrize("rows", [2, 9])
def test_a_shard_is_read_anew_by_each_pass(monkeypatch, rows):
    """FSDP frees its bytes after forward, and gathers them elsewhere for backward."""
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    plain = qlora.QuantizedLinear.from_linear(torch.nn.Linear(64, 24, bias=False))
    layer = sharding.ByteLinear(plain.q)
    for name in ("matmul_4bit", "dequantize"):
        launch = operators.LAUNCHES[f"minipeft::{name}"]
        monkeypatch.setattr(operators, name, launch)
    x = whole(rows, 64, dtype=torch.float32)
    with driver.use(Noting()) as launcher:
        same_bits(layer(x), plain(x))
    assert len(launcher.names) == 2
    assert layer.ready is None


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


def adapted(monkeypatch, W: torch.Tensor, r: int = 2) -> lora.LoRA:
    """Pretend that this CPU is a GPU; return an adapter of W in float32."""
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    rows, columns = W.shape
    return lora.LoRA(drawn(r, columns), drawn(rows, r), 0.5)


@needs_cpu_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_eager_code_launches_the_norm_without_the_dispatcher(monkeypatch, dtype):
    W = drawn(24, 64).to(dtype)
    adapter = adapted(monkeypatch, W)
    with driver.use(Noting()) as launcher:
        launch = operators.LAUNCHES["minipeft::dora_row_norm"]
        A, B = adapter.A.detach(), adapter.B.detach()
        expected = launch(W, A, B, 0.5)
        monkeypatch.setattr(operators, "dora_row_norm", None)
        norm = dora.row_norm(W, adapter)
        same_bits(norm, expected)
        assert not norm.requires_grad
        with torch.no_grad():  # a step of an optimizer: same place, other values
            adapter.B.mul_(2)
        assert not torch.equal(dora.row_norm(W, adapter), expected)
        same_bits(dora.row_norm(W, adapter), launch(W, A, B, 0.5))
    end = "" if dtype == torch.float32 else "_mixed"
    assert launcher.names == [f"row_norm{end}"] * 5


@needs_cpu_build
def test_a_norm_checks_its_operands_once_and_others_again(monkeypatch):
    W = drawn(24, 64)
    adapter = adapted(monkeypatch, W)
    checked = []
    check = launches.checks.check_low_rank
    monkeypatch.setattr(
        launches.checks, "check_low_rank", lambda *of: checked.append(of) or check(*of)
    )
    launches._of_norm.cache_clear()
    with driver.use(Noting()):
        for _ in range(3):
            dora.row_norm(W, adapter)
        assert len(checked) == 1
        dora.row_norm(W.clone(), adapter)
        assert len(checked) == 2
        dora.row_norm(W[:, :32].contiguous(), adapter_of_columns(adapter, 32))
        assert len(checked) == 3
        launch = operators.LAUNCHES["minipeft::dora_row_norm"]
        monkeypatch.setattr(operators, "dora_row_norm", launch)
        for wrong in (W[:8], W.T):  # each lies where W lies
            with pytest.raises(InputError):
                dora.row_norm(wrong, adapter)
        before = len(checked)
        dora.row_norm(W, adapter)
    assert len(checked) == before


def adapter_of_columns(adapter: lora.LoRA, n: int) -> lora.LoRA:
    return lora.LoRA(adapter.A.detach()[:, :n].contiguous(), adapter.B.detach(), 0.5)


class Recording(TorchDispatchMode):
    """Notes the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@needs_cpu_build
def test_what_records_operations_sees_the_operator_of_the_norm(monkeypatch):
    W = drawn(24, 64)
    adapter = adapted(monkeypatch, W)
    called = []
    launch = operators.LAUNCHES["minipeft::dora_row_norm"]
    monkeypatch.setattr(
        operators, "dora_row_norm", lambda *of: called.append(of) or launch(*of)
    )

    with driver.use(Noting()):
        dora.row_norm(W, adapter)
        assert not called
        with Recording() as recorded:
            dora.row_norm(W, adapter)
        assert recorded.names
        with torch.autograd.forward_ad.dual_level():
            dora.row_norm(W, adapter)
    assert len(called) == 2


@needs_cpu_build
def test_a_step_of_dora_takes_fewer_operations_than_in_peft(monkeypatch):
    """The host needs a time for each, and for one layer it is slower than the GPU."""
    adapted(monkeypatch, drawn(24, 64))
    launch = operators.LAUNCHES["minipeft::dora_row_norm"]
    monkeypatch.setattr(operators, "dora_row_norm", launch)
    monkeypatch.setattr(dora, "_looks", lambda values: False)
    layer = torch.nn.Linear(64, 24).bfloat16()
    x = drawn(9, 64).bfloat16()
    with driver.use(Noting()):
        model = inject(torch.nn.Sequential(layer), dora.DoRAConfig(2, 4), ["*"])
        with Recording() as recorded:
            model(x).float().square().mean().backward()
    in_peft = 62  # of version 0.21.2, counted in the same way
    assert len(recorded.names) < in_peft, recorded.names


@needs_cpu_build
def test_a_negative_view_is_read_as_its_values(monkeypatch):
    W = drawn(24, 64)
    adapter = adapted(monkeypatch, W)
    launch = operators.LAUNCHES["minipeft::dora_row_norm"]
    monkeypatch.setattr(
        operators, "dora_row_norm", lambda W, *rest: launch(W.resolve_neg(), *rest)
    )
    with driver.use(Noting()):
        norm = dora.row_norm(torch._neg_view(W), adapter)
        same_bits(norm, dora.row_norm(-W, adapter))
        assert not torch.equal(norm, dora.row_norm(W, adapter))


@needs_cpu_build
def test_memory_that_was_freed_is_not_read(monkeypatch):
    W = drawn(24, 64)
    adapter = adapted(monkeypatch, W)
    launch = operators.LAUNCHES["minipeft::dora_row_norm"]
    monkeypatch.setattr(operators, "dora_row_norm", launch)
    with driver.use(Noting()):
        dora.row_norm(W, adapter)
        W.untyped_storage().resize_(0)
        with pytest.raises(InputError, match="W has no memory: it was freed"):
            dora.row_norm(W, adapter)
