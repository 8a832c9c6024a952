"""Make the tensors and settings of peft's files from the adapters of a model."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nextafter, sqrt
from typing import Any, cast

from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop import peft_experts, peft_update
from minipeft.interop.peft_folder import PREFIX
from minipeft.interop.peft_read import TOKENS
from minipeft.interop.peft_rows import BiasedLoRA, TokenRows
from minipeft.torch import pissa
from minipeft.torch.adapted import Adapted
from minipeft.torch.dora import DoRA
from minipeft.torch.experts import ExpertsLoRA, StackLoRA
from minipeft.torch.hira import HiRA
from minipeft.torch.ia3 import IA3
from minipeft.torch.linear import Lookup, Stacked, Transposed
from minipeft.torch.loftq import LoftQ
from minipeft.torch.lora import LoRA
from minipeft.torch.miss import MiSS
from minipeft.torch.pissa import PiSSA
from minipeft.torch.vera import VeRA

Layers = Mapping[str, Adapted[Any]]

TABLES = ("embed_tokens", "lm_head")
"""For adapted layers of these names, peft's files contain the frozen weight too."""


@dataclass(frozen=True)
class Written:
    """The settings and tensors of one method.

    Args:
        config: the settings of the method in peft's configuration.
        tensors: by their names in the file.
        constants: numbers of the adapter that no tensor holds.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    constants: dict[str, Any] = field(default_factory=dict)


def written(layers: Layers, name: str) -> Written:
    """Return one adapter of all layers in the form of peft's files.

    PiSSA becomes plain LoRA of rank 2r on the original base.

    Raises:
        InputError: peft has no format for the method or the mixture of methods.
    """
    found = {key: _plain(layer.adapters[name]) for key, layer in layers.items()}
    rows = {key: a for key, a in found.items() if isinstance(a, TokenRows)}
    others = {key: a for key, a in found.items() if key not in rows}
    kinds = {_kind(a) for a in others.values()} or {LoRA}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(
            f"the layers hold {names}, and one file of peft holds one method; save "
            "them under several names of adapters"
        )
    (kind,) = kinds
    if kind not in _METHODS or (rows and kind in (VeRA, IA3, HiRA, MiSS)):
        raise InputError(
            f"peft has no format for {kind.__name__}"
            + " with trained rows of tokens" * bool(rows)
            + "; save the model's state dict instead"
        )
    result = _METHODS[kind](others, layers)
    for key, adapter in rows.items():
        result.tensors[f"{PREFIX}{key}.{TOKENS}"] = adapter.rows
        tokens = result.config.setdefault("trainable_token_indices", {})
        tokens[key] = adapter.tokens.tolist()
    return result


def _kind(adapter: nn.Module) -> type[nn.Module]:
    """Return the class that a file is written for: experts stand in that of LoRA."""
    return LoRA if isinstance(adapter, ExpertsLoRA) else type(adapter)


def _plain(adapter: nn.Module) -> nn.Module:
    """Return an adapter that has a format; LoftQ's is LoRA on its base."""
    if isinstance(adapter, PiSSA):
        return pissa.to_lora(adapter, adapter.initial)
    if isinstance(adapter, LoftQ):
        return LoRA(adapter.A, adapter.B, adapter.scaling, adapter.dropout)
    return adapter


def lora(found: Mapping[str, Any], layers: Layers) -> Written:
    """Return the contents of a file of LoRA or DoRA for these layers."""
    tensors: dict[str, Tensor] = {}
    for key, adapter in found.items():
        for part, tensor in _lora_parts(adapter, layers[key]).items():
            tensors[f"{PREFIX}{key}.{part}"] = tensor
        tensors |= _table(key, layers[key])
    stacks = {k: a for k, a in found.items() if isinstance(a, ExpertsLoRA)}
    plain = {key: a for key, a in found.items() if key not in stacks}
    sizes = {key: (len(a.A), a.scaling) for key, a in plain.items()}
    for key, parts in stacks.items():
        own = ((f"{key}.{name}", part) for name, part in _stacks(parts))
        sizes |= {name: (part.A.shape[1], part.scaling) for name, part in own}
    kinds = {type(adapter) for adapter in plain.values()}
    views = {type(layers[key].view) for key in plain}
    config = {
        "peft_type": "LORA",
        "bias": "none",
        **scales(sizes),
        "lora_dropout": common("dropout", [a.dropout for a in plain.values()]),
        "use_dora": DoRA in kinds,
        "lora_bias": BiasedLoRA in kinds,
        "fan_in_fan_out": views == {Transposed},
        "init_lora_weights": True,
    }
    if stacks:
        config["target_parameters"] = [key for key in sizes if key not in plain]
        _check_no_dropout(config["lora_dropout"])
    constants = {f"{key}.scaling": s for key, (_, s) in sizes.items()}
    return Written(config, tensors, constants)


