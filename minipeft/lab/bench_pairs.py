"""The pairs of `make bench`: each one is built, checked, and then timed."""

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import bitsandbytes.functional as bnb
import peft
import torch
from torch import Tensor, nn

from minipeft.lab.memory_peak import peak_bytes
from minipeft.lab.timing import Pair, check
from minipeft.torch import blockwise, loftq, pissa
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import adapted, inject
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.vera import VeRAConfig

WIDTH, DEPTH, BATCH, RANK, ALPHA = 1024, 4, 256, 16, 32
UNIT_ROUNDOFF = 2.0**-24
# A relative distance of sums of WIDTH + RANK products through DEPTH layers.
ROUNDING = DEPTH * (WIDTH + RANK + 4) * UNIT_ROUNDOFF


def stack() -> nn.Sequential:
    """Return the stack of linears that every step runs on."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


def step(model: nn.Module) -> Callable[[], Tensor]:
    """Return one forward and backward pass over a fixed batch."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))

    def turn() -> Tensor:
        model.zero_grad(set_to_none=True)
        y = cast(Tensor, model(x))
        torch.autograd.backward(y.square().mean())
        return y.detach()

    return turn


def steps(config: Any, theirs: Any, copied: dict[str, str], target: float) -> Pair:
    """Build our step and peft's on the same weights, and check that they agree.

    Args:
        config: ours.
        theirs: peft's.
        copied: our adapter's parameters and peft's names for them.
        target: the ratio to reach.
    """
    base = stack()
    ours = inject(copy.deepcopy(base), config, ["*"])
    model = peft.get_peft_model(cast(Any, copy.deepcopy(base)), theirs)
    generator = torch.Generator().manual_seed(2)
    named = dict(model.named_parameters())
    for name, layer in adapted(ours).items():
        adapter = layer.adapters["default"]
        for own, other in copied.items():
            value = cast(Tensor, getattr(adapter, own))
            drawn = torch.randn(value.shape, generator=generator) * 0.02
            value.data.copy_(drawn if own != "magnitude" else value + drawn)
            named[f"base_model.model.{name}.{other}"].data.copy_(value.data)
    mine, yours = step(ours), step(model)
    y, z = mine(), yours()
    check(type(config).__name__, float((y - z).norm() / z.norm()), ROUNDING)
    kind = type(config).__name__.removesuffix("Config")
    return Pair(f"{kind} step", "peft", mine, yours, target)


def lora() -> Pair:
    """LoRA, forward and backward."""
    theirs = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=r"\d+")
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
    return steps(LoRAConfig(RANK, ALPHA), theirs, names, 1.0)


def dora() -> Pair:
    """DoRA, forward and backward."""
    theirs = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=r"\d+", use_dora=True
    )
    names = {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    }
    return steps(DoRAConfig(RANK, ALPHA), theirs, names, 0.7)


def vera() -> Pair:
    """VeRA of rank 256, forward and backward; the projections come from one seed."""
    theirs = peft.VeraConfig(r=256, target_modules=r"\d+", projection_prng_key=0)
    names = {"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"}
    return steps(VeRAConfig(256, seed=0), theirs, names, 1.0)


def dora_over_lora() -> Pair:
    """Our DoRA against our LoRA: what the norm costs."""
    ours, theirs = (
        inject(stack(), config, ["*"])
        for config in (DoRAConfig(RANK, ALPHA), LoRAConfig(RANK, ALPHA))
    )
    peaks = [peak_bytes(step(model)) for model in (ours, theirs)]
    note = f"peak memory of a step {peaks[0] / peaks[1]:.3f} times LoRA's"
    return Pair("DoRA step", "our LoRA", step(ours), step(theirs), 1.3, note)


def weights(rows: int = 4096) -> Tensor:
    """Return normal weights of a large square layer."""
    return torch.randn(rows, rows, generator=torch.Generator().manual_seed(3)) * 0.02


