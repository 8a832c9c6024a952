"""The pairs of `make bench` on a real model: training steps, and NF4 in a layer.

SmolLM2-135M, two sequences of 64 tokens, adapters of rank 8 on every linear layer but
the output layer; theirs are peft's adapters, on bitsandbytes' layers where the base has
four bits. All is eager: nothing is compiled.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import peft
import torch
from torch import Tensor

from minipeft.lab import models
from minipeft.lab.memory_peak import held, peak_bytes
from minipeft.lab.timing import Pair, check
from minipeft.torch.bins import MEMORY
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.linear import frozen
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.targets import ALL_LINEAR, all_linear

RANK, ALPHA, ROWS, LENGTH, NEW_TOKENS = 8, 16, 2, 64, 12
Step = Callable[[], Tensor]


def base(dtype: torch.dtype) -> Any:
    """Return SmolLM2 in a dtype."""
    models.fetch("smollm2")
    return models.load("smollm2", dtype=str(dtype).removeprefix("torch.")).model


def batch(model: Any) -> Tensor:
    """Return a fixed batch of tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (ROWS, LENGTH)
    return torch.randint(3, model.config.vocab_size, size, generator=generator)


def ours(dtype: torch.dtype, method: str) -> Any:
    """Return our adapters on the base, in NF4 for QLoRA."""
    model = base(dtype)
    if method == "QLoRA":
        for name, layer in all_linear(model).items():
            model.set_submodule(name, QuantizedLinear.from_linear(layer))
    config = (DoRAConfig if method == "DoRA" else LoRAConfig)(r=RANK, alpha=ALPHA)
    torch.manual_seed(0)
    return inject(model, config, ALL_LINEAR)


def theirs(dtype: torch.dtype, method: str) -> Any:
    """Return peft's adapters on the base, in bitsandbytes' layers for QLoRA."""
    model = base(dtype)
    names = list(all_linear(model))
    if method == "QLoRA":
        for name in names:
            layer = model.get_submodule(name)
            four = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                layer.bias is not None,
                compute_dtype=dtype,
                compress_statistics=False,  # scales of 32 bits, as ours
                quant_type="nf4",
            )
            four.load_state_dict(layer.state_dict())
            model.set_submodule(name, four.to("cpu"))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=method == "DoRA"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


def step(model: Any) -> Step:
    """Return one training step: forward, backward, AdamW."""
    ids = batch(model)
    parameters = [p for p in trainable_parameters(model) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()

    def turn() -> Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return cast(Tensor, loss.detach())

    return turn


def training(method: str, dtype: torch.dtype) -> Pair:
    """Return our step and theirs with both peaks; the first losses must be equal.

    A new adapter changes nothing (B = 0), so both losses are the base's, to the last
    bit. In bfloat16 peft's DoRA changes the base: it divides norms of 16 bits. So there
    ours must equal the loss of peft's LoRA.
    """
    models_of = ours(dtype, method), theirs(dtype, method)
    mine, yours = (step(model) for model in models_of)
    first, second = float(mine()), float(yours())
    base_loss = second
    if (method, dtype) == ("DoRA", torch.bfloat16):
        base_loss = float(step(theirs(dtype, "LoRA"))())
    check(f"{method}'s loss", abs(first - base_loss), 0)
    peaks = [
        (kept + peak_bytes(turn)) / 1e6
        for kept, turn in zip(map(standing, models_of), (mine, yours), strict=True)
    ]
    note = f"losses {first:.5f}, {second:.5f}; "
    note += f"peak {peaks[0]:.0f} MB, theirs {peaks[1]:.0f}"
    name = f"SmolLM2 {method} step, {_short(dtype)}"
    against = "peft + bitsandbytes" if method == "QLoRA" else "peft"
    return Pair(name, against, mine, yours, 1.0, note)


def standing(model: Any) -> int:
    """Return the bytes that a model keeps between steps, without the optimizer's.

    Beside parameters and buffers these are the scales of bitsandbytes' layers, and the
    memory that our layers decode to.
    """
    layers = [*model.modules()]
    found = held(model)
    if any(isinstance(layer, QuantizedLinear) for layer in layers):
        found += MEMORY.nbytes
    fours = [layer for layer in layers if isinstance(layer, bnb.nn.Linear4bit)]
    return found + sum(layer.weight.quant_state.absmax.nbytes for layer in fours)


def quantize() -> Pair:
    """Quantize a matrix to NF4 in blocks of 64, not compiled, as the layer does."""
    W = _weights()
    layer = frozen(W)
    packed, _ = bnb_functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    own = QuantizedLinear.from_linear(layer)
    check("NF4 codes", float((own.packed != packed.view(-1)).any()), 0)
    return Pair(
        "NF4 quantize, eager",
        "bitsandbytes",
        partial(QuantizedLinear.from_linear, layer),
        partial(bnb_functional.quantize_4bit, W, blocksize=64, quant_type="nf4"),
        0.3,
    )


def dequantize(dtype: torch.dtype) -> Pair:
    """Dequantize, not compiled, as the layer does in each forward pass."""
    W = _weights().to(dtype)
    own = QuantizedLinear.from_linear(frozen(W))
    packed, state = bnb_functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    yours = partial(bnb_functional.dequantize_4bit, packed, state)
    mine = torch.no_grad()(partial(own.decoded, dtype))
    off = (mine().float() - yours().float()).abs().max()
    limit = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    check("NF4 values", float(off / W.abs().max()), limit)
    name = f"NF4 dequantize, eager, {_short(dtype)}"
    return Pair(name, "bitsandbytes", mine, yours, 1.0)


def generation() -> Pair:
    """Generate twelve tokens with an unmerged adapter on an NF4 base."""
    pair = [make(torch.float32, "QLoRA").eval() for make in (ours, theirs)]

    def writer(model: Any) -> Step:
        ids = batch(model)[:1, :16]
        settings = {"do_sample": False, "min_new_tokens": NEW_TOKENS}

        @torch.no_grad()
        def turn() -> Tensor:
            return cast(
                Tensor,
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NEW_TOKENS,
                    pad_token_id=0,
                    **settings,
                ),
            )

        return turn

    mine, yours = map(writer, pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their layer warns that it repacks its weight
        check("the text", float(not torch.equal(mine(), yours())), 0)
    name = f"SmolLM2 in NF4, {NEW_TOKENS} tokens"
    return Pair(name, "peft + bitsandbytes", mine, yours, 1 / 0.9)


def _weights(size: int = 4096) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(3)) * 0.02


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PAIRS: dict[str, Callable[[], Pair]] = {
    f"smollm2-{method.lower()}-{_short(dtype)}": partial(training, method, dtype)
    for method in ("LoRA", "DoRA", "QLoRA")
    for dtype in (torch.float32, torch.bfloat16)
}
PAIRS |= {"eager-quantize": quantize}
PAIRS |= {
    f"eager-dequantize-{_short(dtype)}": partial(dequantize, dtype)
    for dtype in (torch.float32, torch.bfloat16)
}
PAIRS |= {"smollm2-generation": generation}
