"""Make the adapters of a model's layers from the tensors of peft's files.

A setting that minipeft has no adapter for is refused. An ignored setting that changes
the function would give an adapter with another output.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop import peft_experts, peft_update
from minipeft.interop.peft_folder import Contents
from minipeft.interop.peft_rows import (
    BiasedLoRA,
    BiasedLoRALinear,
    TokenRows,
    TokenRowsEmbedding,
)
from minipeft.interop.peft_settings import check_config
from minipeft.torch import lora, pissa
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.dora import DoRA, DoRALinear
from minipeft.torch.experts import LoRAExperts
from minipeft.torch.hira import HiRA, HiRALinear
from minipeft.torch.ia3 import IA3, IA3Linear, Side
from minipeft.torch.linear import (
    Form,
    Lookup,
    Stacked,
    check_shape,
    full_precision,
    weight_of,
    weight_view,
)
from minipeft.torch.lora import LoRA, LoRALinear, check_dropout
from minipeft.torch.miss import MiSS, MiSSLinear
from minipeft.torch.pissa import PiSSA, PiSSALinear
from minipeft.torch.vera import Projections, VeRA, VeRALinear

Parts = Mapping[str, Tensor]
Built = tuple[type[Adapted[Any]], nn.Module]

TOKENS = "token_adapter.trainable_tokens_delta"
KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>(?:base_layer\.)*(?:lora_[AB]\.weight|lora_B\.bias|"
    r"lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?|hira_(?:embedding_)?[AB]|"
    r"miss_block|vera_lambda_[bd]|ia3_l|token_adapter\.trainable_tokens_delta))"
)

LARGEST_RANK = 2**16


def adapters(
    contents: Contents, parts: Mapping[str, Parts], layers: Mapping[str, nn.Module]
) -> dict[str, Built]:
    """Return the adapter of each layer, and the class that wraps the layer.

    Args:
        contents: of the folder, for its configuration and VeRA's pair.
        parts: of each layer, by the file's name of it.
        layers: by the same names.

    Raises:
        InputError: a part is missing or of another shape, or a setting is one that
            minipeft has no adapter for.
    """
    check_config(contents.config)
    build = _METHODS[contents.config["peft_type"]](contents, layers)
    found = {}
    for name, layer in layers.items():
        with naming(name):
            wrapper, adapter = build(name, parts[name], layer)
            if wrapper is not LoRAExperts:  # whose parts were held to their stacks
                form = weight_view(layer).form(layer)
                wrapper.check_fits(form, adapter)
                adapter = adapter.to(form.device)
            found[name] = wrapper, adapter
    return found


def split(contents: Contents) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the parts of each layer, and all other tensors by their keys."""
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in contents.tensors.items():
        plain = key.removeprefix("base_model.model.")
        found = KEY.fullmatch(plain)
        if found is None:
            others[plain] = tensor
        else:
            parts.setdefault(found["module"], {})[found["part"]] = tensor
    return parts, others


Builder = Callable[[str, Parts, nn.Module], Built]


def _lora(contents: Contents, layers: Mapping[str, nn.Module]) -> Builder:
    return partial(_lora_layer, contents.config)


def _lora_layer(
    config: Mapping[str, Any], name: str, parts: Parts, layer: nn.Module
) -> Built:
    view = weight_view(layer)
    if isinstance(view, Stacked):
        return LoRAExperts, peft_experts.read(config, name, parts, view, layer)
    form = view.form(layer)
    _check_not_nested(parts, layer)
    if TOKENS in parts:
        return TokenRowsEmbedding, _token_rows(name, parts, form, config)
    names = {key.removesuffix(".weight"): tensor for key, tensor in parts.items()}
    update = peft_update.update(name, names, config)
    magnitude, bias = names.get("lora_magnitude_vector"), parts.get("lora_B.bias")
    _check_agrees(config, "use_dora", "a magnitude", magnitude)
    _check_agrees(config, "lora_bias", "a bias of B", bias)
    A, B = (_wide(M, form) for M in (update.A, update.B))
    plain = LoRA(A, B, update.scaling, _dropout(config, "lora_dropout"))
    lora.check_fits(form, plain)
    if config.get("init_lora_weights") == "pissa":
        _check_alone(magnitude, bias)
        return PiSSALinear, _pissa(plain, layer)
    if magnitude is not None:
        _check_alone(bias)
        return DoRALinear, DoRA(plain, _per_row(magnitude, form))
    if bias is not None:
        return BiasedLoRALinear, BiasedLoRA(plain, _per_row(bias, form))
    return LoRALinear, plain


