"""Correct and wrong operands for the public functions and classes of the torch column.

A new function needs an entry here only if a parameter has a new name, or another kind
of value under a name that is known.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minipeft.torch import (
    adamw,
    attention,
    blockwise,
    bottleneck,
    codebook,
    dora,
    double_quant,
    experts,
    ia3,
    inject,
    lora,
    lora_batched,
    microscaling,
    paged,
    pissa,
    prefix,
    prompt,
    qlora,
    vera,
)
from minipeft.torch.linear import frozen
from tests.agreement.llama import llama
from tests.agreement.on_torch import CONFIGS
from tests.parametrizations import ROWS, Parametrization
from tests.properties import modules

# Files for the column's own use; their callers have checked the operands.
INSIDE = (
    *("adamw_checks", "adapted", "bins", "copies", "deferred", "launches", "linear"),
    *(
        "loading",
        "operands",
        "operators",
        "saving",
        "slices",
        "stack",
        "targets",
        "virtual",
    ),
)
# Operands are processes, folders and meshes; test_sharding runs these.
PROCESSES = ("sharding",)
# Classes that only hold fields; the functions that read the fields check them.
HOLDERS = {
    *("blockwise.Blockwise", "double_quant.Nested", "microscaling.MXFP4"),
    *("microscaling.NVFP4", "prefix.Prefix", "prompt.Prompt", "lora_batched.Adapters"),
    *("lora_batched.Group", "lora_batched.Plan", "lora_batched.Traffic"),
    *("lora_plus.Group", "paged.Traffic", "paged.Page", "paged.Lanes", "adamw.Job"),
    *("paged.PageTable", "adamw.Moments", "inject.Config", "experts.ExpertsLoRA"),
}
# Steps of a public function, which has checked their operands.
STEPS = {
    *(
        "adamw.parts",
        "adamw.update",
        "adamw.following",
        "adamw.rehearse",
        "adamw.moments",
    ),
    *("adamw.wide", "blockwise.encode", "blockwise.on_cpu", "blockwise.width_of"),
    *(
        "adamw.refuse_capture",
        "launches.capturing",
        "blockwise.decode_to",
        "blockwise.decodes_in_slices",
    ),
    *("blockwise.check_finite", "blockwise.width_of", "codebook.table"),
    *(
        "dora.squared_row_norm",
        "inject.freeze",
        "inject.check_places",
        "vera.kaiming_uniform",
    ),
    *("loftq.alternate", "pissa.principal", "pissa.principal_randomized"),
    *("experts.init", "qlora.quantized_linear", "qlora.quantizable"),
    *(name for name, _ in modules.members() if name.endswith(".check_fits")),
}


def numbers(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape) / 4


def base() -> nn.Module:
    return frozen(numbers(4, 5), numbers(4))


def update() -> lora.LoRA:
    return lora.LoRA(numbers(2, 5), numbers(4, 2), 0.5)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU())


def adapted() -> nn.Module:
    return inject.inject(net(), lora.LoRAConfig(2, 4.0), ["0"])


def on_four_bits() -> lora.LoRALinear:
    q = qlora.QuantizedLinear.from_linear(base(), blocksize=4)
    return lora.LoRALinear(q, update())


def stack_of_updates() -> nn.Module:
    return experts.StackLoRA(numbers(3, 2, 5), numbers(3, 4, 2), 0.5)


def new(row: Parametrization) -> Callable[[], nn.Module]:
    return lambda: CONFIGS[row.name].adapters({"": base()})[""]


WITH_DELTA = [row for row in ROWS if f"{row.name}.delta" in dict(modules.members())]
ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    **{f"{row.kind}Linear": new(row) for row in ROWS if row.name in CONFIGS},
    **dict.fromkeys(("LoRALinear", "LoftQLinear", "BatchedLinear"), update),
    "DoRALinear": lambda: dora.DoRA(update(), numbers(4)),
    "IA3Linear": lambda: ia3.init(4),
    "PiSSALinear": lambda: pissa.PiSSA(update()),
    "Serial": lambda: bottleneck.Bottleneck(numbers(2, 4), numbers(4, 2), 0.5),
    "LoRAExperts": lambda: experts.ExpertsLoRA({"W": stack_of_updates()}),
}


def quantized() -> blockwise.Blockwise:
    return blockwise.quantize(numbers(4, 5), blocksize=4)


def nested() -> double_quant.Nested:
    return double_quant.quantize(numbers(4, 5), blocksize=4, nested_blocksize=2)


def head() -> attention.Head:
    mask = attention.causal(3, 4)
    return attention.Head(numbers(2, 3, 5), numbers(2, 4, 5), numbers(2, 4, 6), mask)


def pair() -> vera.Projections:
    return vera.Projections(0, 2, 5, 4)


PLAIN: dict[str, Any] = {
    **{"in_features": 5, "out_features": 4, "r": 2, "alpha": 3.0, "p": 0.5},
    **{"rank_stabilized": True, "dropout": 0.5, "scaling": 1.5, "seed": 1},
    **{"d_initial": 0.1, "side": "input", "features": 5, "bits": 4, "offset": 0.9},
    **{"signed": True, "blocksize": 4, "nested_blocksize": 2, "n": 10, "fill": 7},
    **{"dtype": torch.float32, "steps": 2, "mean_bits": 3.0, "sketch": pissa.SKETCH},
    **{"queries": 3, "keys": 4, "num_virtual_tokens": 2, "hidden": 6, "both": 10},
    **{"bottleneck": 2, "name": "default", "config": lora.LoRAConfig(2, 4.0)},
    **{"targets": ["0"], "shares": {}, "tensors": {}, "saved": {}, "skip": []},
    **{"feedforward": [], "budget": 4000, "lr": 0.1, "betas": (0.9, 0.99)},
    **{"eps": 1e-8, "weight_decay": 0.1, "paging": paged.Paging(256, 2)},
    **{"page_size": 256, "oversampling": 4, "iterations": 2, "ratio": 16.0},
    **{"codebooks": {}, "adapters": {}, "stacks": {}},
}
MADE: dict[str, Callable[[], Any]] = {
    **{"generator": torch.Generator, "W": lambda: numbers(4, 5)},
    **{"bias": lambda: numbers(4), "adapter": update, "update": update},
    **{"initial": update, "trained": update, "values": lambda: numbers(4)},
    **{"norm": lambda: numbers(4), "A": lambda: numbers(2, 5)},
    **{"B": lambda: numbers(4, 2), "magnitude": lambda: numbers(4)},
    **{"d": lambda: numbers(2), "b": lambda: numbers(4), "pair": pair},
    **{"l": lambda: numbers(4), "D": lambda: numbers(2, 4), "q": quantized},
    **{"codebook": codebook.NF4.clone, "scaled": lambda: numbers(4, 5)},
    **{"codes": lambda: torch.arange(10, dtype=torch.uint8)},
    **{"packed": lambda: quantized().packed, "blocks": lambda: numbers(5, 4)},
    **{"absmax": lambda: numbers(5), "weights": lambda: {"a": numbers(4, 5)}},
    **{"E": lambda: numbers(9, 5), "tokens": lambda: torch.tensor([1, 2, 1])},
    **{"Q": lambda: numbers(2, 3, 5), "K": lambda: numbers(2, 4, 5)},
    **{"V": lambda: numbers(2, 4, 6), "mask": lambda: attention.causal(3, 4)},
    **{"head": head, "prefix": lambda: prefix.Prefix(numbers(2, 5), numbers(2, 6))},
    **{"prompt": lambda: prompt.Prompt(numbers(2, 5)), "X": lambda: numbers(2, 3, 5)},
    **{"down": lambda: numbers(2, 5), "up": lambda: numbers(5, 2)},
    **{"down_bias": lambda: numbers(2), "up_bias": lambda: numbers(5)},
    "network": lambda: prefix.Reparametrization(2, 3, 6, 10),
    **{"base": base, "model": adapted, "layer": on_four_bits},
    **{"params": lambda: [nn.Parameter(numbers(4))], "grad": lambda: numbers(4, 5)},
    "updates": lambda: [[(1.0, update())]],
}


def rows() -> Tensor:
    return numbers(2, 32)


def on_its_base(kind: str) -> dict[str, Any]:
    return {"adapter": lambda: ADAPTERS[kind]()}


STEP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# Operands that differ from the above for one function.
OWN: dict[str, dict[str, Any]] = {
    **{f"double_quant.{f}": {"q": nested} for f in ("dequantize", "unnest")},
    "double_quant.bits_per_parameter": {"q": nested},
    **{f"microscaling.quantize_{f}": {"W": rows} for f in ("mxfp4", "nvfp4")},
    "microscaling.dequantize_mxfp4": {
        "mx": lambda: microscaling.quantize_mxfp4(rows())
    },
    "microscaling.dequantize_nvfp4": {
        "nv": lambda: microscaling.quantize_nvfp4(rows())
    },
    "dora.merge": on_its_base("DoRALinear"),
    **{f"{row.name}.delta": on_its_base(f"{row.kind}Linear") for row in WITH_DELTA},
    "experts.Experts": {
        "W": lambda: numbers(3, 4, 5),
        "bias": lambda: numbers(3, 4),
    },
    "experts.StackLoRA": {
        "A": lambda: numbers(3, 2, 5),
        "B": lambda: numbers(3, 4, 2),
    },
    "experts.LoRAExperts": {"base": lambda: experts.Experts(numbers(3, 4, 5))},
    "bottleneck.Parallel": {
        "base": lambda: nn.Linear(5, 5),
        "adapter": lambda: bottleneck.Bottleneck(numbers(2, 5), numbers(5, 2)),
    },
    "bottleneck.place_beside": {
        "model": net,
        "config": bottleneck.BottleneckConfig(2),
        "features": 6,
    },
    "inject.inject": {"model": net},
    "inject.add": {"name": "other"},
    "inject.load_adapter_state_dict": {
        "tensors": lambda: inject.adapter_state_dict(adapted())
    },
    "lora_batched.Pool": {"model": net},
    "lora_batched.forward": {
        **{"x": lambda: numbers(3, 5), "y": lambda: numbers(3, 4)},
        "adapters": lambda: lora_batched.stack([[(1.0, update())]]),
        "indices": lambda: torch.tensor([0, -1, 0], dtype=torch.int32),
    },
    "paged.Paging": {"budget": 2},
    **{f"adamw.{f}": {"bits": 8} for f in ("AdamW", "init")},
    "paged.PagedAdamW": {"bits": 8},
    "adamw.step": {"group": STEP, "state": lambda: adamw.init(numbers(4, 5))},
    "prefix.Reparametrization": {"d": 3},
    "prefix.PrefixConfig": {"tokens": [], "hidden": 6},
    "prompt.PromptConfig": {"tokens": [1]},
    "prompt.init_random": {"d": 5},
    "prefix.PrefixModel": {"model": llama, "config": prefix.PrefixConfig(2)},
    "prompt.PromptModel": {"model": llama, "config": prompt.PromptConfig(2)},
    "qlora.quantize_linears": {"model": net, "blocksize": 64},
    "qlora.prepare": {"model": lambda: qlora.quantize_linears(net(), blocksize=4)},
    **{f: {"model": net} for f in ("qlora.unquantized", "experts.experts")},
    "ia3.IA3Config": {"feedforward": ["0"]},
}


def checked() -> Iterator[str]:
    """Yield the public functions and classes whose operands a user gives."""
    for name, member in modules.members():
        row = name.partition(".")[0]
        known = inspect.isfunction(member) or inspect.isclass(member)
        if row in (*INSIDE, *PROCESSES) or name in HOLDERS | STEPS or not known:
            continue
        yield name


def function(name: str) -> Any:
    return dict(modules.members())[name]


def arguments(name: str) -> dict[str, Any]:
    """Return arguments that fit, made anew."""
    short = name.partition(".")[2]
    pool = PLAIN | MADE | OWN.get(name, {})
    if short in ADAPTERS:
        pool |= {"adapter": ADAPTERS[short]}
    taken = {p: pool[p] for p in inspect.signature(function(name)).parameters}
    return {p: made() if callable(made) else made for p, made in taken.items()}


# These classes check their own fields.
CHECKED = (paged.Paging, pissa.Sketch, prefix.PrefixConfig, prompt.PromptConfig)
CHECKED += (lora.LoRAConfig, bottleneck.BottleneckConfig)


def paths(given: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield every operand, and every field of an operand that only holds fields."""
    for parameter, value in given.items():
        yield (parameter,)
        if is_dataclass(value) and not isinstance(value, CHECKED):
            yield from ((parameter, field.name) for field in fields(value))


