"""What is wrong with a batch, a loss or a gradient: the true cause in a sentence."""

from collections.abc import Mapping

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.checkpoint import trainable

IGNORE = -100
"""The label that the loss leaves out: torch's convention."""


def predicted(labels: torch.Tensor) -> int:
    """Return how many labels count: a sequence's first token is never predicted."""
    shifts = labels.ndim == 2 and not labels.is_floating_point()
    kept = labels[:, 1:] if shifts else labels
    return int((kept != IGNORE).sum())


def checked_labels(batch: Mapping[str, torch.Tensor], step: int) -> int:
    """Return how many labels of a batch count.

    Raises:
        InputError: The batch is empty, or all its labels are ignored: the mean over
            them would be 0 / 0.
    """
    labels = batch["labels"]
    if not labels.numel():
        raise InputError(f"the batch of step {step + 1} is empty; give it examples")
    count = predicted(labels)
    if not count:
        raise InputError(
            f"the batch of step {step + 1} has no label to learn from: all that are "
            f"predicted are {IGNORE}, which the loss ignores; look at how labels are "
            "masked and where texts are cut"
        )
    return count


def bad_loss(model: nn.Module, value: float, lr: float) -> str:
    """Say why a loss is not finite: a weight that is not, or a step too large."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            cause = (
                f"lower the learning rate (it is {lr:g})"
                if parameter.requires_grad
                else "the base is damaged: load it again"
            )
            return f"the loss became {value}, since {name} is not finite; {cause}"
    return (
        f"the loss became {value} from finite weights; lower the learning rate (it is "
        f"{lr:g}), or use a dtype with a wider range"
    )


def bad_gradient(model: nn.Module, norm: float) -> str:
    """Say which gradient is not finite."""
    for name, parameter in trainable(model).items():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return (
                f"the gradient of {name} is not finite though the loss is; look for a "
                "division by zero or a root of zero in the model"
            )
    return f"the norm of the gradient is {norm}, beyond its dtype; scale the loss down"