def _check_no_dropout(dropout: float) -> None:
    if dropout:
        raise InputError(
            f"dropout is {dropout}, and peft takes none in a file with experts; set it "
            "to 0"
        )


def _stacks(adapter: ExpertsLoRA) -> Iterable[tuple[str, StackLoRA]]:
    return ((name, cast(StackLoRA, part)) for name, part in adapter.items())


def _table(key: str, layer: Adapted[Any]) -> dict[str, Tensor]:
    """Return the tensors of the frozen layer where peft saves them too."""
    if key.rpartition(".")[2] not in TABLES:
        return {}
    own = layer.base.state_dict()
    return {f"{PREFIX}{key}.base_layer.{part}": t for part, t in own.items()}


def _lora_parts(adapter: LoRA | ExpertsLoRA, layer: Adapted[Any]) -> dict[str, Tensor]:
    parts: dict[str, Tensor]
    if isinstance(adapter, ExpertsLoRA):
        names = cast(Stacked, layer.view).names(layer.base)
        return peft_experts.written(adapter, names)
    if isinstance(layer.view, Lookup):
        parts = {"lora_embedding_A": adapter.A, "lora_embedding_B": adapter.B}
    else:
        parts = {"lora_A.weight": adapter.A, "lora_B.weight": adapter.B}
    if isinstance(adapter, DoRA):
        parts["lora_magnitude_vector"] = adapter.magnitude
    if isinstance(adapter, BiasedLoRA):
        parts["lora_B.bias"] = adapter.c
    return parts


def _vera(found: Mapping[str, VeRA], layers: Layers) -> Written:
    pairs = {a.projections.drawn: a.projections for a in found.values()}
    if len(pairs) != 1:
        raise InputError(
            "the layers do not share one pair of VeRA; inject them at once"
        )
    ((seed, r, _, _), pair) = next(iter(pairs.items()))
    tensors = {"base_model.vera_A": pair.A, "base_model.vera_B": pair.B}
    for key, adapter in found.items():
        tensors[f"{PREFIX}{key}.vera_lambda_b"] = adapter.b
        tensors[f"{PREFIX}{key}.vera_lambda_d"] = adapter.d
    config = {
        "peft_type": "VERA",
        "bias": "none",
        "r": r,
        "projection_prng_key": max(seed, 0),  # a given pair has no key
        "save_projection": True,
        "vera_dropout": common("dropout", [a.dropout for a in found.values()]),
        "fan_in_fan_out": {type(layers[key].view) for key in found} == {Transposed},
    }
    return Written(config, tensors, {"seed": seed})


def _ia3(found: Mapping[str, IA3], layers: Layers) -> Written:
    tensors = {
        f"{PREFIX}{key}.ia3_l": a.l[None] if a.side == "input" else a.l[:, None]
        for key, a in found.items()
    }
    inputs = [key for key, a in found.items() if a.side == "input"]
    outputs = [key for key, a in found.items() if a.side == "output"]
    config = {
        "peft_type": "IA3",
        "feedforward_modules": shortest(inputs, outputs),
        "fan_in_fan_out": {type(layers[key].view) for key in found} == {Transposed},
    }
    return Written(config, tensors, {f"{key}.side": a.side for key, a in found.items()})


