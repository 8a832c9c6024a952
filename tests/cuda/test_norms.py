"""DoRA's norms under torch: the operator, and what the layer makes of it."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from minipeft.cupy import dora as cupy_dora
from minipeft.kernels import driver
from minipeft.torch import dora, launches, lora, operators
from tests.cuda.test_operators import (
    DTYPES,
    Noting,
    drawn,
    on_kernels,
    same_bits,
    whole,
)
from tests.cuda.toolchain import needs_cpu_build
from tests.tolerance import gamma


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(11, 264, 4), (9, 77, 3)])
def test_norms_of_whole_numbers_have_the_same_bits(dtype, sizes):
    rows, columns, r = sizes
    parts = [
        whole(*shape, dtype=dtype, seed=i)
        for i, shape in enumerate([(rows, columns), (r, columns), (rows, r)])
    ]
    for W, A, B in (parts, [parts[0], *(part.float() for part in parts[1:])]):
        same_bits(
            on_kernels("dora_row_norm", W, A, B, 0.5),
            operators.dora_row_norm(W, A, B, 0.5),
        )


def mixed() -> tuple:
    """Return operands of DoRA's norm in training: W of 16 bits, A and B of 32."""
    factors = (drawn(2, 64).requires_grad_(), drawn(8, 2).requires_grad_())
    return (drawn(8, 64, dtype=torch.bfloat16), *factors, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_opcheck_of_two_dtypes():
    opcheck(operators.dora_row_norm, mixed())


def test_autocast_rounds_no_norm_of_the_operator():
    """A kernel does not see it; the code for other devices must not either."""
    operands = mixed()
    norm = operators.dora_row_norm(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        same_bits(operators.dora_row_norm(*operands), norm)


def test_a_norm_is_a_constant():
    W, A, B = drawn(8, 64), drawn(2, 64).requires_grad_(), drawn(8, 2)
    norm = operators.dora_row_norm(W, A, B, 0.5)
    (got,) = torch.autograd.grad(norm.sum(), A, allow_unused=True)
    assert got is None


def adapted(monkeypatch) -> tuple[Tensor, lora.LoRA]:
    """Pretend that this CPU is a GPU; return a weight and an adapter as in training."""
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    W, A, B, scaling = mixed()
    return W, lora.LoRA(A.detach(), B.detach(), scaling)


LIMIT = (2 - 2**-8) * 2.0**127
"""The smallest number that bfloat16 rounds to infinity, a float32 number."""


@needs_cpu_build
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("factor", [0, 1])
def test_factors_of_32_bits_are_split_below_the_limit_that_is_stated(factor, sign):
    """From there on the largest part is infinite, and the rest of it NaN."""
    for module in (operators, cupy_dora):
        assert f"{LIMIT:.3e} ".replace("e+", "e") in inspect.getsource(module)
    W, factors = torch.zeros(8, 64, dtype=torch.float16), [torch.zeros(2, 64)]
    factors.append(torch.zeros(8, 2))
    large, small = factors[factor], factors[1 - factor]
    below = torch.tensor(LIMIT).nextafter(torch.tensor(0.0))
    large[0, 0], small[0, 0] = sign * below, 2.0**-100
    found = on_kernels("dora_row_norm", W, *factors, 1.0)
    assert found[0] == below * 2.0**-100  # to the last bit: the three parts are exact
    large[0, 0] = sign * LIMIT
    assert on_kernels("dora_row_norm", W, *factors, 1.0)[0].isnan()
    assert operators.dora_row_norm(W, *factors, 1.0)[0] == LIMIT * 2.0**-100


@needs_cpu_build
def test_the_norm_in_training_is_the_kernels_and_within_its_roundings(monkeypatch):
    W, adapter = adapted(monkeypatch)
    launch = operators.LAUNCHES["minipeft::dora_row_norm"]
    monkeypatch.setattr(operators, "dora_row_norm", launch)
    with driver.use(Noting()) as launcher:
        norm = dora.row_norm(W, adapter)
        with torch.autocast("cpu", torch.bfloat16):
            same_bits(dora.row_norm(W, adapter), norm)
    assert launcher.names == ["row_norm_mixed"] * 2
    assert not norm.requires_grad
    A, B = adapter.A.detach().double(), adapter.B.detach().double()
    exact = (W.double() + 0.5 * B @ A).norm(dim=1)
    # As in product_cases.dora_agrees: 2 ranks, 64 columns.
    n = 2 * (7 * 2 + 2) + 3
    moved = gamma(n) * (W.double().abs() + 0.5 * B.abs() @ A.abs()).norm(dim=1)
    assert ((norm - exact).abs() <= moved + gamma(66) * (exact + moved)).all()


def test_under_vmap_the_norm_is_torchs_own_operations(monkeypatch):
    """Of the operator, torch would run one adapter after another."""
    W, adapter = adapted(monkeypatch)
    monkeypatch.setattr(operators, "dora_row_norm", None)
    parameters = {k: torch.stack([p, 2 * p]) for k, p in adapter.named_parameters()}
    adapter.forward = lambda: dora.row_norm(W, adapter)
    run = torch.func.functional_call
    found = torch.func.vmap(lambda one: run(adapter, one, ()))(parameters)
    assert found.shape == (2, 8)
    assert found.isfinite().all()
