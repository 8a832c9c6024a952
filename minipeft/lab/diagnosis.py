"""Errors in a batch, a loss or a gradient, each with its cause in one sentence."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from minipeft.errors import InputError
from minipeft.lab.checkpoint import trainable
from minipeft.torch.inject import adapted
from minipeft.values import check_kind

IGNORE = -100
"""The label that the loss ignores, as in torch."""
GROWTH = 100
"""How many times larger than at the start, or than 1, no trained weight should get."""


def predicted(labels: torch.Tensor) -> int:
    """Return how many labels count: a sequence's first token is never predicted."""
    shifts = labels.ndim == 2 and not labels.is_floating_point()
    kept = labels[:, 1:] if shifts else labels
    return int((kept != IGNORE).sum())


def check_batch(batch: Mapping[str, torch.Tensor], step: int) -> None:
    """Refuse a batch without labels, or with inputs that are not finite."""
    check_kind(f"the batch of step {step + 1}", batch, Mapping)
    if "labels" not in batch:
        raise InputError(
            f"the batch of step {step + 1} has no labels, but {', '.join(batch)}; add "
            "the labels that the model learns from"
        )
    for name, operand in batch.items():
        floats = isinstance(operand, torch.Tensor) and operand.is_floating_point()
        if floats and bool(operand.isnan().any()):  # a mask may hold -inf
            raise InputError(
                f"{name} in the batch of step {step + 1} holds NaN; repair the data"
            )


