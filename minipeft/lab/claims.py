"""The statements of a chapter: quantities, claims with controls, best learning rates.

A quantity is printed with a label; if one label has two values, the book is not built.
A claim is asserted for the default model and number of steps. With other settings the
chapter only prints whether the claim holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from minipeft.errors import InputError

QUANTITIES: list[tuple[str, str]] = []
"""(label, value with its unit) of all quantities that this process has printed."""


@dataclass(frozen=True)
class Claims:
    """The statements of a chapter; `usual`: on a CPU, with default model and steps."""

    usual: bool

    def quantity(self, label: str, value: float, unit: str, digits: int = 3) -> float:
        """Print `label: value unit` and return the value.

        In the whole book a label stands for one value: name the setting in it, as in
        "Llama 7B, LoRA r = 64, 1 x 512 tokens: memory in all".

        Args:
            label: the measured quantity and its setting.
            value: in that unit.
            unit: as it is printed, "GB" or "nats per token"; "" for a count.
            digits: behind the point.

        Raises:
            InputError: the label is empty.
        """
        if not label.strip():
            raise InputError(f"the value {value:g} {unit} has no label; name it")
        shown = f"{value:,.{digits}f} {unit}".rstrip()
        print(f"{label}: {shown}")
        QUANTITIES.append((label, shown))
        return value

    def claim(self, sentence: str, holds: object, control: str) -> bool:
        """Print whether a claim holds, with the control that could have refuted it.

        Args:
            sentence: the claim.
            holds: the comparison with the control, true or false.
            control: the baseline that this comparison uses.

        Raises:
            AssertionError: the claim does not hold, and the setting is usual.
            InputError: the control has no name.
        """
        if not control.strip():
            raise InputError(f"the claim {sentence!r} names no control; name one")
        true = bool(holds)
        if self.usual and not true:
            raise AssertionError(f"{sentence} (control: {control}): does not hold")
        verdict = "holds" if true else "does NOT hold with these options"
        print(f"claim: {sentence}\n  control: {control}\n  {verdict}")
        return true

    def best(self, name: str, losses: Mapping[float, float]) -> float:
        """Return the rate with the lowest loss, and claim that it is inside the sweep.

        Args:
            name: of the method.
            losses: of each learning rate that was tried, in nats.

        Raises:
            AssertionError: in the usual setting the best rate is the smallest or the
                largest that was tried.
        """
        rates = sorted(losses)
        best = min(rates, key=losses.__getitem__)
        tried = f"{rates[0]:g} to {rates[-1]:g}"
        inside = rates[0] < best < rates[-1]
        if self.usual and not inside:
            raise AssertionError(
                f"the best learning rate of {name}, {best:g}, is at the edge of what "
                f"was tried, {tried}; try rates beyond it"
            )
        edge = "" if inside else "; at the edge: a rate beyond it may be better"
        print(f"best learning rate of {name}: {best:g} (tried {tried}){edge}")
        return best
