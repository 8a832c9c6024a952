"""Soft prompts and prefixes in peft's format: one tensor, `prompt_embeddings`."""

from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop.peft_folder import Contents
from minipeft.interop.peft_write import Written
from minipeft.torch.inject import adapted
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.virtual import VirtualTokens

TENSOR = "prompt_embeddings"
KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")
LARGEST = 2**16
"""The most virtual tokens; a file with more is damaged."""


def load(contents: Contents, model: nn.Module) -> VirtualTokens:
    """Return the model with the virtual tokens of a file.

    Raises:
        InputError: the file holds something else, or tokens of another model.
    """
    config, rows = contents.config, contents.tensors.get(TENSOR)
    n = config.get("num_virtual_tokens")
    if rows is None or len(contents.tensors) > 1 or rows.ndim != 2:
        raise InputError(
            f"the file holds {', '.join(sorted(contents.tensors))} and should hold one "
            f"matrix {TENSOR}; get it again"
        )
    if type(n) is not int or not 0 < n <= LARGEST or len(rows) != n:
        raise InputError(
            f"num_virtual_tokens is {n!r} and the file has {len(rows)}; get it again"
        )
    if not rows.is_floating_point():
        raise InputError(f"{TENSOR} has dtype {rows.dtype}; get the file again")
    if config.get("num_transformer_submodules", 1) not in (1, None):
        raise InputError(
            "the virtual tokens are those of an encoder and a decoder, for which "
            "minipeft has no method; use the library that trained them"
        )
    prompt = config["peft_type"] == "PROMPT_TUNING"
    return _prompt(model, rows) if prompt else _prefix(model, rows)


def check_one_kind(model: nn.Module) -> None:
    """Refuse a model with virtual tokens and adapters: a file would lose one of them.

    Raises:
        InputError: names an adapted layer.
    """
    around = any(isinstance(module, VirtualTokens) for module in model.modules())
    layers = adapted(model) if around else {}
    if layers:
        raise InputError(
            f"the model holds virtual tokens and adapters (of {next(iter(layers))}), "
            "and a file of adapters has a place for one of the two; save "
            "model.state_dict(), which holds both, or save model.model, the adapters "
            "without the virtual tokens; to save the virtual tokens alone, call "
            "unload(model.model) first, which keeps what is merged and drops the other "
            "adapters"
        )


def written(model: VirtualTokens) -> Written:
    """Return the contents of a file for a prompt or a prefix.

    Raises:
        InputError: the heads of the prefix have several widths, which the format lacks.
    """
    rows: Tensor
    config: dict[str, Any]
    if isinstance(model, PromptModel):
        config, rows = {"peft_type": "PROMPT_TUNING"}, model.P
        config |= {"prompt_tuning_init": "RANDOM"}
    elif isinstance(model, PrefixModel):
        if len({*model.widths}) > 1 or len({*model.widths[0]}) > 1:
            raise InputError(
                "the layers' keys and values have several widths, and peft's file has "
                "one for all; save the model's state dict instead"
            )
        config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        P = model.prefix()
        rows = P.permute(3, 0, 1, 2, 4).reshape(P.shape[3], -1)
    else:
        raise InputError(f"peft has no format for {type(model).__name__}")
    sizes = _sizes(model)
    return Written({**config, **sizes, "num_virtual_tokens": len(rows)}, {TENSOR: rows})


def _sizes(model: Any) -> dict[str, Any]:
    if isinstance(model, PrefixModel):
        layers, heads, d = model.sizes
        shape = {"num_layers": layers, "num_attention_heads": heads}
        return {**shape, "token_dim": heads * d, "num_transformer_submodules": 1}
    c = model.model.config
    return {
        "num_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "token_dim": model.P.shape[1],
        "num_transformer_submodules": 1,
    }


def _prompt(model: Any, rows: Tensor) -> PromptModel:
    width = model.get_input_embeddings().weight.shape[1]
    _check_width(rows, width)
    wrapped = PromptModel(model, PromptConfig(len(rows)))
    _put(wrapped, rows)
    return wrapped


def _prefix(model: Any, rows: Tensor) -> PrefixModel:
    kept = {p: p.requires_grad for p in model.parameters()}
    wrapped = PrefixModel(model, PrefixConfig(len(rows)))
    layers, heads, d = wrapped.sizes
    try:
        _check_width(rows, layers * 2 * heads * d)
    except InputError:
        for parameter, trained in kept.items():
            parameter.requires_grad_(trained)
        raise
    P = rows.reshape(-1, layers, 2, heads, d).permute(1, 2, 3, 0, 4)
    _put(wrapped, P)
    return wrapped


def _put(model: PromptModel | PrefixModel, P: Tensor) -> None:
    wide = torch.promote_types(P.dtype, model.P.dtype)
    model.P = nn.Parameter(P.to(model.P.device, wide).contiguous())


def _check_width(rows: Tensor, width: int) -> None:
    if rows.shape[1] != width:
        raise InputError(
            f"{TENSOR} has {rows.shape[1]} columns, and the model takes {width}; give "
            "the model that it was trained on"
        )
