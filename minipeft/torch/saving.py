"""`save_pretrained` of a changed model is refused, for it would not load again.

`from_pretrained` finds weights by their names. Those of a changed model have others:
it would warn, and start from random ones. So each module that has `save_pretrained`
gets one of its own instance, which refuses; `state_dict` is as ever.
"""

from typing import Any, NoReturn

from torch import nn

from minipeft.errors import InputError

METHOD = "save_pretrained"


class Refusal:
    """What stands in the place of the method; it says the first of its reasons."""

    def __init__(self, reasons: tuple[str, ...]):
        self.reasons = reasons

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, whatever is asked."""
        raise InputError(f"save_pretrained is refused: {self.reasons[0]}")


def refuse(model: nn.Module, reason: str) -> None:
    """Let `save_pretrained` of the model and of its parts refuse."""
    for module in model.modules():
        if hasattr(type(module), METHOD):
            reasons = dict.fromkeys((reason, *_reasons(module)))
            vars(module)[METHOD] = Refusal(tuple(reasons))


def allow(model: nn.Module, reason: str) -> None:
    """Take one reason back; after the last, the method of the class is there again."""
    for module in model.modules():
        left = tuple(r for r in _reasons(module) if r != reason)
        if left:
            vars(module)[METHOD] = Refusal(left)
        elif _reasons(module):
            del vars(module)[METHOD]


def _reasons(module: nn.Module) -> tuple[str, ...]:
    held = vars(module).get(METHOD)
    return held.reasons if isinstance(held, Refusal) else ()
