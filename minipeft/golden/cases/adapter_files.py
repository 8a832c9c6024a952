"""Cases of what adapter files say: the scale of each layer, its layout, its biases.

Whole numbers and scalings that are powers of two make every merged value exact.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minipeft.golden.cases import File, Spec, integers, reference
from minipeft.golden.cases.build import (
    Shapes,
    bounded,
    drawn,
    either_zero,
    given,
    misfits,
    normal,
    refused,
)

PEFT = "https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/config.py"
LLAMA = "https://github.com/ggml-org/llama.cpp/pull/8332"

Sizes = tuple[int, int, int]  # in_features, out_features, r
Config = Mapping[str, Any]
Case = tuple[str, str, int, str, Config]  # comment, flags, r, module, config
SMALL: Sizes = (6, 5, 2)
Q_PROJ = "model.layers.1.self_attn.q_proj"
PLAIN: Config = {"r": 2, "lora_alpha": 8}
FULL: Config = {
    **{"r": 2, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}},
    **{"alpha_pattern": {}, "fan_in_fan_out": False, "bias": "none"},
    "lora_bias": False,
}


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    yield File(
        operation="adapter_config_scaling",
        header=(
            "s = alpha/r, or alpha/sqrt(r) with use_rslora. r and alpha are those of a",
            "key in rank_pattern and alpha_pattern that fits the end of the module's",
            "name, from a dot on; else r and lora_alpha.",
        ),
        source="minipeft.reference.adapter_files.scaling",
        papers=(PEFT,),
        specs=[
            *_scalings(),
            *_not_of_this_config("adapter_config_scaling"),
            *_choices(),
        ],
    )
    yield File(
        operation="adapter_config_merge",
        header=(
            "merged = W + s B A, stored as W is: (in_features, out_features) with",
            "fan_in_fan_out. merged_bias = bias + s B_bias; trained_bias, where the",
            "file has one, stands in for bias.",
        ),
        source="minipeft.reference.adapter_files.merge",
        papers=(PEFT,),
        specs=[*_merges(), *_broken()],
    )
    yield _gguf_file()


def _gguf_file() -> File:
    return File(
        operation="gguf_merge",
        header=("merged = W + share alpha/r B A, and W + share B A where alpha is 0.",),
        source="minipeft.reference.adapter_files.gguf_scaling",
        papers=(LLAMA,),
        specs=list(_gguf()),
    )


_PATTERNS: list[Case] = [
    ("only r and lora_alpha", "Basic Scaling", 2, Q_PROJ, PLAIN),
    ("all settings, those of a default", "Scaling", 2, Q_PROJ, FULL),
    ("lora_alpha is a half", "Scaling", 2, Q_PROJ, {"r": 2, "lora_alpha": 0.5}),
    ("lora_alpha is negative", "Scaling", 2, Q_PROJ, {"r": 2, "lora_alpha": -8}),
    (
        *("use_rslora, r 4", "RankStabilized", 4, Q_PROJ),
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
    ),
    (
        *("a pattern of ranks", "RankPattern", 4, Q_PROJ),
        {**PLAIN, "rank_pattern": {"q_proj": 4}},
    ),
    (
        *("a pattern of ranks, for another layer", "RankPattern", 2, Q_PROJ),
        {**PLAIN, "rank_pattern": {"k_proj": 4}},
    ),
    (
        *("a pattern of alphas", "AlphaPattern", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {"q_proj": 32}},
    ),
    (
        *("a pattern of alphas, for another layer", "AlphaPattern", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {"v_proj": 32}},
    ),
    (
        *("both patterns", "RankPattern AlphaPattern", 4, Q_PROJ),
        {**PLAIN, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 32}},
    ),
    (
        *(
            "a pattern of ranks with use_rslora",
            "RankPattern RankStabilized",
            4,
            Q_PROJ,
        ),
        {**PLAIN, "use_rslora": True, "rank_pattern": {"q_proj": 4}},
    ),
    (
        *("a pattern of alphas with use_rslora", "AlphaPattern RankStabilized"),
        *(4, Q_PROJ),
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"q_proj": 32}},
    ),
    (
        *("the whole name is the key", "AlphaPattern PatternEnd", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {Q_PROJ: 32}},
    ),
    (
        *("the key is the start of the name", "AlphaPattern PatternEnd", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {"model.layers.1": 32}},
    ),
    (
        *("the key is the end of a word", "AlphaPattern PatternEnd", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {"proj": 32}},
    ),
    (
        *("the key has a place for one character", "AlphaPattern PatternEnd", 2),
        *(Q_PROJ, {**PLAIN, "alpha_pattern": {"._proj": 32}}),
    ),
    (
        *("the key is a regular expression", "AlphaPattern PatternRegex", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {r"layers\.[0-3]\..*q_proj": 32}},
    ),
    (
        *(
            "a regular expression for layer 1, and layer 11",
            "AlphaPattern PatternRegex",
        ),
        *(2, "model.layers.11.self_attn.q_proj"),
        {**PLAIN, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32}},
    ),
    (
        *("a regular expression with a choice", "RankPattern PatternRegex", 4, Q_PROJ),
        {**PLAIN, "rank_pattern": {"self_attn.(q|v)_proj": 4}},
    ),
    (
        *("the second key fits", "AlphaPattern", 2, Q_PROJ),
        {**PLAIN, "alpha_pattern": {"k_proj": 64, "q_proj": 32}},
    ),
    (
        *("a layer without a dot in its name", "AlphaPattern PatternEnd", 2, "head"),
        {**PLAIN, "alpha_pattern": {"head": 32}},
    ),
    (
        *("other settings change nothing", "Scaling", 2, Q_PROJ),
        {**FULL, "fan_in_fan_out": True, "bias": "all", "lora_bias": True},
    ),
]


def _scalings() -> Iterator[Spec]:
    operation = "adapter_config_scaling"
    for comment, flags, r, module, config in _PATTERNS:
        yield _scaled(_spec(operation, comment, flags, (6, 5, r), (module, config)))
    for r, alpha, stable in [(3, 5, False), (3, 4, True), (7, 0.3, True)]:
        config = {"r": r, "lora_alpha": alpha, "use_rslora": stable}
        comment = f"alpha {alpha}, r {r}{', use_rslora' * stable}"
        flags = "Scaling RankStabilized" if stable else "Scaling"
        yield _scaled(_spec(operation, comment, flags, (8, 9, r), (Q_PROJ, config)))


def _choices() -> Iterator[Spec]:
    """Keys of two words: each of them belongs to the end of a name, from a dot on."""
    for key in ("k_proj|q_proj", "q_proj|k_proj"):
        config = {**PLAIN, "alpha_pattern": {key: 32}}
        for module, what in ((Q_PROJ, "q_proj"), (f"{Q_PROJ}.0", "q_proj.0")):
            comment = f"{key}, for {what}"
            flags = "AlphaPattern PatternRegex"
            spec = _spec(
                "adapter_config_scaling", comment, flags, SMALL, (module, config)
            )
            yield _scaled(spec)


def _scaled(spec: Spec) -> Spec:
    """Two roundings, for a root and a quotient in float32, and one of the output."""
    found = reference("adapter_config_scaling", spec.inputs, spec.parameters)
    sizes = {name: np.asarray(np.abs(value)) for name, value in found.items()}
    return replace(spec, roundings={"scaling": 3}, outputs=found, magnitudes=sizes)


def _not_of_this_config(operation: str) -> Iterator[Spec]:
    fine = _spec(operation, "fits", "", SMALL, (Q_PROJ, PLAIN))
    for comment, flags, config in [
        ("A and B have rank 2, r is 4", "RankOfConfig", {"r": 4, "lora_alpha": 8}),
        (
            *("A and B have rank 2, the pattern says 4", "RankOfConfig RankPattern"),
            {**PLAIN, "rank_pattern": {"q_proj": 4}},
        ),
        ("r is negative", "OutOfRange", {"r": -2, "lora_alpha": 8}),
    ]:
        yield refused(fine, comment, flags, **{"config": config})
    change = {"B": integers(f"{operation} one column", (5, 1))}
    yield refused(fine, "B has one column", "ShapeMismatch", **change)
    zero = _spec(operation, "r is 0", "", (6, 5, 0), (Q_PROJ, {**PLAIN, "r": 0}))
    yield refused(zero, "r is 0", "ZeroRank")


_TURNED: Config = {**PLAIN, "fan_in_fan_out": True}
_BIASES: list[tuple[str, str, Config, str]] = [
    ("lora_bias", "Bias", {**PLAIN, "lora_bias": True}, "B_bias"),
    (
        *("lora_bias and fan_in_fan_out", "Bias FanInFanOut"),
        *({**_TURNED, "lora_bias": True}, "B_bias"),
    ),
    (
        *("bias: lora_only", "TrainedBias"),
        *({**PLAIN, "bias": "lora_only"}, "trained_bias"),
    ),
    ("bias: all", "TrainedBias", {**PLAIN, "bias": "all"}, "trained_bias"),
]


def _merges() -> Iterator[Spec]:
    operation = "adapter_config_merge"
    for comment, flags, r, module, config in [
        *(_PATTERNS[i] for i in (0, 1, 4, 5, 7, 9, 11)),
        ("fan_in_fan_out", "FanInFanOut", 2, Q_PROJ, _TURNED),
        (
            *("fan_in_fan_out and a pattern", "FanInFanOut RankPattern", 4, Q_PROJ),
            {**_TURNED, "rank_pattern": {"q_proj": 4}},
        ),
    ]:
        yield _merge(_spec(operation, comment, flags, (6, 5, r), (module, config)))
    square = (4, 4, 2)
    comment = "fan_in_fan_out, square"
    yield _merge(
        _spec(operation, comment, "FanInFanOut SquareTrap", square, ("c", _TURNED))
    )
    yield _merge(_spec(operation, "square", "SquareTrap", square, ("c", PLAIN)))
    for comment, flags, config, name in _BIASES:
        spec = _spec(operation, comment, flags, SMALL, (Q_PROJ, config))
        yield _merge(given(spec, **{name: integers(f"{comment} {name}", (5,), 16)}))
    yield _normal()


def _merge(spec: Spec) -> Spec:
    return either_zero("adapter_config_merge", spec)


def _broken() -> Iterator[Spec]:
    yield from _not_of_this_config("adapter_config_merge")
    fine = _spec("adapter_config_merge", "", "", SMALL, (Q_PROJ, PLAIN))
    comment = "fan_in_fan_out, and W is stored (out_features, in_features)"
    yield refused(fine, comment, "FanInFanOut ShapeMismatch", **{"config": _TURNED})
    comment = "W is stored (in_features, out_features) without fan_in_fan_out"
    W = integers("turned", (6, 5))
    yield refused(fine, comment, "FanInFanOut ShapeMismatch", W=W)
    for name, shape in [("A", (2, 5)), ("B", (1, 2))]:
        change = {name: np.abs(integers(f"{name} {shape}", shape))}
        said = " times ".join(map(str, shape))
        yield refused(fine, f"{name} is {said}", "ShapeMismatch", **change)
    for _, _, config, name in _BIASES[::3]:
        one = {"config": config, name: np.abs(integers(f"one {name}", (1,)))}
        yield refused(fine, f"{name} is one number", "ShapeMismatch", **one)


def _normal() -> Spec:
    """R terms; two roundings of s, one of its product, one of the sum, one stored."""
    operation = "adapter_config_merge"
    sizes, config = (10, 9, 6), {"r": 6, "lora_alpha": 4, "use_rslora": True}
    comment = "normal values, 10 in, 9 out, r 6, use_rslora"
    parameters = {"module": Q_PROJ, "config": config}
    shapes = _shapes(operation, sizes, config)
    spec = normal(f"{operation} normal", comment, "Normal", shapes, parameters)
    return bounded(operation, spec, {"merged": 6 + 6, "merged_bias": 1})


def _gguf() -> Iterator[Spec]:
    shapes = _weights(SMALL)
    for comment, flags, sizes, alpha, share in [
        ("alpha 8, r 2", "Basic Scaling", SMALL, 8.0, 1.0),
        ("alpha 2, r 4", "Scaling", (6, 5, 4), 2.0, 1.0),
        ("alpha 0: B holds the scale", "ZeroAlpha", SMALL, 0.0, 1.0),
        ("alpha 8, r 2, share 1/2", "Share", SMALL, 8.0, 0.5),
        ("alpha 8, r 2, share -1", "Share", SMALL, 8.0, -1.0),
        ("alpha 0, share 2", "ZeroAlpha Share", SMALL, 0.0, 2.0),
        ("share 0: W alone", "Share", SMALL, 8.0, 0.0),
        ("alpha 0, share 0: W alone", "ZeroAlpha Share", SMALL, 0.0, 0.0),
        ("square weight", "SquareTrap", (4, 4, 4), 8.0, 1.0),
        ("r 1", "RankOne", (6, 5, 1), 2.0, 1.0),
    ]:
        own = {"alpha": alpha, "share": share}
        seed = f"gguf_merge {comment}"
        inputs = drawn(integers, seed, _weights(sizes))
        spec = Spec(comment, tuple(flags.split()), inputs, own)
        yield either_zero("gguf_merge", spec)
    parameters = {"alpha": 5.0, "share": 0.7}
    comment = "normal values, 10 in, 9 out, r 6"
    spec = normal("gguf normal", comment, "Normal", _weights((10, 9, 6)), parameters)
    # Three roundings of the factor, one of its product, one of the sum, one stored.
    yield bounded("gguf_merge", spec, 6 + 6)
    own = {"alpha": 8.0, "share": 1.0}
    fine = Spec("fits", (), drawn(integers, "gguf fits", shapes), own)
    yield from misfits("gguf_merge", fine, [])
    inputs = drawn(integers, "gguf r 0", _weights((6, 5, 0)))
    yield refused(replace(fine, inputs=inputs), "r is 0", "ZeroRank")


def _spec(
    operation: str, comment: str, flags: str, sizes: Sizes, layer: tuple[str, Config]
) -> Spec:
    inputs = drawn(
        integers, f"{operation} {comment}", _shapes(operation, sizes, layer[1])
    )
    parameters = dict(zip(("module", "config"), layer, strict=True))
    return Spec(comment, tuple(flags.split()), inputs, parameters)


def _shapes(operation: str, sizes: Sizes, config: Config) -> Shapes:
    shapes = dict(_weights(sizes))
    if operation == "adapter_config_scaling":
        return {name: shapes[name] for name in ("A", "B")}
    if config.get("fan_in_fan_out"):
        shapes["W"] = shapes["W"][::-1]
    return {"W": shapes["W"], "bias": (sizes[1],), "A": shapes["A"], "B": shapes["B"]}


def _weights(sizes: Sizes) -> Shapes:
    columns, rows, r = sizes
    return {"W": (rows, columns), "A": (r, columns), "B": (rows, r)}