def check_ids(model: nn.Module, batch: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse token ids and labels that the model has no row for.

    Torch would stop with an IndexError, and on a GPU with a failed assertion in a
    kernel, which names neither the id nor the batch.

    Args:
        model: of transformers, or around one; others have no table to compare with.
        batch: the model's arguments.
        where: the name of the batch in the message.
    """
    for name, count in _known(model, batch).items():
        ids = batch[name]
        if count is None or ids.is_floating_point() or ids.is_meta:
            continue
        # Not in the ids' own dtype: in uint8, -100 would be 156.
        kept = ids.long()[ids.long() != IGNORE] if name == "labels" else ids.long()
        strange = kept[(kept < 0) | (kept >= count)]
        for other in _other_inputs(model) if name == "input_ids" else ():
            strange = strange[strange != other]
        if strange.numel():
            raise InputError(
                f"{name} in {where} holds {int(strange[0])}, and the model knows "
                f"{count} of them, 0 to {count - 1}; use the tokenizer and labels that "
                "belong to the model, or enlarge it: model.resize_token_embeddings"
            )


def _known(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, int | None]:
    """Return how many ids the model knows of each kind in the batch; None: any."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    known = {}
    if isinstance(ids, torch.Tensor):
        known["input_ids"] = _rows(model, "get_input_embeddings")
    if isinstance(labels, torch.Tensor):
        known["labels"] = _rows(model, "get_output_embeddings")
        # One label for several texts is the number of a text; a map has its own marks.
        choices = isinstance(ids, torch.Tensor) and ids.dim() > 2
        if known["labels"] is None and not choices and labels.dim() < 3:
            known["labels"] = _classes(model)
    return known


def _rows(model: nn.Module, method: str) -> int | None:
    """Return the rows of the table that the first module with this method returns."""
    owner = next((m for m in model.modules() if hasattr(type(m), method)), None)
    try:
        weight = getattr(getattr(owner, method)(), "weight", None) if owner else None
    except NotImplementedError:  # transformers knows no table of sounds or characters
        return None
    return None if weight is None or weight.dim() != 2 else int(weight.shape[0])


def _other_inputs(model: nn.Module) -> list[int]:
    # Where an image or a sound comes in, some models have an id beyond their table.
    configs = (getattr(m, "config", None) for m in model.modules())
    config = next((c for c in configs if c is not None), None)
    kinds = (f"{kind}_token_id" for kind in ("image", "video", "audio"))
    ids = (getattr(config, kind, None) for kind in kinds)
    return [one for one in ids if isinstance(one, int)]


def _classes(model: nn.Module) -> int | None:
    # With one class, or where it is told to, transformers fits a number.
    count = getattr(model, "num_labels", 1)
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    fits = problem == "regression" or not isinstance(count, int) or count < 2
    return None if fits else count


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


class Start(NamedTuple):
    """What a run began with: the step, the rate, the largest trained number."""

    step: int
    lr: float
    largest: float


def start_of(model: nn.Module, step: int, lr: float) -> Start:
    """Note the start of a run, for the cause of what goes wrong in it."""
    return Start(step, lr, _largest(model))


def _largest(model: nn.Module) -> float:
    return max((float(p.detach().abs().max()) for p in _filled(model)), default=0.0)


def _filled(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in trainable(model).values() if p.numel() and not p.is_meta]


def grown(model: nn.Module, start: Start) -> str:
    """Say how the trained weights grew, if that is beyond what training does.

    Args:
        model: as it is now.
        start: of the run.

    Returns:
        the sizes then and now with the remedy, or nothing.
    """
    largest = _largest(model)
    if not largest > GROWTH * max(start.largest, 1.0):
        return ""
    return (
        f"the largest trained weight went from {start.largest:.3g} to {largest:.3g}; "
        f"lower the learning rate (it is {start.lr:g})"
    )


def bad_loss(model: nn.Module, value: float, step: int, start: Start) -> str:
    """Tell why a loss is not finite: a bad weight, too large a step, or the model.

    Args:
        model: that has this loss.
        value: of the loss.
        step: of the run, from 0; the first has changed no weight yet.
        start: of the run.
    """
    untrained = step == 0
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            if not parameter.requires_grad:
                cause = "the base is damaged: load it again"
            elif untrained:
                cause = "it was so before the first step: load or inject it again"
            else:
                cause = f"lower the learning rate (it is {start.lr:g})"
            return f"the loss became {value}, since {name} is not finite; {cause}"
    if untrained:
        return (
            f"the loss is {value} before anything was trained, and every weight is "
            "finite; use a dtype with a wider range, or look for a division by zero in "
            "the model"
        )
    if how := grown(model, start):
        return f"the loss became {value}: {how}"
    return (
        f"the loss became {value} from finite weights; lower the learning rate (it is "
        f"{start.lr:g}), or use a dtype with a wider range"
    )


def bad_gradient(model: nn.Module, norm: float, start: Start) -> str:
    """Name the gradient that is not finite, and the cause."""
    for name, parameter in trainable(model).items():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            cause = grown(model, start) or (
                "look for a division by zero or a root of zero in the model"
            )
            return f"the gradient of {name} is not finite though the loss is; {cause}"
    return f"the norm of the gradient is {norm}, beyond its dtype; scale the loss down"


def check_trains(model: nn.Module) -> None:
    """Refuse, before the first step, a model of which nothing or not all would train.

    Raises:
        InputError: Gradients are off; everything is frozen; what trains is offloaded;
            a layer is merged; the adapters that train are not active.
    """
    if not torch.is_grad_enabled():
        raise InputError(
            "gradients are off here; call train outside of torch.no_grad() and "
            "torch.inference_mode()"
        )
    layers, trained = adapted(model), {id(p) for p in trainable(model).values()}
    if not trained:
        raise InputError(
            "the adapters of the model are frozen, as all of it is; make them "
            "trainable: for part in adapters_of(model).values(): "
            "part.requires_grad_(True)"
            if layers
            else "no parameter requires gradients; inject an adapter first"
        )
    for name, parameter in trainable(model).items():
        if parameter.is_meta:
            raise InputError(
                f"{name} is a placeholder on the device meta, which gets no gradient; "
                "bring an offloaded model back first (accelerate: "
                "remove_hook_from_submodules), or load its weights"
            )
    for name, layer in layers.items():
        merged = layer.merged_weight is not None
        if merged and any(id(p) in trained for p in layer.parameters()):
            raise InputError(
                f"{name} is merged: it computes with one weight, and its adapter would "
                f"not train; {_remedies(layer, layers, trained)}"
            )
    _check_active(layers, trained)


def _remedies(layer: Any, layers: Mapping[str, Any], trained: set[int]) -> str:
    """Say what to do with a merged layer; where more is trained, there are two ways."""
    mine = {id(p) for each in layers.values() for p in each.parameters()}
    for name, adapter in layer.adapters.items():
        if trained - mine and any(id(p) in trained for p in adapter.parameters()):
            return (
                "call unmerge(model) first, or, to train only what is beside the "
                "adapters, freeze them: for part in "
                f"adapters_of(model, {name!r}).values(): part.requires_grad_(False)"
            )
    return "call unmerge(model) first"


def _check_active(layers: Mapping[str, Any], trained: set[int]) -> None:
    idle, rest = {}, trained
    for layer in layers.values():
        for name, adapter in layer.adapters.items():
            mine = {id(p) for p in adapter.parameters()} & trained
            if mine and not layer.active.get(name):
                rest = rest - mine
                idle[name] = "has share 0" if name in layer.active else "is not active"
    if idle and not rest:
        name, how = next(iter(idle.items()))
        raise InputError(
            f"the adapter {name!r} {how}, so nothing would train; call "
            f"activate(model, {name!r}) first"
        )


def check_reached(model: nn.Module, again: Callable[[], object]) -> None:
    """Refuse where what trains is called only while gradients are off.

    Reentrant checkpointing calls a block so, and calls it once more with gradients only
    if one of its inputs requires one: torch warns of it and trains nothing there.

    Args:
        model: After backward.
        again: Computes the same forward and backward once more, to be watched; done
            only if something got no gradient, which may have other reasons.

    Raises:
        InputError: A module is called and gets no gradient for that reason.
    """
    grads = {p: p.grad for p in trainable(model).values()}
    if all(grad is not None for grad in grads.values()):
        return
    for parameter in grads:
        parameter.grad = None  # else what is added would stay
    called = _watched(model, again, {p for p in grads if grads[p] is not None})
    for parameter, grad in grads.items():
        parameter.grad = grad
    if lost := [name for name, with_gradients in called.items() if not with_gradients]:
        raise InputError(_reentrant(lost))


def no_gradient(model: nn.Module, batch: Mapping[str, Any]) -> str:
    """Tell why a loss depends on nothing that trains.

    Args:
        model: is called once more, to be watched.
        batch: that it is called with.
    """
    called = _watched(model, lambda: model(**batch), set())
    if lost := [name for name, with_gradients in called.items() if not with_gradients]:
        return _reentrant(lost)
    first = next(iter(called or trainable(model)))
    how = (
        "is called; look for detach() or torch.no_grad() in the model"
        if called
        else "belongs to no module that is called; train what the loss is computed with"
    )
    return f"the loss does not depend on the trainable parameters: {first} {how}"


def _watched(
    model: nn.Module, again: Callable[[], object], reached: set[nn.Parameter]
) -> dict[str, bool]:
    """Return the called modules that train, and whether gradients were on for one."""
    called: dict[str, bool] = {}
    hooks = []
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and not reached.intersection(own):
            hooks.append(module.register_forward_pre_hook(_note(called, name)))
    try:
        with torch.random.fork_rng():
            again()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _reentrant(lost: list[str]) -> str:
    return (
        f"{lost[0]} gets no gradient{_more(lost)}: it is computed under reentrant "
        "checkpointing, and no input of its block requires a gradient; pass "
        "use_reentrant=False, or call model.enable_input_require_grads()"
    )


def _note(called: dict[str, bool], name: str) -> Callable[..., None]:
    def hook(*_: object) -> None:
        called[name] = called.get(name, False) or torch.is_grad_enabled()

    return hook


def _more(names: list[str]) -> str:
    return f", as do {len(names) - 1} more" * (len(names) > 1)