def at(given: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value = given[path[0]]
    return value if len(path) == 1 else getattr(value, path[1])


def substituted(
    given: Mapping[str, Any], path: tuple[str, ...], value: object
) -> dict[str, Any]:
    """Return the arguments with another value at one path, without any check."""
    if len(path) == 1:
        return {**given, path[0]: value}
    holder = copy.copy(given[path[0]])
    object.__setattr__(holder, path[1], value)
    return {**given, path[0]: holder}


TEXTS = ("three", b"3")
HUGE = 10**400


def odd(value: Any) -> Iterator[tuple[str, object]]:
    """Yield wrong values for an operand of this kind, each with a name."""
    if isinstance(value, Tensor):
        yield from odd_tensors(value)
    elif isinstance(value, bool):
        yield from (("None", None), ("a whole number", 1), ("text", "yes"))
    elif isinstance(value, int):
        yield from (("a half", 1.5), ("below", -7), ("True", True), ("huge", HUGE))
        yield from (("nan", np.nan), ("text", "three"), ("None", None), ("list", [1]))
    elif isinstance(value, float):
        yield from (("nan", np.nan), ("inf", np.inf), ("complex", 2j), ("huge", HUGE))
        yield from (("text", "three"), ("None", None), ("list", [1.0]))
    elif isinstance(value, torch.dtype):
        yield from (("whole", torch.int8), ("complex", torch.complex64))
        yield from (("text", "float32"), ("None", None))
    else:
        yield from (("None", None), ("object", object()), ("a number", 3))
        if not isinstance(value, str):
            yield "text", "three"


def odd_tensors(value: Tensor) -> Iterator[tuple[str, object]]:
    yield from (("None", None), ("text", "three"), ("a number", 1.5))
    yield from (("list", value.tolist()), ("numpy", value.numpy()))
    yield from (("complex", value.to(torch.complex64)), ("more axes", value[None]))
    if value.is_floating_point():
        yield from (("whole", value.to(torch.int32)), ("bool", value > 0))
    else:
        yield "floats", value.float()
