"""What an adapter's files say of a layer: its rank, its scale, how W is stored."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import lora
from minipeft.reference.linear import Bias, Weight
from minipeft.reference.lora import LoRA, MatrixA, MatrixB
from minipeft.shapes import Shaped, check_shapes
from minipeft.values import check_flag, check_integer, check_kind, check_number

Stored = Shaped[np.ndarray, "rows columns"]


class Settings(NamedTuple):
    """What holds for one layer.

    Attributes:
        r: the rank.
        scaling: the factor of B A.
        transposed: whether the base stores W as (in_features, out_features).
    """

    r: int
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Parts:
    """The tensors of one layer in the file: A, B, the bias of B, the layer's new bias.

    B's bias is a part of the update and is scaled; the layer's replaces the base's.
    """

    A: MatrixA
    B: MatrixB
    B_bias: Bias | None = None
    bias: Bias | None = None


def settings(config: Mapping[str, Any], module: str) -> Settings:
    r"""Return what peft's adapter_config.json says of a layer.

    $s = \alpha / r$, or $\alpha / \sqrt r$ with `use_rslora`. r and alpha are those of
    the first key in `rank_pattern` and `alpha_pattern` that fits the name, else `r` and
    `lora_alpha`. A key is a regular expression for the end of the name, from a dot on.

    Args:
        config: the object in the file; what it does not hold is false, or empty.
        module: the layer's name in the model.

    Raises:
        InputError: if r is below 1, alpha is not finite, or a setting has another type.

    Source: peft 0.21.2, `get_pattern_key`.
    """
    check_kind("config", config, Mapping)
    check_kind("module", module, str)
    r = _of(config, "rank_pattern", module, config.get("r", 0))
    alpha = _of(config, "alpha_pattern", module, config.get("lora_alpha"))
    check_integer("r in config", r, 1)
    check_number("lora_alpha in config", alpha)
    stabilized = config.get("use_rslora", False)
    transposed = config.get("fan_in_fan_out", False)
    check_flag("use_rslora in config", stabilized)
    check_flag("fan_in_fan_out in config", transposed)
    return Settings(r, lora.scaling(alpha, r, stabilized), transposed)


def scaling(parts: Parts, config: Mapping[str, Any], module: str) -> float:
    """Return the factor of B A in a layer.

    Raises:
        InputError: as `settings`, or if A and B are of another rank.
    """
    check_kind("parts", parts, Parts)
    found = settings(config, module)
    _check_parts(parts)
    if len(parts.A) != found.r:
        raise InputError(
            f"A has {len(parts.A)} rows and config says r = {found.r} for {module!r}; "
            "one of them is another adapter's."
        )
    return found.scaling


def merge(
    W: Stored, bias: Bias, parts: Parts, config: Mapping[str, Any], module: str
) -> tuple[Stored, Bias]:
    r"""Return the merged weight as the base stores it, and the merged bias.

    $W' = W + s B A$ and $b' = b + s b_B$, where $b$ is the file's own bias if it holds
    one.

    Args:
        W: as the base stores it.
        bias: of the base.
        parts: of the layer, from the file.
        config: the object in adapter_config.json.
        module: the layer's name in the model.

    Raises:
        InputError: as `settings`, or if a part is of another rank or another layer.
    """
    s, transposed = scaling(parts, config, module), settings(config, module).transposed
    check_shapes({"W": (W, "rows columns")})
    plain: Weight = W.T if transposed else W
    adapter = LoRA(parts.A, parts.B, s)
    lora.check_fits(plain, adapter)
    check_shapes(
        {"W": (plain, "out_features in_features"), "bias": (bias, "out_features")}
    )
    merged = lora.merge(plain, adapter)
    b = bias if parts.bias is None else parts.bias
    change = 0 if parts.B_bias is None else s * parts.B_bias
    return np.ascontiguousarray(merged.T if transposed else merged), b + change


def gguf_scaling(alpha: float, r: int, share: float = 1.0) -> float:
    r"""Return llama.cpp's factor of B A: share $\alpha / r$, and the share at alpha 0.

    Args:
        alpha: `adapter.lora.alpha` in the file; 0 says that B holds the scale.
        r: the rank of the matrices.
        share: what a user sets with `--lora-scaled`.

    Raises:
        InputError: if r is below 1, or a number is not finite.

    Source: llama.cpp, `llama_adapter_lora_weight::get_scale`.
    """
    check_integer("r", r, 1)
    check_number("alpha", alpha)
    check_number("share", share)
    return share * alpha / r if alpha else share


def _check_parts(parts: Parts) -> None:
    check_shapes(
        {
            "A": (parts.A, "r in_features"),
            "B": (parts.B, "out_features r"),
            "B_bias": (parts.B_bias, "? out_features"),
            "the bias in the file": (parts.bias, "? out_features"),
        }
    )


def _of(config: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that fits the end of a module's name."""
    patterns = config.get(name, {})
    check_kind(f"{name} in config", patterns, Mapping)
    for pattern, value in patterns.items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise InputError(
                f"{pattern!r} in {name} of config is no regular expression ({error}); "
                "mend it."
            ) from None
        if fits:
            return value
    return default