def _check_not_nested(parts: Parts, layer: nn.Module) -> None:
    nested = [part for part in parts if part.startswith(peft_experts.NESTED)]
    if nested:
        raise InputError(
            f"the file has {nested[0]}, and {type(layer).__name__} is no module of "
            "experts; give the model that the adapter was trained on"
        )


def _check_agrees(
    config: Mapping[str, Any], name: str, what: str, part: Tensor | None
) -> None:
    if bool(config.get(name)) != (part is not None):
        found = f"has {what}" if part is not None else f"does not have {what}"
        raise InputError(
            f"{name} is {config.get(name)!r}, and the file {found}; get it again"
        )


def _check_alone(*parts: Tensor | None) -> None:
    if any(part is not None for part in parts):
        raise InputError(
            "PiSSA, DoRA and a bias of B come together in this file, for which "
            "minipeft has no method; merge it with the library that trained it"
        )


def _pissa(trained: LoRA, layer: nn.Module) -> PiSSA:
    # The file has no residual: the SVD of the base computes the subtracted part again.
    W, r = weight_of(layer).detach(), len(trained.A)
    lora.check_rank(r, W.shape[1], W.shape[0])
    if not trained.scaling > 0 or not bool(W.isfinite().all()):
        raise InputError("PiSSA takes a finite base and a positive lora_alpha")
    with full_precision(W.device):
        initial = pissa.principal(W, r, trained.scaling)
    adapter = PiSSA(initial, trained.dropout)
    adapter.A, adapter.B = trained.A, trained.B
    return adapter


def _token_rows(
    name: str, parts: Parts, form: Form, config: Mapping[str, Any]
) -> TokenRows:
    if len(parts) > 1:
        raise InputError("rows of tokens are trained beside LoRA; train one of the two")
    given = config.get("trainable_token_indices")
    tokens = (
        peft_update.matched({re.escape(k): v for k, v in given.items()}, name, None)
        if isinstance(given, dict)
        else given
    )
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
        raise InputError(
            f"trainable_token_indices is {given!r}, which does not say which rows of "
            f"{name} the file holds; get it again"
        )
    check_shape("the trained rows", parts[TOKENS], len(tokens), form.out_features)
    inside = all(0 <= t < form.in_features for t in tokens)
    numbers = torch.tensor(tokens if inside else [-1] * len(tokens), dtype=torch.int64)
    return TokenRows(_wide(parts[TOKENS], form), numbers)


def _vera(contents: Contents, layers: Mapping[str, nn.Module]) -> Builder:
    forms = {name: weight_view(layer).form(layer) for name, layer in layers.items()}
    pairs: dict[tuple[torch.device, torch.dtype], Projections] = {}
    shared = _pair(contents, list(forms.values()))
    dropout = _dropout(contents.config, "vera_dropout")

    def build(name: str, parts: Parts, layer: nn.Module) -> Built:
        d, b = (_part(parts, f"vera_lambda_{which}") for which in "db")
        form = forms[name]
        place = form.device, form.wide
        if place not in pairs:
            pairs[place] = deepcopy(shared).to(*place)
        check_shape("d", d, len(shared.A))
        d, b = _wide(d, form), _per_row(b, form)
        return VeRALinear, VeRA(d, b, pairs[place], dropout)

    return build


def _pair(contents: Contents, forms: Sequence[Form]) -> Projections:
    config = contents.config
    r, seed = config.get("r"), config.get("projection_prng_key")
    A, B = (contents.tensors.get(f"base_model.vera_{M}") for M in "AB")
    if not _is_count(r) or not 0 < r <= LARGEST_RANK:
        raise InputError(f"r is {r!r}; VeRA takes 1 to {LARGEST_RANK}; get it again")
    if not _is_count(seed) or not 0 <= seed < 2**64:
        raise InputError(
            f"projection_prng_key is {seed!r}; it must be a whole number of 64 bits"
        )
    widest = max(form.in_features for form in forms)
    tallest = max(form.out_features for form in forms)
    if A is None and B is None and not config.get("save_projection", True):
        return Projections(seed, r, widest, tallest)
    if A is None or B is None:
        raise InputError("vera_A or vera_B is missing in the file; get it again")
    check_shape("vera_A", A, r, widest)
    check_shape("vera_B", B, tallest, r)
    if seed < 2**32:
        drawn = Projections(seed, r, A.shape[1], B.shape[0])
        if torch.equal(drawn.A, A) and torch.equal(drawn.B, B):
            return drawn
    return Projections.given(A, B)


