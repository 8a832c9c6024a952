"""Exact weighted sums of adapters in peft's format; methods not linear are refused."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import fingerprint, made, peft_update
from minipeft.interop.fingerprint import BASE, Fingerprint
from minipeft.interop.peft_folder import CONFIG, PREFIX, Contents
from minipeft.interop.peft_read import split
from minipeft.interop.peft_write import alpha_of, patterns
from minipeft.interop.update import Update

Part = tuple[Contents, float]
Tables = dict[str, Tensor]

NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""The settings of peft that leave out modules which `target_modules` names."""

HIRA_RANKS = {"hira_A": 0, "hira_B": 1, "hira_embedding_A": 0, "hira_embedding_B": 1}
"""The side of a tensor of HiRA that is the rank."""

WEIGHTS = "minipeft.weights"
"""The key of a file's metadata with the weights of the adapters in its sum."""
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
"""The settings that the metadata names as constants of the sum."""


def concatenate(adapters: Sequence[Contents]) -> Contents:
    """Return one adapter with the sum of all updates.

    Raises:
        InputError: as `weighted_sum`.
    """
    return weighted_sum([(adapter, 1.0) for adapter in adapters])


def weighted_sum(parts: Sequence[Part]) -> Contents:
    r"""Return one adapter whose update is the sum of the others, each times its weight.

    LoRA: $\sum_i w_i s_i B_i A_i = s [w_1 B_1, w_2 s_2 / s\,B_2, …] [A_1; A_2; …]$ with
    $s = s_1$: the ranks add up, and no product of one adapter's B with another one's A
    appears. HiRA: the same, without s. IA3: $l = 1 + \sum_i w_i (l_i - 1)$. MiSS, of
    one rank: $D = \sum_i w_i D_i$. One adapter at weight 1 gives itself back, bit for
    bit.

    Args:
        parts: the adapters, each with its weight.

    Raises:
        InputError: there is none, a weight is not finite, they are of several methods
            or bases, or the method is not linear: DoRA, VeRA, virtual tokens, modules
            saved whole; stacks of experts are summed on a model.
    """
    _check(parts)
    first, weight = parts[0]
    if len(parts) == 1 and weight == 1:
        return first
    sums = {
        "LORA": _sum_of_lora,
        "IA3": _sum_of_ia3,
        "HIRA": _sum_of_hira,
        "MISS": _sum_of_miss,
    }
    kind = first.config["peft_type"]
    if kind not in sums:
        raise InputError(
            f"the update of {kind} is not linear in what it trains, so no file of the "
            "kind is the sum; write each as plain LoRA first (to_lora)"
        )
    result = sums[kind](parts)
    _check_size(parts, result)
    weights = json.dumps([weight for _, weight in parts])
    constants = {key: result.config[key] for key in SCALE if key in result.config}
    facts = {**_base(parts), **made.facts(kind, constants), WEIGHTS: weights}
    return replace(result, metadata=facts)


def _check(parts: Sequence[Part]) -> None:
    if not parts:
        raise InputError("there is no adapter to sum; give at least one")
    for _, weight in parts:
        if not isfinite(weight):
            raise InputError(f"the weight {weight} is not finite; give a finite one")
    kinds = sorted({str(contents.config.get("peft_type")) for contents, _ in parts})
    if len(kinds) > 1:
        raise InputError(
            f"the adapters are {' and '.join(kinds)}; write each as plain LoRA first "
            "(to_lora)"
        )
    layouts = {bool(contents.config.get("fan_in_fan_out")) for contents, _ in parts}
    if len(layouts) > 1:
        raise InputError(
            "fan_in_fan_out is true in one adapter and false in another, so their "
            "bases differ; sum adapters of one base"
        )


def _check_shapes(parts: Sequence[Part]) -> None:
    shapes: dict[str, str] = {}
    for contents, _ in parts:
        for key, tensor in contents.tensors.items():
            shape = _without_rank(key, tensor)
            if shapes.setdefault(key, shape) != shape:
                raise InputError(
                    f"{key} has shape {shapes[key]} in one adapter and {shape} in "
                    "another; sum adapters of one base"
                )


