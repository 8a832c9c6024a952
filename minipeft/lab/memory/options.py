"""One run, as a person names it: the options of `minipeft memory`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minipeft.errors import InputError
from minipeft.lab.memory.rows import (
    METHODS,
    VIRTUAL,
    Adapter,
    adapter_parameters,
    frozen_values,
)
from minipeft.lab.memory.shapes import Architecture
from minipeft.lab.memory.training import (
    Peak,
    Precision,
    Step,
    base_memory,
    peak,
    quantized_bits,
)
from minipeft.values import check_flag, check_integer, check_kind


class Base(NamedTuple):
    """How the frozen weights are stored: bytes a number, and of what stays exact."""

    linears: float
    rest: int


BASES: Mapping[str, Base] = {
    "float32": Base(4, 4),
    "bfloat16": Base(2, 2),
    "nf4": Base(quantized_bits(4, 64) / 8, 2),
    "nf4-double": Base(quantized_bits(4, 64, 256) / 8, 2),
}


class Optimizer(NamedTuple):
    """Bytes a trained parameter: of the states, while stepping, and on the host."""

    states: float
    transient: float
    paged: float = 0.0


EIGHT = 2 + 2 * 4 / 256
"""Two codes of 8 bits, and their float32 scales, one for 256 of them."""

OPTIMIZERS: Mapping[str, Optimizer] = {
    "adamw": Optimizer(8, 4),
    "adamw16": Optimizer(4, 2),
    "adamw-master": Optimizer(12, 4),
    "adamw8": Optimizer(EIGHT, 0),
    "paged-adamw": Optimizer(8, 0, 8),
    "paged-adamw8": Optimizer(EIGHT, 0, EIGHT),
    "sgd": Optimizer(0, 0),
}
"""AdamW with float32 states; with 16-bit states, as torch has them over 16-bit weights;
with a float32 copy of such weights; with 8-bit states; with states on the host."""


@dataclass(frozen=True)
class Options:
    """What a run's memory depends on, besides the model.

    Attributes:
        method: one of `METHODS`.
        r: the rank; of a bottleneck its width, of virtual tokens their number.
        targets: last parts of names; empty: where the method stands by default.
        base: one of `BASES`; activations are of 16 bits unless it is float32.
        optimizer: one of `OPTIMIZERS`.
        batch: sequences.
        sequence: tokens of one.
        attention: `fused`, `masked` or `eager`.
        checkpointing: whether blocks are computed again in the backward pass.
        experts: whether a quantized base quantizes its experts, as ours does.
        adapt_experts: whether LoRA stands on every expert too.
    """

    method: str = "lora"
    r: int = 16
    targets: Sequence[str] = ()
    base: str = "bfloat16"
    optimizer: str = "adamw"
    batch: int = 1
    sequence: int = 512
    attention: str = "fused"
    checkpointing: bool = False
    experts: bool = True
    adapt_experts: bool = False

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.method == "qlora":
            raise InputError(
                "qlora is lora over a base of four bits; choose the method lora and "
                "the base nf4-double"
            )
        _choose("method", self.method, METHODS)
        _choose("base", self.base, tuple(BASES))
        _choose("optimizer", self.optimizer, tuple(OPTIMIZERS))
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.targets and self.method in ("full", *VIRTUAL):
            raise InputError(
                f"targets are {[*self.targets]}, and {self.method} stands on no linear "
                "layer; leave them out, or choose another method"
            )
        self._check_base()

    def _check_base(self) -> None:
        """Refuse what a method does not train, or does not stand on."""
        if self.method == "full" and self.adapt_experts:
            raise InputError(
                "full trains the experts without adapters; leave adapt_experts "
                "(--adapt-experts) out, or choose lora"
            )
        if self.method == "loftq" and self.base != "nf4":
            raise InputError(
                f"the base is {self.base}, and loftq stores the layers that it adapts "
                "in NF4 with plain constants; choose the base nf4 (--base nf4)"
            )
        if self.method == "full" and self.base.startswith("nf4"):
            raise InputError(
                f"the base is {self.base}, and weights in 4 bits are not trained; "
                "choose a method with adapters, or bfloat16"
            )

    def _check_kinds(self) -> None:
        for name in ("method", "base", "optimizer", "attention"):
            check_kind(name, getattr(self, name), str)
        for name in ("r", "batch", "sequence"):
            check_integer(name, getattr(self, name))
        for name in ("checkpointing", "experts", "adapt_experts"):
            check_flag(name, getattr(self, name))
        check_kind("targets", self.targets, list, tuple)

    @property
    def adapter(self) -> Adapter | None:
        """What trains; None: everything."""
        if self.method == "full":
            return None
        return Adapter(self.r, self.targets or None, self.method, self.adapt_experts)

    @property
    def precision(self) -> Precision:
        """Bytes a number, by what it is for."""
        base, whole = BASES[self.base], self.method == "full"
        short = 4 if self.base == "float32" else 2
        return Precision(
            weights=base.linears,
            gradients=short if whole else 4,
            states=OPTIMIZERS[self.optimizer].states,
            activations=short,
            rest=base.rest,
            experts=None if self.experts else float(base.rest),
        )

    def trained(self, model: Architecture) -> int:
        """Return how many parameters train.

        Raises:
            InputError: the options do not fit this model.
        """
        adapter = self.adapter
        self._check(model)
        return adapter_parameters(model, adapter) if adapter else model.parameters

    def peak(self, model: Architecture) -> Peak:
        """Return the fullest moment of a step on this model."""
        optimizer, trained = OPTIMIZERS[self.optimizer], self.trained(model)
        step = Step(
            attention=self.attention,
            checkpointing=self.checkpointing,
            transient=optimizer.transient,
            paged=optimizer.paged * trained,
        )
        tokens = (self.batch, self.sequence)
        return peak(model, tokens, self.adapter, self.precision, step)

    def host(self, model: Architecture) -> float:
        """Return the bytes of states that a paged optimizer keeps on the host."""
        return OPTIMIZERS[self.optimizer].paged * self.trained(model)

    def weights(self, model: Architecture) -> dict[str, float]:
        """Return the bytes of the weights by what they are, constants apart."""
        parts = base_memory(model, self.precision)
        constants = 0.0
        if self.base.startswith("nf4"):
            counted = replace(self.precision, weights=0.5)
            codes = base_memory(model, counted)
            constants = sum(parts.values()) - sum(codes.values())
            parts = codes
        found = {name: size for name, size in parts.items() if size}
        if constants:
            found["quantization constants"] = constants
        adapter = self.adapter
        if adapter is not None:
            found["adapters"] = 4.0 * adapter_parameters(model, adapter)
            frozen = 4.0 * frozen_values(model, adapter)
            found |= {"the adapters' frozen part": frozen} if frozen else {}
        return found

    def _check(self, model: Architecture) -> None:
        tokens = self.sequence + (self.r if self.method == "prompt" else 0)
        if 0 < model.positions < tokens:
            raise InputError(
                f"the sequence has {tokens} tokens, and this model has positions for "
                f"{model.positions}; choose a shorter one"
            )
        if self.adapter is not None:
            self.adapter.check(model)


def _choose(what: str, word: str, choices: Sequence[str]) -> None:
    if word not in choices:
        raise InputError(f"there is no {what} {word!r}; choose {', '.join(choices)}")