def _hira(found: Mapping[str, HiRA], layers: Layers) -> Written:
    tensors: dict[str, Tensor] = {}
    for key, a in found.items():
        start = "hira_embedding_" if isinstance(layers[key].view, Lookup) else "hira_"
        # The format has no scaling: it goes into B.
        B = a.B if a.scaling == 1 else (a.scaling * a.B.double()).to(a.B.dtype)
        tensors[f"{PREFIX}{key}.{start}A"] = a.A
        tensors[f"{PREFIX}{key}.{start}B"] = B
        tensors |= _table(key, layers[key])
    config = {
        "peft_type": "HIRA",
        # peft 0.21.2 does not apply the rank_pattern of HiRA.
        "r": common("r", [len(a.A) for a in found.values()]),
        "hira_dropout": common("dropout", [a.dropout for a in found.values()]),
        "fan_in_fan_out": {type(layers[key].view) for key in found} == {Transposed},
        "init_weights": True,
    }
    return Written(config, tensors)


def _miss(found: Mapping[str, MiSS], layers: Layers) -> Written:
    for key in found:
        if isinstance(layers[key].view, Transposed):
            raise InputError(
                f"{key} is a {type(layers[key].base).__name__}, and peft has MiSS for "
                "linear layers alone; save the model's state dict instead"
            )
    config = {
        "peft_type": "MISS",
        "bias": "none",
        "r": common("r", [len(a.D) for a in found.values()]),
        "miss_dropout": common("dropout", [a.dropout for a in found.values()]),
        "mini_r": 1,
        "init_weights": True,
    }
    tensors = {f"{PREFIX}{key}.miss_block": a.D for key, a in found.items()}
    for key in found:
        tensors |= _table(key, layers[key])
    return Written(config, tensors)


_METHODS: Mapping[type[nn.Module], Callable[[Any, Layers], Written]] = {
    LoRA: lora,
    DoRA: lora,
    BiasedLoRA: lora,
    VeRA: _vera,
    IA3: _ia3,
    HiRA: _hira,
    MiSS: _miss,
}


def scales(found: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return r, alpha and their patterns, so that peft computes these scalings.

    Args:
        found: rank and scaling of each layer.
    """
    stabilized = _is_stabilized(found.values())
    alphas = {key: alpha_of(r, s, stabilized) for key, (r, s) in found.items()}
    r, rank_pattern = patterns({key: r for key, (r, _) in found.items()}, 8)
    alpha, alpha_pattern = patterns(alphas, 8)
    return {
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "use_rslora": stabilized,
    }


def _is_stabilized(found: Iterable[tuple[int, float]]) -> bool:
    """Tell whether each scaling is a whole alpha over the root of the rank."""
    found = list(found)
    return not _are_whole(found, False) and _are_whole(found, True)


def _are_whole(found: Iterable[tuple[int, float]], stabilized: bool) -> bool:
    return all(isinstance(alpha_of(r, s, stabilized), int) for r, s in found)


def alpha_of(r: int, s: float, stabilized: bool) -> int | float:
    r"""Return the alpha with $\alpha / r = s$, or $\alpha / \sqrt r = s$, bit for bit.

    A whole number if possible. If no alpha gives the scaling exactly, the result errs
    by at most one unit in the last place of float64.
    """
    divisor = sqrt(r) if stabilized else r
    near = s * divisor
    whole = round(near)
    if whole / divisor == s:
        return whole
    others = (near, nextafter(near, -inf), nextafter(near, inf))
    return min(others, key=lambda alpha: abs(alpha / divisor - s))


def patterns(values: Mapping[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value, and other values by the names of their layers."""
    if not values:
        return default, {}
    usual = Counter(values.values()).most_common(1)[0][0]
    pattern = {key: value for key, value in values.items() if value != usual}
    if all(peft_update.matched(pattern, key, usual) == v for key, v in values.items()):
        return usual, pattern
    # A name can be the end of another one, so the pattern includes its beginning.
    return usual, {f"^{re.escape(key)}": value for key, value in pattern.items()}


def common(what: str, values: Sequence[Any]) -> Any:
    """Return the one value that all layers have.

    Raises:
        InputError: the values differ, but the format has one value for all layers.
    """
    different = sorted({*values})
    if len(different) > 1:
        raise InputError(
            f"{what} is {different[0]} in one layer and {different[1]} in another, and "
            "peft's file has one for all; set the same"
        )
    return different[0] if different else 0.0


def shortest(chosen: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return the last parts of names that match the chosen layers and no others.

    Return full names if last parts also match other layers.
    """
    others = list(others)
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    if not any(name.endswith(end) for name in others for end in ends):
        return ends
    return sorted(chosen)