def _without_rank(key: str, tensor: Tensor) -> str:
    matrix = re.fullmatch(r".+(lora|hira)_(embedding_)?([AB])(\.weight)?", key)
    if matrix is None:
        return str(tuple(tensor.shape))
    if tensor.ndim != 2:
        raise InputError(
            f"{key} has shape {tuple(tensor.shape)} and is no matrix; get the adapter "
            "again"
        )
    rows, columns = tensor.shape
    return f"(r, {columns})" if matrix[3] == "A" else f"({rows}, r)"


def _check_size(parts: Sequence[Part], total: Contents) -> None:
    weights = ", ".join(f"{weight:g}" for _, weight in parts)
    for key, tensor in total.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(
                f"{key} of the sum is not finite at the weights {weights}; give "
                "smaller weights"
            )


def _base(parts: Sequence[Part]) -> dict[str, str]:
    """Return the common fingerprint; refuse adapters of several bases."""
    texts = [c.metadata[BASE] for c, _ in parts if BASE in c.metadata]
    prints = [Fingerprint.from_json(text) for text in texts]
    for other in prints[1:]:
        try:
            fingerprint.check(prints[0], other)
        except InputError as error:
            reason = str(error).partition(";")[0]
            raise InputError(f"{reason}; sum adapters of one base") from None
    return {BASE: texts[0]} if len(texts) == len(parts) else {}


def _sum_of_lora(parts: Sequence[Part]) -> Contents:
    first = parts[0][0]
    updates, biases = _read(parts)
    _check_shapes(parts)
    tensors = _tables(parts)
    scales: dict[str, tuple[int, int | float]] = {}
    stabilized = bool(first.config.get("use_rslora"))
    for module, found in updates.items():
        s = next((u.scaling for u, _ in found if u.scaling), 1.0)
        r = sum(u.r for u, _ in found)
        scales[module] = r, _alpha(module, r, s, stabilized)
        names = _names(parts, module)
        tensors[f"{PREFIX}{module}.{names[0]}"] = torch.cat([u.A for u, _ in found])
        B = [_times(u.B, _factor(u.scaling, w, s)) for u, w in found]
        tensors[f"{PREFIX}{module}.{names[1]}"] = torch.cat(B, dim=1)
        if biases:
            c = [_times(b, _factor(t, w, s)) for b, t, w in biases.get(module, [])]
            c = c or [found[0][0].B.new_zeros(len(found[0][0].B))]
            tensors[f"{PREFIX}{module}.lora_B.bias"] = torch.stack(c).sum(dim=0)
    config = {**first.config, **_scales(first.config, scales)}
    config |= _targets([c.config for c, _ in parts], updates)
    config["lora_bias"] = bool(biases)
    return Contents(config, tensors)


def _alpha(module: str, r: int, s: float, stabilized: bool) -> int | float:
    if not isfinite(s * r):
        raise InputError(
            f"the sum of {module} has rank {r} and needs a lora_alpha beyond float64; "
            "give adapters of smaller lora_alpha"
        )
    return alpha_of(r, s, stabilized)


Updates = dict[str, list[tuple[Update, float]]]
Biases = dict[str, list[tuple[Tensor, float, float]]]


def _read(parts: Sequence[Part]) -> tuple[Updates, Biases]:
    """Return the updates and biases of each module."""
    updates: Updates = {}
    biases: Biases = {}
    for contents, weight in parts:
        found, others = split(contents)
        _check_linear(contents, found)
        for key in others:
            if ".base_layer." not in key:
                raise _whole(key)
        for module, tensors in found.items():
            plain = {k.removesuffix(".weight"): t for k, t in tensors.items()}
            update = peft_update.update(module, plain, contents.config)
            updates.setdefault(module, []).append((update, weight))
            if "lora_B.bias" in plain:
                entry = plain["lora_B.bias"], update.scaling, weight
                biases.setdefault(module, []).append(entry)
    return updates, biases


