"""Rewrite an adapter so that every loader computes its scale: alpha = r, no patterns.

Each scale is folded into B, and into the bias beside B. Smaller ranks are filled up
with zeros to the largest one. What the adapter does stays the same, up to the one
rounding of s B.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop.contents import BIAS, A, B, Contents
from minipeft.interop.merging import write_text
from minipeft.interop.peft_format import CONFIG, WEIGHTS
from minipeft.interop.tensors import About, writing


def fix(
    contents: Contents,
    out: Path,
    step: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the equivalent adapter into a new folder.

    Args:
        contents: of the adapter's folder.
        out: the new folder; it must hold no adapter.
        step: is called with each tensor, for progress.

    Raises:
        InputError: the folder holds an adapter, the method has no pairs A and B, or
            experts have ranks that differ.
    """
    r = _largest(contents, out)
    owners = {
        name: (module, part)
        for module, parts in contents.modules.items()
        for part, name in parts.items()
    }
    about = {name: _about(contents, name, owners, r) for name in contents.file.about}
    with writing(out / WEIGHTS, about, contents.file.metadata) as writer:
        for name in about:
            writer.write(name, _tensor(contents, name, owners, r))
            step(name)
    config = {
        **contents.config,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")


Owners = dict[str, tuple[str, str]]


def _largest(contents: Contents, out: Path) -> int:
    if contents.config.get("peft_type") != "LORA" or not contents.modules:
        raise InputError(
            f"an adapter of type {contents.config.get('peft_type')!r} has no scale to "
            "fold; only LoRA and DoRA are rewritten"
        )
    for name in (CONFIG, WEIGHTS):
        if (out / name).exists():
            raise InputError(f"{out / name} exists; choose another folder")
    for module, parts in contents.modules.items():
        if A not in parts or B not in parts:
            raise InputError(
                f"{module} has no {B if A in parts else A}; get the file again"
            )
    ranks = {module: contents.rank(module) for module in contents.modules}
    r = max(ranks.values())
    for module, own in ranks.items():
        rows = contents.file.about[contents.modules[module][A]].shape[0]
        if own < r and rows != own:
            raise InputError(
                f"{module} holds experts of rank {own}, and another module has rank "
                f"{r}; such a file cannot be written without a rank_pattern"
            )
    return r


def _about(contents: Contents, name: str, owners: Owners, r: int) -> About:
    old = contents.file.about[name]
    module, part = owners.get(name, ("", ""))
    rank = contents.rank(module) if module else r
    if part == A:
        return About(old.dtype, (old.shape[0] + r - rank, *old.shape[1:]))
    if part not in (B, BIAS):
        return old
    dtype = _folded(contents, name, module).dtype
    if part == BIAS:
        return About(dtype, old.shape)
    return About(dtype, (old.shape[0], old.shape[1] + r - rank, *old.shape[2:]))


def _tensor(contents: Contents, name: str, owners: Owners, r: int) -> Tensor:
    module, part = owners.get(name, ("", ""))
    if part not in (A, B, BIAS):
        return contents.file.read(name)
    tensor = contents.file.read(name)
    if part != A:
        tensor = _folded(contents, name, module)
    more = r - contents.rank(module)
    if part == BIAS or not more:
        return tensor
    side = 0 if part == A else 1
    shape = [*tensor.shape]
    shape[side] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=side)


def _folded(contents: Contents, name: str, module: str) -> Tensor:
    """Return s B: in B's dtype where that is exact, else rounded once to float32."""
    exact = contents.file.read(name).double() * contents.scaling(module)
    kept = exact.to(contents.file.about[name].dtype)
    return kept if torch.equal(kept.double(), exact) else exact.float()
