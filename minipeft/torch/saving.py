"""Refuse `save_pretrained` of a changed model, because it could not be loaded again.

`from_pretrained` finds weights by their names, and the weights of a changed model have
other names: it would warn and start from random weights. So each module with a
`save_pretrained` gets a method on its instance that raises an error. `state_dict` works
as before.
"""

from typing import Any, NoReturn

from torch import nn

from minipeft.errors import InputError

METHOD = "save_pretrained"


class Refusal:
    """The method that replaces `save_pretrained`; it reports its first reason."""

    def __init__(self, reasons: tuple[str, ...]):
        self.reasons = reasons

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise the error for any arguments."""
        raise InputError(f"save_pretrained is refused: {self.reasons[0]}")


def refuse(model: nn.Module, reason: str) -> None:
    """Make `save_pretrained` of the model and of its parts raise an error."""
    for module in model.modules():
        if hasattr(type(module), METHOD):
            reasons = dict.fromkeys((reason, *_reasons(module)))
            vars(module)[METHOD] = Refusal(tuple(reasons))


def allow(model: nn.Module, reason: str) -> None:
    """Remove one reason; after the last one the method of the class works again."""
    for module in model.modules():
        left = tuple(r for r in _reasons(module) if r != reason)
        if left:
            vars(module)[METHOD] = Refusal(left)
        elif _reasons(module):
            del vars(module)[METHOD]


def _reasons(module: nn.Module) -> tuple[str, ...]:
    held = vars(module).get(METHOD)
    return held.reasons if isinstance(held, Refusal) else ()