def _check_linear(
    contents: Contents, found: Mapping[str, Mapping[str, Tensor]]
) -> None:
    start = contents.config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise InputError(
            f"init_lora_weights is {start!r}, which changed the base, so the adapter "
            "is no update of it; write it as plain LoRA first (to_lora)"
        )
    if contents.config.get("target_parameters"):
        raise InputError(
            "an adapter holds stacks of experts (target_parameters); load the adapters "
            "onto one model under several names, and activate their sum there"
        )
    for module, tensors in found.items():
        for part in tensors:
            if not part.startswith(("lora_A", "lora_B", "lora_embedding")):
                raise InputError(
                    f"{module} has {part.removesuffix('.weight')}, in which the update "
                    "is not linear; write the adapter as plain LoRA first (to_lora)"
                )


def _factor(own: float, weight: float, s: float) -> float:
    return weight if own == s else weight * own / s


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (factor * tensor.double()).to(tensor.dtype)


def _names(parts: Sequence[Part], module: str) -> tuple[str, str]:
    table = f"{PREFIX}{module}.lora_embedding_A"
    if any(table in contents.tensors for contents, _ in parts):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _scales(
    config: Mapping[str, Any], scales: Mapping[str, tuple[int, int | float]]
) -> dict[str, Any]:
    r, ranks = patterns({m: r for m, (r, _) in scales.items()}, config.get("r"))
    alpha, alphas = patterns(
        {m: a for m, (_, a) in scales.items()}, config.get("lora_alpha")
    )
    return {"r": r, "rank_pattern": ranks, "lora_alpha": alpha, "alpha_pattern": alphas}


def _targets(
    configs: Sequence[Mapping[str, Any]], modules: Mapping[str, object]
) -> dict[str, Any]:
    # If all adapters have the same layers, their short names stay; else full names,
    # and also where a setting leaves out some layers of these names.
    narrowed = any(c.get(n) not in (None, [], "") for c in configs for n in NARROWING)
    given = [config.get("target_modules") for config in configs]
    same = all(
        isinstance(g, list) and sorted(g) == sorted(given[0] or []) for g in given
    )
    if same and not narrowed:
        return {"target_modules": sorted(given[0] or [])}
    none = {name: None for name in NARROWING if name in configs[0]}
    return {**none, "target_modules": sorted(modules)}


def _check_ranks(parts: Sequence[Part], sides: Mapping[str, int]) -> None:
    """Refuse a configuration whose r is not the rank of its file.

    Args:
        parts: the adapters.
        sides: which side of a tensor is the rank, by the end of its key.
    """
    for contents, _ in parts:
        r = contents.config.get("r")
        for key, tensor in contents.tensors.items():
            side = next((s for end, s in sides.items() if key.endswith(end)), None)
            if side is not None and (type(r) is not int or tensor.shape[side] != r):
                raise InputError(
                    f"{key} has rank {tensor.shape[side]} in the file and r is {r!r} "
                    f"in {CONFIG}; one of them belongs to another adapter"
                )


def _sum_of_hira(parts: Sequence[Part]) -> Contents:
    _check_shapes(parts)
    _check_ranks(parts, HIRA_RANKS)
    first = parts[0][0]
    shapes = {
        key: t.shape for contents, _ in parts for key, t in contents.tensors.items()
    }
    tensors = _tables(parts)
    for key, shape in shapes.items():
        if key in tensors:
            continue
        if not re.fullmatch(r".+\.hira_(embedding_)?[AB]", key):
            raise _whole(key)
        rows = key.endswith("A")
        # A layer that one adapter lacks gets zeros of its rank: all layers have one.
        found = [
            _times(c.tensors[key], 1.0 if rows else weight)
            if key in c.tensors
            else torch.zeros(
                (c.config["r"], shape[1]) if rows else (shape[0], c.config["r"])
            )
            for c, weight in parts
        ]
        tensors[key] = torch.cat(found, dim=0 if rows else 1)
    names = (re.sub(r"\.(hira_|base_layer).*", "", k) for k in tensors)
    modules = {name.removeprefix(PREFIX): 0 for name in names}
    config = {**first.config, "r": sum(contents.config["r"] for contents, _ in parts)}
    config |= _targets([c.config for c, _ in parts], modules)
    return Contents({**config, "rank_pattern": {}}, tensors)


