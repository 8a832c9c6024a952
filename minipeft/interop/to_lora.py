"""Write any method that changes weights as plain LoRA, by SVD, and report the loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop import peft_model, peft_virtual, peft_write
from minipeft.interop.made import Made
from minipeft.interop.peft_folder import Contents, check_holds, read_config
from minipeft.interop.peft_model import contents_with, target_modules, trained_beside
from minipeft.interop.peft_rows import BiasedLoRA
from minipeft.torch import inject, lora
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.linear import full_precision
from minipeft.torch.lora import LoRA


@dataclass(frozen=True)
class Approximation:
    r"""A plain LoRA and its distance from the original update.

    Args:
        contents: of the adapter's folder; `peft_folder.write` writes it.
        errors: of each layer, $\|\Delta W - B A\|_F / \|\Delta W\|_F$; 0 for no change.
        ranks: of each layer.
        norms: of each layer, $\|\Delta W\|_F$.
    """

    contents: Contents
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    norms: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that error."""
        return max(self.errors.items(), key=lambda one: one[1])

    @property
    def error(self) -> float:
        """The error of all layers together, relative to the norm of all updates."""
        lost = sum((self.errors[key] * norm) ** 2 for key, norm in self.norms.items())
        whole = sum(norm**2 for norm in self.norms.values())
        return sqrt(lost / whole) if whole else 0.0


def to_lora(
    model: nn.Module,
    rank: int | None = None,
    share: float | None = None,
    made: Made | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> Approximation:
    r"""Return the active update of every layer as plain LoRA of scaling 1.

    $\Delta W = U S V^T$ is cut after the largest singular values: no LoRA of that rank
    is nearer (Eckart, Young, Mirsky). Changes of biases are kept exactly.

    Args:
        model: with active adapters of any method that changes weights.
        rank: of every layer; or
        share: of $\|\Delta W\|_F^2$ that each layer keeps, above 0, at most 1: each
            layer gets the smallest rank that does.
        made: what only the caller knows of the training.
        step: is called with the name of each layer, for progress.

    Raises:
        InputError: not one of rank and share is given, one is out of range, the
            method changes no weight, or the model has virtual tokens too.
    """
    choose = _chooser(rank, share)
    peft_virtual.check_one_kind(model)
    layers = inject.adapted(model)
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no adapter that changes weights; inject one"
        )
    found, errors, norms = {}, {}, {}
    for key, layer in layers.items():
        with naming(key):
            found[key], errors[key], norms[key] = _nearest(layer, choose)
        step(key)
    plain = _with_biases(found, layers)
    result = peft_write.lora(plain, layers)
    result.config["target_modules"] = target_modules(list(layers), model)
    contents = contents_with(result, model, trained_beside(model), made or Made())
    ranks = {key: len(adapter.A) for key, adapter in found.items()}
    return Approximation(contents, errors, ranks, norms)


def of_files(
    base: str | Path,
    adapter: str | Path,
    chosen: tuple[int | None, float | None],
    allow_base_mismatch: bool = False,
    step: Callable[[str], None] = lambda name: None,
) -> Approximation:
    """Return the adapter of a folder as plain LoRA; its model is loaded for that.

    Args:
        base: a model's folder, of a class of transformers.
        adapter: a folder in peft's format, of any method that changes weights.
        chosen: rank and share, of which one is None, as `to_lora` takes them.
        allow_base_mismatch: do not compare the base with the one that the file names.
        step: is called with the name of each layer, for progress.

    Raises:
        InputError: as `to_lora`, or the folders do not fit each other.
    """
    import transformers

    _chooser(*chosen)  # both refuse before a model is loaded
    check_holds(adapter)
    config = read_config(base, "config.json")
    (kind, *_) = config.get("architectures") or [""]
    if not hasattr(transformers, str(kind)):
        raise InputError(
            f"{Path(base) / 'config.json'} names the class {kind!r}, which "
            "transformers does not have; give a model's folder"
        )
    try:
        model = getattr(transformers, kind).from_pretrained(
            base, dtype="auto", local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"transformers does not load {base}: {reason}; give a model's folder"
        ) from error
    model = peft_model.load(model, adapter, allow_base_mismatch=allow_base_mismatch)
    return to_lora(model, *chosen, step=step)


Chooser = Callable[[Tensor], int]


def _chooser(rank: int | None, share: float | None) -> Chooser:
    """Return the function that chooses a rank from singular values."""
    if (rank is None) == (share is None):
        raise InputError(
            f"rank is {rank} and share is {share}; give one of the two, not both"
        )
    if rank is not None:
        if rank < 1:
            raise InputError(f"rank is {rank}; choose at least 1")
        wanted = rank
        return lambda S: wanted
    least = share or 0.0
    if not 0 < least <= 1:
        raise InputError(f"share is {share}; choose above 0, at most 1")

    def of_share(S: Tensor) -> int:
        kept = S.double().square().cumsum(0)
        return int((kept < least * kept[-1]).sum()) + 1

    return of_share


@torch.no_grad()
def _nearest(layer: Adapted[Any], choose: Chooser) -> tuple[LoRA, float, float]:
    delta = layer.delta()
    with full_precision(delta.device):
        U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
        r = choose(S)
        lora.check_rank(r, delta.shape[1], delta.shape[0])
        root = S[:r].sqrt()
        found = LoRA(root[:, None] * Vt[:r], U[:, :r] * root, 1.0)
        norm = torch.linalg.matrix_norm(delta.double())
        left = delta.double() - found.B.double() @ found.A.double()
        error = torch.linalg.matrix_norm(left) / norm if norm else norm
    return found, float(error), float(norm)


@torch.no_grad()
def _with_biases(
    found: Mapping[str, LoRA], layers: Mapping[str, Adapted[Any]]
) -> dict[str, LoRA]:
    changes = {}
    for key, layer in layers.items():
        own = getattr(layer.base, "bias", None)
        changes[key] = None if own is None else layer.adapt_bias(own) - own
    if not any(c is not None and bool(c.any()) for c in changes.values()):
        return dict(found)
    bare = [key for key, change in changes.items() if change is None]
    if bare:
        raise InputError(
            f"the method changes biases, and {bare[0]} has none, so that no file of "
            "peft holds both; save it in the format of its own method"
        )
    return {
        key: BiasedLoRA(found[key], cast(Tensor, change).to(found[key].B.dtype))
        for key, change in changes.items()
    }