def _compiled(function: Callable[..., Any], *given: Any) -> tuple[Any, str]:
    began = time.perf_counter()
    compiled = torch.compile(function, fullgraph=True)
    compiled(*given)
    return compiled, f"compiled in {time.perf_counter() - began:.1f} s"


def quantize() -> Pair:
    """NF4 of 4096 x 4096 float32, blocks of 64."""
    W = weights()
    packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    compiled, note = _compiled(blockwise.quantize, W)
    q = compiled(W)
    check("NF4 codes", float((q.packed != packed.view(-1)).any()), 0)
    check("NF4 scales", float((q.absmax != state.absmax).any()), 0)

    def theirs() -> object:
        return bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")

    return Pair("NF4 quantize", "bitsandbytes", lambda: compiled(W), theirs, 0.2, note)


def dequantize() -> Pair:
    """Dequantize, against bitsandbytes' native kernel."""
    W = weights()
    packed, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    q = blockwise.quantize(W)
    compiled, note = _compiled(blockwise.dequantize, q)
    same = torch.equal(compiled(q), bnb.dequantize_4bit(packed, state))
    check("NF4 values", float(not same), 0)

    def theirs() -> object:
        return bnb.dequantize_4bit(packed, state)

    name = "NF4 dequantize"
    return Pair(name, "bitsandbytes", lambda: compiled(q), theirs, 1.2, note)


def spectrum(size: int = 1024) -> Tensor:
    """Return a weight whose singular values fall like those of trained layers."""
    generator = torch.Generator().manual_seed(4)
    U, V = (
        torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        for _ in range(2)
    )
    return (U * torch.arange(1.0, size + 1).rsqrt()) @ V


def randomized_svd() -> Pair:
    """PiSSA's randomized start against peft's `pissa_niter_4`; lower error wanted."""
    W, r = spectrum(), RANK

    def ours() -> Tensor:
        return pissa.init_randomized(W, r, r)[0]

    def theirs() -> Tensor:
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, r, niter=4)
        root = S.sqrt()
        return W - (U * root) @ (V * root).T

    errors = [float(f().norm()) for f in (ours, theirs)]
    check("PiSSA's error over peft's", max(0.0, errors[0] / errors[1] - 1), 0)
    best = float(torch.linalg.svdvals(W)[r:].norm())
    excess = [f"{100 * (e / best - 1):.4f} %" for e in errors]
    note = f"error above the best: {excess[0]}, theirs {excess[1]}"
    return Pair("PiSSA start", "peft, niter 4", ours, theirs, 1.2, note)


def loftq_start() -> Pair:
    """LoftQ of five steps against peft's sequence: NF4 by bitsandbytes and a full SVD.

    peft's own function refuses a CPU; this is its loop, on the same two libraries.
    """
    W, r = weights(1024), RANK

    def ours() -> float:
        q, adapter = loftq.init(W, r, r, steps=5)
        return float(loftq.error(W, q, adapter))

    def theirs() -> float:
        update = torch.zeros_like(W)
        for _ in range(5):
            packed, state = bnb.quantize_4bit(W - update, quant_type="nf4")
            base = bnb.dequantize_4bit(packed, state)
            U, S, V = torch.linalg.svd(W - base, full_matrices=False)
            update = (U[:, :r] * S[:r]) @ V[:r]
        return float((W - base - update).norm())

    errors = ours(), theirs()
    note = f"error {errors[0]:.4f}, theirs {errors[1]:.4f}"
    return Pair("LoftQ, 5 steps", "peft's loop", ours, theirs, 0.5, note)


PAIRS: dict[str, Callable[[], Pair]] = {
    "lora": lora,
    "dora": dora,
    "dora-over-lora": dora_over_lora,
    "vera": vera,
    "nf4-quantize": quantize,
    "nf4-dequantize": dequantize,
    "pissa": randomized_svd,
    "loftq": loftq_start,
}
