"""LoRA+: the matrix that starts at zero gets a larger learning rate."""

from typing import TypedDict

from torch import nn

from minipeft.errors import InputError
from minipeft.torch.adapted import Adapted
from minipeft.torch.linear import Lookup
from minipeft.torch.lora import LoRA
from minipeft.values import check_kind, check_number


class Group(TypedDict):
    """A parameter group for torch's optimizers: parameters and learning rate."""

    params: list[nn.Parameter]
    lr: float


def parameter_groups(model: nn.Module, lr: float, ratio: float = 4.0) -> list[Group]:
    r"""Return the trained parameters in two groups: $\eta_B = \lambda \eta_A$.

    B of every LoRA, and of classes derived from LoRA, gets the rate `ratio` times `lr`.
    All other parameters get `lr`. In an embedding A starts at zero, so A gets the
    higher rate there.

    Args:
        model: with adapters in it.
        lr: of A and of the parameters outside LoRA.
        ratio: the paper's lambda, above 0; with B zero at the start the paper finds 4
            to 8 on RoBERTa (with A zero 16), and 2 to 4 on Llama.

    Raises:
        InputError: if a rate is out of range, or the model has no LoRA.

    Source: LoRA+ (arXiv:2402.12354), sections 4 and 5.3.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        check_number(name, value)
        if not value > 0:
            raise InputError(f"{name} is {value}; choose a finite number above 0.")
    check_kind("model", model, nn.Module)
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