def _ia3(contents: Contents, layers: Mapping[str, nn.Module]) -> Builder:
    given = contents.config.get("feedforward_modules") or []

    def build(name: str, parts: Parts, layer: nn.Module) -> Built:
        vector, side = _part(parts, "ia3_l"), _side(given, name)
        if vector.ndim != 2 or vector.shape[0 if side == "input" else 1] != 1:
            raise InputError(
                f"l has shape {tuple(vector.shape)}, which does not scale the {side}, "
                "as feedforward_modules says; get it again"
            )
        form = weight_view(layer).form(layer)
        return IA3Linear, IA3(_wide(vector.reshape(-1), form), side)

    return build


def _side(feedforward: Any, name: str) -> Side:
    if isinstance(feedforward, str):
        chosen = re.fullmatch(feedforward, name) is not None
    else:
        chosen = any(name.endswith(str(f)) for f in feedforward)
    return "input" if chosen else "output"


def _hira(contents: Contents, layers: Mapping[str, nn.Module]) -> Builder:
    config = contents.config
    dropout = _dropout(config, "hira_dropout")

    def build(name: str, parts: Parts, layer: nn.Module) -> Built:
        embedding = "embedding_" * isinstance(weight_view(layer), Lookup)
        names = {f"lora_{M}": _part(parts, f"hira_{embedding}{M}") for M in "AB"}
        # peft 0.21.2 gives every layer the rank r, whatever rank_pattern says.
        own = {"r": config.get("r"), "lora_alpha": 1}
        update = peft_update.update(name, names, own)
        form = weight_view(layer).form(layer)
        A, B = (_wide(M, form) for M in (update.A, update.B))
        return HiRALinear, HiRA(A, B, 1.0, dropout)

    return build


def _miss(contents: Contents, layers: Mapping[str, nn.Module]) -> Builder:
    config = contents.config
    dropout, kind = _dropout(config, "miss_dropout"), config.get("init_weights", True)
    if kind not in (True, False, "mini"):
        raise InputError(
            f"init_weights is {kind!r}, in which the update is a product with the "
            "weight, for which minipeft has no method; merge it with the library that "
            "trained it"
        )

    def build(name: str, parts: Parts, layer: nn.Module) -> Built:
        form, D = weight_view(layer).form(layer), _part(parts, "miss_block")
        if kind == "mini" and D.ndim == 2 and D.shape[1]:
            # A small D serves the outputs in turn.
            D = D.repeat(1, max(1, form.out_features // D.shape[1]))
        if D.ndim != 2 or len(D) != config.get("r"):
            raise InputError(
                f"miss_block has shape {tuple(D.shape)} in the file, and r is "
                f"{config.get('r')!r}; get it again"
            )
        return MiSSLinear, MiSS(_wide(D, form), dropout)

    return build


_METHODS: Mapping[str, Callable[[Contents, Mapping[str, nn.Module]], Builder]] = {
    "HIRA": _hira,
    "MISS": _miss,
    "LORA": _lora,
    "VERA": _vera,
    "IA3": _ia3,
}


def _part(parts: Parts, name: str) -> Tensor:
    if set(parts) - {name} - _WITH.get(name, set()) or name not in parts:
        raise InputError(
            f"the file has {', '.join(sorted(parts))} and should have {name}; get it "
            "again"
        )
    return parts[name]


_WITH = {
    "vera_lambda_d": {"vera_lambda_b"},
    "vera_lambda_b": {"vera_lambda_d"},
    "hira_A": {"hira_B"},
    "hira_B": {"hira_A"},
    "hira_embedding_A": {"hira_embedding_B"},
    "hira_embedding_B": {"hira_embedding_A"},
}


def _wide(tensor: Tensor, form: Form) -> Tensor:
    """Return the tensor in float32, or in the layer's dtype if wider."""
    if not tensor.is_floating_point():
        raise InputError(f"a part has dtype {tensor.dtype}; get the adapter again")
    dtype = torch.promote_types(tensor.dtype, form.wide)
    return tensor.to(form.device, dtype).clone(memory_format=torch.contiguous_format)


def _per_row(tensor: Tensor, form: Form) -> Tensor:
    check_shape("a number for each output", tensor, form.out_features)
    return _wide(tensor, form)


def _dropout(config: Mapping[str, Any], name: str) -> float:
    p = config.get(name) or 0.0
    if isinstance(p, bool) or not isinstance(p, int | float):
        raise InputError(f"{name} is {p!r}; it must be a chance in [0, 1)")
    check_dropout(p)
    return float(p)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
