"""The contents of an adapter's folder, before any check.

`peft_format.read` refuses adapters that cannot be merged, but a report must describe
them. So the names of the tensors are sorted into modules here, and each tensor is read
when it is needed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop import peft_stacks
from minipeft.interop.peft_folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    check_holds,
    check_sum,
    read_config,
)
from minipeft.interop.peft_update import matched
from minipeft.interop.tensors import SafeTensors

PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A\.weight|"
    r"lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?)"
)
A, B, BIAS, MAGNITUDE = "A", "B", "bias", "magnitude"
NAMES = {
    "lora_A.weight": A,
    "lora_embedding_A": A,
    "lora_B.weight": B,
    "lora_embedding_B": B,
    "lora_B.bias": BIAS,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
}


@dataclass(frozen=True)
class Parts:
    """The configuration, the open file, and its tensors by module.

    Args:
        config: of the adapter.
        file: its tensors.
        modules: {module: {A, B, bias or magnitude: name of the tensor}}.
        others: names of tensors that belong to no pair A, B.
    """

    config: Mapping[str, Any]
    file: SafeTensors
    modules: Mapping[str, Mapping[str, str]]
    others: tuple[str, ...]

    @property
    def incomplete(self) -> tuple[str, ...]:
        """The modules without their A or their B."""
        return tuple(m for m, parts in self.modules.items() if not {A, B} <= set(parts))

    def tensor(self, module: str, part: str) -> Tensor | None:
        """Return one tensor of a module, or None if the file has none."""
        name = self.modules[module].get(part)
        return None if name is None else self.file.read(name)

    def rank(self, module: str, called: str = "") -> int:
        """Return the rank of one update, 0 if the file has no A.

        Stacked experts share one matrix: its rows are a multiple of the rank.

        Args:
            module: its path in the file.
            called: what the settings call it, if that is another name.
        """
        name = self.modules[module].get(A)
        rows = self.file.about[name].shape[0] if name else 0
        said = matched(
            self.config.get("rank_pattern") or {},
            called or module,
            self.config.get("r"),
        )
        return said if type(said) is int and said > 0 and rows % said == 0 else rows

    def alpha(self, module: str, called: str = "") -> float:
        """Return alpha of a module, NaN if the configuration has none."""
        patterns = self.config.get("alpha_pattern") or {}
        said = matched(patterns, called or module, self.config.get("lora_alpha"))
        return float(said) if isinstance(said, int | float) else math.nan

    def scaling(self, module: str, called: str = "") -> float:
        r"""Return $\alpha / r$, or $\alpha / \sqrt r$."""
        r = self.rank(module, called)
        root = math.sqrt(r) if self.config.get("use_rslora") else r
        return self.alpha(module, called) / root if r else math.nan

    def is_unclear(self, module: str) -> bool:
        """Return whether a pattern may mean a stack that the file does not name."""
        patterns = self.config.get("rank_pattern") or self.config.get("alpha_pattern")
        owner, _ = peft_stacks.owner(module)
        return bool(patterns and peft_stacks.parameters(owner, self.config))

    def embedding(self, module: str) -> bool:
        """Return whether the module is an embedding."""
        return any("lora_embedding" in name for name in self.modules[module].values())

    def not_finite(self) -> Iterator[str]:
        """Yield the names of the tensors that hold NaN or infinity."""
        for name in self.file.about:
            tensor = self.file.read(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield name


def read(folder: str | Path) -> Parts:
    """Open an adapter's folder.

    Raises:
        InputError: the configuration or the file is absent or damaged, or has another
            checksum than its own.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_holds(folder, WEIGHTS)
    if config.get("peft_type") == "LORA":
        _check(folder, config)
    file = SafeTensors(folder / WEIGHTS)
    check_sum(file)
    modules: dict[str, dict[str, str]] = {}
    others = []
    for name in file.about:
        found = PART.fullmatch(name.removeprefix(PREFIX))
        if found is None:
            others.append(name)
        else:
            modules.setdefault(found["module"], {})[NAMES[found["part"]]] = name
    return Parts(config, file, modules, tuple(others))


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose scale cannot be computed."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1:
        raise InputError(f"r in {folder / CONFIG} is {r!r}; it must be 1 or more")
    patterns = [config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise InputError(f"a pattern in {folder / CONFIG} is no JSON object; mend it")
    for value in (alpha, *patterns[0].values()):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"lora_alpha in {folder / CONFIG} is {value!r}; it must be finite"
            )