def _sum_of_miss(parts: Sequence[Part]) -> Contents:
    first = parts[0][0]
    ranks = {
        (c.config.get("r"), c.config.get("init_weights", True) in (True, False))
        for c, _ in parts
    }
    if len(ranks) > 1 or not next(iter(ranks))[1]:
        raise InputError(
            "the adapters of MiSS differ in r, or are not of its plain kind, so no D "
            "is their sum; write each as plain LoRA first (to_lora)"
        )
    _check_shapes(parts)
    _check_ranks(parts, {".miss_block": 0})
    tensors: Tables = {}
    for contents, weight in parts:
        for key, D in contents.tensors.items():
            if not key.endswith(".miss_block"):
                raise _whole(key)
            more = weight * D.double()
            tensors[key] = tensors[key] + more if key in tensors else more
    modules = {k.removeprefix(PREFIX).removesuffix(".miss_block"): 0 for k in tensors}
    config = {**first.config}
    config |= _targets([c.config for c, _ in parts], modules)
    dtypes = {k: t.dtype for c, _ in parts for k, t in c.tensors.items()}
    return Contents(config, {k: t.to(dtypes[k]) for k, t in tensors.items()})


def _tables(parts: Sequence[Part]) -> Tables:
    """Return the tables of the base that stand beside the adapters; they are one."""
    tables: Tables = {}
    for contents, _ in parts:
        for key, table in contents.tensors.items():
            if ".base_layer." not in key:
                continue
            if key in tables and not torch.equal(tables[key], table):
                raise InputError(
                    f"{key} differs between the adapters, so their bases differ; sum "
                    "adapters of one base"
                )
            tables[key] = table
    return tables


def _whole(key: str) -> InputError:
    return InputError(
        f"one adapter brings {key} whole, and a sum of whole modules needs the base; "
        "merge the adapters into it one by one"
    )


def _sum_of_ia3(parts: Sequence[Part]) -> Contents:
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for contents, weight in parts:
        for key, l in contents.tensors.items():  # noqa: E741  # the paper's name
            if not key.endswith(".ia3_l"):
                raise _whole(key)
            found.setdefault(key, []).append((l, weight))
    tensors = {key: _around_one(key, vectors) for key, vectors in found.items()}
    configs = [contents.config for contents, _ in parts]
    modules = {key.removeprefix(PREFIX).removesuffix(".ia3_l"): 0 for key in tensors}
    inputs = {m: 0 for m in modules if tensors[f"{PREFIX}{m}.ia3_l"].shape[0] == 1}
    config = {**configs[0], **_targets(configs, modules)}
    if any(
        c.get("feedforward_modules") != configs[0].get("feedforward_modules")
        for c in configs
    ):
        config["feedforward_modules"] = sorted(inputs)
    return Contents(config, tensors)


def _around_one(key: str, vectors: Sequence[tuple[Tensor, float]]) -> Tensor:
    shape = vectors[0][0].shape
    total = torch.zeros(shape, dtype=torch.float64)
    for vector, weight in vectors:
        if vector.shape != shape:
            raise InputError(
                f"{key} has shape {tuple(shape)} in one adapter and "
                f"{tuple(vector.shape)} in another; sum adapters of one base"
            )
        total += weight * vector.double()
    rest = 1 - sum(weight for _, weight in vectors)
    return (total + rest).to(vectors[0][0].dtype)
