"""LoRA+: the matrix that starts at zero learns faster than the one that is random."""

from typing import TypedDict

from torch import nn

from minipeft.errors import InputError
from minipeft.torch.adapted import Adapted
from minipeft.torch.linear import Lookup
from minipeft.torch.lora import LoRA


class Group(TypedDict):
    """What torch's optimizers take: parameters, and their learning rate."""

    params: list[nn.Parameter]
    lr: float


def parameter_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[Group]:
    r"""Return what is trained in two groups: $\eta_B = \lambda \eta_A$.

    B of every LoRA, and of what derives from it, learns at `ratio` times `lr`; all else
    at `lr`. In an embedding A is the matrix that starts at zero: there A is the faster.

    Args:
        model: with adapters in it.
        lr: of A and of all that is no LoRA.
        ratio: the paper's lambda, above 0; it recommends 16.

    Raises:
        InputError: if a rate is out of range, or there is no LoRA to speed up.

    Source: LoRA+ (arXiv:2402.12354), section 4.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}; choose a finite number above 0.")
    fast = {
        id(parameter): parameter
        for layer in model.modules()
        if isinstance(layer, Adapted)
        for parameter in _started_at_zero(layer)
    }
    if not fast:
        raise InputError(
            "the model has no LoRA; inject one, then group its parameters."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    slow: Group = {"params": [p for p in trained if id(p) not in fast], "lr": lr}
    return [slow, {"params": [*fast.values()], "lr": lr * ratio}]


def _started_at_zero(layer: Adapted[nn.Module]) -> list[nn.Parameter]:
    updates = [a for a in layer.adapters.values() if isinstance(a, LoRA)]
    turned = isinstance(layer.view, Lookup)
    return [update.A if turned else update.B for update in updates]
