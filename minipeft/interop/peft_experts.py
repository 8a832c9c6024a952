"""LoRA on stacks of experts in peft's files, where `target_parameters` names them.

A of a stack is (experts r, in_features), expert after expert; B is (out_features,
r experts), where the expert is the last digit of a column's number. Stacks of one
module nest: the last of them stands under the module's name, the one before it under
`base_layer`, and so on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop import peft_update
from minipeft.interop.update import Update
from minipeft.torch.experts import ExpertsLoRA, StackLoRA, check_fits
from minipeft.torch.linear import Stacked

NESTED = "base_layer."
LEVEL = re.compile(r"(?P<level>(?:base_layer\.)*)(?P<part>lora_[AB])(?:\.weight)?")


def turned_to_file(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B as they lie in peft's file.

    Args:
        A: (experts, r, in_features).
        B: (experts, out_features, r).
    """
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def turned_from_file(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A as (experts, r, in_features) and B as (experts, out_features, r).

    Args:
        A: (experts r, in_features).
        B: (out_features, r experts).
        experts: how many; the rows of A are a multiple.
    """
    r = len(A) // experts
    A = A.reshape(experts, r, A.shape[1])
    return A, B.reshape(len(B), r, experts).permute(2, 0, 1)


def levels(names: Sequence[str]) -> dict[str, str]:
    """Return {stack: what stands before its parts}, as the stacks of a module nest."""
    last = len(names) - 1
    return {name: NESTED * (last - i) for i, name in enumerate(names)}


def targeted(module: str, names: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Return those parameters of a module that the settings name, in their order."""
    wanted = config.get("target_parameters") or []
    if not isinstance(wanted, list) or not all(isinstance(w, str) for w in wanted):
        raise InputError(f"target_parameters is {wanted!r}; it must be a list of names")
    found = {name: f".{module}.{name}" for name in names}
    return [
        n for n, full in found.items() if any(full.endswith(f".{w}") for w in wanted)
    ]


def update(
    name: str, A: Tensor, B: Tensor, config: Mapping[str, Any], experts: int
) -> Update:
    """Return the updates of one stack: A and B with a leading axis of experts.

    Args:
        name: of the stack, with its module's.
        A: (experts r, in_features).
        B: (out_features, r experts).
        config: of the adapter.
        experts: how many the stack has.

    Raises:
        InputError: the shapes and the settings differ.
    """
    if A.ndim != 2 or len(A) % experts or not len(A):
        raise InputError(
            f"A of {name} has shape {tuple(A.shape)}, and there are {experts} experts; "
            "give the base that the adapter was trained on"
        )
    names = {"lora_A": A, "lora_B": B}
    whole = peft_update.update(name, names, config, experts)
    A, B = turned_from_file(A, B, experts)
    return replace(whole, A=A, B=B, transposed=False)


def read(
    config: Mapping[str, Any],
    name: str,
    parts: Mapping[str, Tensor],
    view: Stacked,
    layer: nn.Module,
) -> ExpertsLoRA:
    """Return the adapter of a module of experts.

    Args:
        config: of the adapter.
        name: of the module, in the file.
        parts: by what stands behind the module's name.
        view: of the module.
        layer: the module.

    Raises:
        InputError: the parts are not those of the stacks that the settings name.
    """
    names = targeted(name, view.names(layer), config)
    wanted = {
        f"{level}lora_{M}.weight" for level in levels(names).values() for M in "AB"
    }
    if set(parts) != wanted or not names:
        raise InputError(
            f"target_parameters names {', '.join(names) or 'no stack'} of {name}, and "
            f"the file has {', '.join(sorted(parts))} for it; get it again"
        )
    found = {}
    for stack, level in levels(names).items():
        A, B = (parts[f"{level}lora_{M}.weight"] for M in "AB")
        experts, form = view.one(layer, stack)
        one = update(f"{name}.{stack}", A, B, config, experts)
        part = StackLoRA(
            one.A.to(form.device, form.wide).contiguous(),
            one.B.to(form.device, form.wide).contiguous(),
            one.scaling,
        )
        check_fits(experts, form, part)
        found[stack] = part
    return ExpertsLoRA(found)


def written(adapter: ExpertsLoRA, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of a module of experts, by what stands behind its name.

    Args:
        adapter: of the module.
        names: of its stacks, in the module's order.
    """
    own = [name for name in names if name in adapter]
    tensors: dict[str, Tensor] = {}
    for name, level in levels(own).items():
        part = adapter[name]
        assert isinstance(part, StackLoRA)
        A, B = turned_to_file(part.A, part.B)
        tensors |= {f"{level}lora_A.weight": A, f"{level}lora_B.weight": B}
    return tensors
