"""Correct and wrong operands for every public function of the reference.

The annotations show the axes that two operands share, and the types of their numbers.
So a new function needs an entry here only if a parameter has a new name.
"""

import contextlib
import copy
import inspect
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from functools import cache
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any

import jaxtyping
import numpy as np

import minipeft.reference
from minipeft.reference import (
    adamw,
    adapter_files,
    attention,
    blockwise,
    bottleneck,
    codebook,
    double_quant,
    experts,
    ia3,
    loftq,
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
from tests.parametrizations import ROWS as PARAMETRIZATIONS

ROWS = tuple(
    import_module(f"minipeft.reference.{found.name}")
    for found in pkgutil.iter_modules(minipeft.reference.__path__)
)

# A number outside these ranges is out of range for every function with this argument.
OUT_OF_RANGE = {
    "r": (0, -1),
    "alpha": (np.nan, np.inf),
    "blocksize": (0, 3, -64, 96),
    "nested_blocksize": (0, 3),
    "page_size": (0, -256, 100, 257),
    "budget": (0, -1),
    "page": (-1, 99),
    "tensor": (-1, 9),
    "steps": (0, -3),
    "bits": (0, 9, 16),
    "seed": (-1, 2**32),
    "mean_bits": (1.9, 4.1, np.nan),
    "num_virtual_tokens": (0, -1),
    "bottleneck": (0,),
    "queries": (6,),
    "offset": (0.5, 1.0, 2.0),
    "d_initial": (np.nan,),
    "side": ("left",),
    "scaling": (np.nan,),
    "dtype": (np.int32, np.complex64),
}


# No operand may be one of these, except where its annotation allows it.
ODD = (
    *(None, "three", b"3", 2j, Fraction(1, 3), np.nan, np.inf, -1, 1.5, 10**400),
    *([1.0], (), {}, object(), np.array("three"), np.float32(np.nan)),
)
# The message uses the name that the operand has at the place of the check.
CALLED = {
    **{
        "flat": "W",
        "update": "adapter",
        "initial": "adapter|initial",
        **{"one": "adapter|one", "other": "adapter|other"},
        "states": "states|a state",
    },
    **{"absmax_codes": "the scales", "nested_absmax": "the scales"},
    ("q", "nested_blocksize"): "the scales: blocksize",
    **{("prefix", "K"): "P_K", ("prefix", "V"): "P_V"},
}

NUMBERS = {float, Any, np.float32, int, bool}

# A layer uses the corner of a larger pair, so these axes may be longer than the
# layer's.
MAY_BE_LONGER = {("pair", "in_features"), ("pair", "out_features")}


def f32(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def trained_adapter(row) -> object:
    # The update of a new one is zero: adding it in place would not show.
    new = row.start(np.random.default_rng(0), f32(4, 5), 2)[2]
    held = {name: f32(*a.shape) for name, a in vars(new).items() if hasattr(a, "shape")}
    return replace(new, **held)


@cache
def operands(row: ModuleType) -> dict[str, object]:
    """Return values for the parameters of a row's functions, by name."""
    states = [adamw.init(f32(300)), adamw.init(f32(4096), bits=8)]
    table = paged.prefetch(paged.init(states, 256, 2), 1)
    q = blockwise.quantize(f32(4, 5), blocksize=4)
    update = lora.LoRA(f32(2, 5), f32(4, 2), 0.5)
    network = prefix.Reparametrization(
        f32(2, 3), f32(6, 3), f32(6), f32(10, 6), f32(10)
    )
    common = {
        "rng": np.random.default_rng(0),
        **{"in_features": 5, "out_features": 4, "r": 2, "alpha": 3.0, "scaling": 1.5},
        **{"x": f32(3, 5), "W": f32(4, 5), "bias": f32(4), "grad_y": f32(3, 4)},
        **{"trained": update, "initial": lora.LoRA(f32(3, 5), f32(4, 3), 0.5)},
        **{"update": update, "norm": abs(f32(4)), "values": f32(4)},
        **{"seed": 1, "d_initial": 0.1, "stream": np.random.RandomState(0)},
        **{"rows": 3, "columns": 4, "pair": vera.Projections(f32(2, 5), f32(4, 2))},
        **{"features": 5, "side": "input", "bits": 4, "offset": 0.9, "signed": True},
        **{"codebook": codebook.NF4.copy(), "blocksize": 4, "nested_blocksize": 2},
        **{
            "q": q,
            "name": "blocksize",
            "dtype": np.float32,
            "scaled": f32(4, 5),
            "n": 20,
            "fill": 7,
        },
        **{"codes": np.arange(10, dtype=np.uint8), "packed": q.packed},
        **{"absmax": q.absmax, "flat": f32(7), "steps": 2, "mean_bits": 3.0},
        **{"weights": {"a": f32(4, 5), "b": f32(3, 7)}, "sketch": pissa.SKETCH},
        **{"E": f32(9, 5), "tokens": np.array([1, 2, 1]), "P": f32(2, 5)},
        **{"num_virtual_tokens": 2, "d": 5, "hidden": 6, "queries": 3, "keys": 4},
        **{"network": network, "p": table, "page": 0, "tensor": 1, "states": states},
        **{"page_size": 256, "budget": 2, "state": states[0], "config": adamw.AdamW()},
        **{"moment": states[1].v, "like": states[1].m, "arrays": {}, "rank": 2},
        **{"head": attention.Head(f32(2, 3, 5), f32(2, 4, 5), f32(2, 4, 6))},
        **{"prefix": prefix.Prefix(f32(2, 5), f32(2, 6)), "X": f32(2, 3, 5)},
        **{"prompt": prompt.Prompt(f32(2, 5)), "h": f32(3, 5), "bottleneck": 2},
        **{"given": {"x": f32(3, 5), "grad_y": f32(3, 4)}},
        **{"one": update, "other": lora.LoRA(f32(3, 5), f32(4, 3), 2.0)},
        **{"weight": 0.5, "other_weight": -1.0, "layer": "head"},
        **{"share": 0.5, "module": "a.b"},
        "parts": adapter_files.Parts(f32(2, 5), f32(4, 2), f32(4), f32(4)),
        **{"sublayers": (np.tanh, np.negative), "rank_stabilized": True},
    }
    small = bottleneck.Bottleneck(f32(2, 5), f32(2), f32(5, 2), f32(5), 0.5)
    mask = attention.causal(3, 4)
    own: dict[ModuleType, dict[str, object]] = {
        **{row.module: {"adapter": trained_adapter(row)} for row in PARAMETRIZATIONS},
        bottleneck: {"adapter": small, "grad_y": f32(3, 5), "adapters": (small, small)},
        loftq: {"q": q},
        adapter_files: {"config": {"r": 2, "lora_alpha": 4}},
        lora_batched: {
            "x": f32(3, 2, 5),
            "adapters": lora_batched.Adapters(f32(6, 2, 5), f32(6, 4, 2), f32(6)),
            "indices": np.array([5, -1, 0]),
        },
        microscaling: {
            "W": f32(2, 32),
            "mx": microscaling.quantize_mxfp4(f32(2, 32)),
            "nv": microscaling.quantize_nvfp4(f32(2, 32)),
        },
        blockwise: {"blocks": f32(5, 4)},
        double_quant: {"q": double_quant.quantize(f32(4, 5), blocksize=4)},
        attention: {
            "head": replace(common["head"], mask=mask),
            "grad_y": f32(2, 3, 6),
        },
        prefix: {
            "head": replace(common["head"], mask=mask),
            "grad_y": f32(2, 3, 6),
            "grad": prefix.Prefix(f32(2, 5), f32(2, 5)),
        },
        prompt: {"grad_y": f32(2, 5, 5)},
        adamw: {
            **{"W": f32(300), "grad": f32(300), "bits": 32, "values": f32(4096)},
            **{"m": f32(300), "v": f32(300), "arrays": adamw.to_arrays(states[1])},
        },
        paged: {"W": f32(4096), "grad": f32(4096)},
        experts: {
            **{"W": f32(3, 4, 5), "bias": f32(3, 4), "shape": (3, 4, 5)},
            **{"x": f32(6, 5), "grad_y": f32(6, 4)},
            "given": {"x": f32(6, 5), "grad_y": f32(6, 4)},
            "adapter": experts.ExpertsLoRA(f32(3, 2, 5), f32(3, 4, 2), 0.5),
            "chosen": np.array([0, 2, 1, 0, 2, 2]),
        },
    }
    own[lora] = {**own[lora], "E": f32(4, 5)}
    return common | own.get(row, {})


def public_functions(row: ModuleType) -> list[str]:
    return [
        name
        for name, f in vars(row).items()
        if inspect.isfunction(f) and f.__module__ == row.__name__ and name[0] != "_"
    ]


def arguments(row: ModuleType, name: str) -> dict[str, object]:
    """Return the arguments for a public function.

    The table p is not copied: the pages of a copy would be writable.
    """
    parameters = inspect.signature(getattr(row, name)).parameters
    pool = operands(row)
    return {p: pool[p] if p == "p" else copy.deepcopy(pool[p]) for p in parameters}


def variants(row: ModuleType, name: str) -> Iterator[dict[str, object]]:
    """Yield the arguments, then those that lead to a function's other branches."""
    given, pool = arguments(row, name), operands(row)
    yield given
    plain, coded = pool["states"]
    others = {
        ia3: {"adapter": ia3.IA3(f32(5), "input")},
        qlora: {"q": double_quant.quantize(f32(4, 5), blocksize=4)},
        adamw: {
            **{"moment": plain.m, "like": plain.m},
            **({"arrays": adamw.to_arrays(plain)} if name == "from_arrays" else {}),
            **({"state": coded} if name == "to_arrays" else {}),
        },
    }
    for parameter, value in others.get(row, {}).items():
        if parameter in given:
            yield {**given, parameter: copy.deepcopy(value)}


def arrays(value: object) -> Iterator[np.ndarray]:
    """Yield every array inside a value."""
    if isinstance(value, np.ndarray):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from arrays([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, Mapping):
        yield from arrays(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from arrays(part)
    elif isinstance(value, Iterator):
        yield from arrays(list(islice(value, 2)))


def annotated(row: ModuleType, name: str) -> dict[tuple[str, ...], type]:
    """Return the annotation of each array operand, by its path."""
    given, found = arguments(row, name), {}
    for parameter, hint in typing.get_type_hints(getattr(row, name)).items():
        value = given.get(parameter)
        if is_dataclass(value) and not isinstance(value, type):
            for field, inner in typing.get_type_hints(type(value)).items():
                found[parameter, field] = _array_hint(inner, getattr(value, field))
        else:
            found[(parameter,)] = _array_hint(hint, value)
    return {path: hint for path, hint in found.items() if hint is not None}


def _array_hint(hint: object, value: object) -> type | None:
    if not isinstance(value, np.ndarray):
        return None
    choices = typing.get_args(hint) or (hint,)
    return next((h for h in choices if hasattr(h, "dim_str")), None)


def substituted(
    given: Mapping[str, object], path: tuple[str, ...], value: np.ndarray
) -> dict[str, object]:
    """Return the arguments with another array at one path."""
    if len(path) == 1:
        return {**given, path[0]: value}
    return {**given, path[0]: replace(given[path[0]], **{path[1]: value})}


def reshaped(
    row: ModuleType, name: str
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield arrays with one wrong axis: of length 1, one too long, or one too many.

    Only an axis that another operand shares can be wrong.
    """
    given, hints = arguments(row, name), annotated(row, name)
    words = {path: hint.dim_str.split() for path, hint in hints.items()}
    for path, own in words.items():
        array = _at(given, path)
        others = {
            word
            for other, names in words.items()
            for word in names
            if other != path and (other[0], word) not in MAY_BE_LONGER
        }
        for i, word in enumerate(reversed(own), start=1):
            if word in others and word[0] not in ".*":
                n = array.shape[-i]
                yield (
                    path,
                    np.take(array, range(1), axis=-i) if n > 1 else array[..., :0],
                )
                if (path[0], word) not in MAY_BE_LONGER:
                    yield path, np.take(array, [*range(n), 0], axis=-i)
        lead = {word for word in own if word[0] in ".*"}
        if others & (lead or set(own)):
            yield path, array[np.newaxis]


def retyped(row: ModuleType, name: str) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Yield arrays with numbers of a wrong type."""
    given = arguments(row, name)
    for path, hint in annotated(row, name).items():
        for dtype in ("complex64", "bool", "int32", "float32", "uint8"):
            if not _allowed(hint, dtype):
                yield path, _at(given, path).astype(dtype)


def odd(row: ModuleType, name: str) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield values that an operand, or a part of it, must not have."""
    given, hints = arguments(row, name), typing.get_type_hints(getattr(row, name))
    for parameter, value in given.items():
        own = {(parameter,): hints[parameter]}
        if is_dataclass(value):
            inner = typing.get_type_hints(type(value))
            own |= {(parameter, field): hint for field, hint in inner.items()}
        for path, hint in own.items():
            yield from ((path, one) for one in ODD if not _admits(hint, one))
    for path in annotated(row, name):
        array = _at(given, path).astype(object)
        if array.size:
            array.flat[0] = None
            yield path, array


def _admits(hint: object, value: object) -> bool:
    if hint is str or (isinstance(value, np.generic) and hint not in NUMBERS):
        return True  # a word; an array without axes
    if value is None or isinstance(value, Mapping | tuple):
        kinds = (hint, *typing.get_args(hint))
        return any(typing.get_origin(k) or k is type(value) for k in kinds)
    number = isinstance(value, int | float) and abs(value) < 2
    return number and hint in NUMBERS - {int, bool}


def _allowed(hint: type, dtype: str) -> bool:
    if not isinstance(hint.dtypes, list | tuple):  # Shaped: floats, or fractions
        return dtype == "float32"
    return any(dtype == str(d) for d in hint.dtypes)


def _at(given: Mapping[str, object], path: tuple[str, ...]) -> np.ndarray:
    value = given[path[0]]
    return value if len(path) == 1 else getattr(value, path[1])


@contextlib.contextmanager
def annotations_off() -> Iterator[None]:
    """Call functions without checks of annotations, as for a user without jaxtyping."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
