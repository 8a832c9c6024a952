"""Rewrite an adapter so that every loader computes its scale: alpha = r, no patterns.

B, and the bias beside B, are multiplied by the scale. Zeros fill the smaller ranks up
to the largest. The update stays the same, up to the one rounding of s B.
"""

from pathlib import Path

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import made, peft_folder
from minipeft.interop.parts import MAGNITUDE, A, B, Parts
from minipeft.interop.peft_settings import check_update


def fix(parts: Parts, out: str | Path) -> None:
    """Write the equivalent adapter into a new folder.

    Args:
        parts: of the adapter's folder.
        out: the new folder; it must not exist.

    Raises:
        InputError: the folder exists, a tensor is not finite, the method has no pairs A
            and B, or experts have ranks that differ.
    """
    peft_folder.write(out, folded(parts))


def folded(parts: Parts) -> peft_folder.Contents:
    """Return the equivalent adapter.

    Raises:
        InputError: as `fix`.
    """
    r = _largest(parts)
    tensors = {name: parts.file.read(name) for name in parts.others}
    for module, names in parts.modules.items():
        more = r - parts.rank(module)
        for part, name in names.items():
            tensor = parts.file.read(name)
            if part not in (A, MAGNITUDE):
                tensor = _scaled(tensor, parts.scaling(module))
            if more and part in (A, B):
                tensor = _filled(tensor, 0 if part == A else 1, more)
            tensors[name] = tensor
    plain = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = {**parts.config, "r": r, "lora_alpha": r, **plain}
    ones = {f"{module}.scaling": 1.0 for module in parts.modules}
    facts = {**parts.file.metadata, **made.facts("LORA", ones)}
    return peft_folder.Contents(config, tensors, facts)


def _largest(parts: Parts) -> int:
    """Return the largest rank, after checking that all layers can have that rank."""
    if parts.config.get("peft_type") != "LORA" or not parts.modules:
        raise InputError(
            f"an adapter of type {parts.config.get('peft_type')!r} has no scale to "
            "fold; only LoRA and DoRA are rewritten"
        )
    check_update(parts.config)
    for module, names in parts.modules.items():
        if parts.is_unclear(module):
            raise InputError(
                f"{module} holds stacks of experts beside a rank_pattern or "
                "alpha_pattern, and the file does not say which stack a pattern means; "
                "load it onto its model and save it"
            )
        for part in (A, B):
            if part not in names:
                raise InputError(f"{module} has no {part}; get the file again")
    r = max(map(parts.rank, parts.modules))
    for module, names in parts.modules.items():
        own, rows = parts.rank(module), parts.file.about[names[A]].shape[0]
        if own < r and rows != own:
            raise InputError(
                f"{module} holds experts of rank {own}, and another module has rank "
                f"{r}; such a file cannot be written without a rank_pattern"
            )
    return r


def _scaled(tensor: Tensor, scaling: float) -> Tensor:
    """Return s B: in B's dtype if that is exact, else rounded once to float32."""
    exact = tensor.double() * scaling
    kept = exact.to(tensor.dtype)
    return kept if torch.equal(kept.double(), exact) else exact.float()


def _filled(tensor: Tensor, side: int, more: int) -> Tensor:
    shape = [*tensor.shape]
    shape[side] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=side)
