"""Is this model really base + adapter, and if not, which mistake made it?

Tensor by tensor: bit for bit the merge that is rounded once; else within the bound that
any order of sums can reach; else the mistake that comes nearest, by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minipeft.interop.adapter import Adapter, counterpart
from minipeft.interop.bound import ROUNDOFF, allowed
from minipeft.interop.mistakes import MISTAKES, Mistake, other_alphas
from minipeft.interop.tensors import Tensors
from minipeft.interop.update import Update, exact, merged, stored

EXACT, BOUND, WRONG = "exact", "within the bound", "wrong"


@dataclass(frozen=True)
class Finding:
    """What the audit says of one tensor.

    Args:
        tensor: its name in the base.
        verdict: `exact`, `within the bound` or `wrong`.
        mistake: the name of the nearest mistake, if it is wrong.
        sentence: what happened.
        residual: how far the tensor is from what the mistake makes, relative to the
            size of the update (0: the mistake explains all).
        adapted: whether the adapter changes the tensor.
    """

    tensor: str
    verdict: str
    mistake: str = ""
    sentence: str = ""
    residual: float = 0.0
    adapted: bool = False


def audit(base: Tensors, adapter: Adapter, found: Tensors) -> Iterator[Finding]:
    """Yield a finding for each tensor of the base, and for each that is too many.

    Args:
        base: what the adapter was trained on.
        adapter: what should have been merged.
        found: the model that claims to be the merge.

    Raises:
        InputError: the adapter does not belong to the base.
    """
    adapter = adapter.renamed(base.about)
    expected = {*base.about, *adapter.saved}
    for name in sorted(expected):
        place = counterpart(name, found.about)
        if place is None:
            yield _missing(name, adapter)
        else:
            yield _judged(name, base, adapter, found, place)
    known = {counterpart(name, found.about) for name in expected}
    for name in sorted(found.about.keys() - known):
        yield _surplus(name, base, found)


def _missing(name: str, adapter: Adapter) -> Finding:
    if name in adapter.saved or name in adapter.updates:
        sentence = "the adapter trains this tensor, and the model does not have it"
        what = "head untied and lost" if "head" in name or "embed" in name else "lost"
        return Finding(name, WRONG, what, sentence, 1.0, adapted=True)
    return Finding(name, WRONG, "missing", "the model does not have this tensor", 1.0)


def _surplus(name: str, base: Tensors, found: Tensors) -> Finding:
    # A tied head may be written out: right, if it is a copy of the embedding.
    for other in found.about:
        tied = other != name and found.about[other] == found.about[name]
        if tied and "embed" in other and _same_bytes(found, name, found, other):
            return Finding(name, EXACT, sentence=f"a copy of {other}")
    return Finding(name, WRONG, "surplus", "the base has no such tensor", 1.0)


def _judged(
    name: str, base: Tensors, adapter: Adapter, found: Tensors, place: str
) -> Finding:
    if found.about[place].shape != _shape(name, base, adapter):
        wanted = _shape(name, base, adapter)
        sentence = f"its shape is {found.about[place].shape}, not {wanted}"
        return Finding(name, WRONG, "reshaped", sentence, 1.0, name in adapter.updates)
    if name in adapter.saved:
        return _replaced(name, base, adapter.saved[name], found.read(place))
    if name in adapter.biases:
        return _bias(name, base.read(name), adapter.biases[name], found.read(place))
    if name in adapter.updates:
        alphas = {update.alpha for update in adapter.updates.values()}
        update = adapter.updates[name]
        return judge(name, base.read(name), update, found.read(place), alphas)
    return _unchanged(name, base, found, place)


def _shape(name: str, base: Tensors, adapter: Adapter) -> tuple[int, ...]:
    if name in adapter.saved:
        return tuple(adapter.saved[name].shape)
    return base.about[name].shape


def judge(
    name: str, W: Tensor, update: Update, found: Tensor, alphas: set[float]
) -> Finding:
    """Say whether one tensor is W merged with its update.

    Args:
        name: of the tensor.
        W: of the base.
        update: of the adapter.
        found: the tensor to judge.
        alphas: every alpha of the adapter: taking another layer's is a mistake.
    """
    # In the wider of the two dtypes nothing is lost before the one rounding.
    W = W.to(torch.promote_types(W.dtype, found.dtype))
    right = merged(W, update).to(found.dtype)
    if same(right, found):
        return Finding(name, EXACT, adapted=True)
    wanted = stored(exact(W, update, torch.float64), update)
    difference = (found.to(torch.float64) - wanted).abs()
    rounded = W.to(found.dtype)  # only its dtype matters: one rounding to it
    limit = stored(allowed(rounded, update, exact(W, update, torch.float64)), update)
    if bool((difference <= limit).all()):
        return Finding(name, BOUND, adapted=True)
    return _nearest(name, W, update, found, alphas)


def _nearest(
    name: str, W: Tensor, update: Update, found: Tensor, alphas: set[float]
) -> Finding:
    size = float((merged(W, update).double() - W.double()).norm()) or 1.0
    best: tuple[float, Mistake] | None = None
    for mistake in (*MISTAKES, *other_alphas(W, update, alphas)):
        made = mistake.make(W, update)
        if made is None:
            continue
        rest = float((made.to(found.dtype).double() - found.double()).norm()) / size
        rest = rest if rest == rest else float("inf")
        if best is None or rest < best[0]:
            best = (rest, mistake)
    assert best is not None
    rest, mistake = best
    return Finding(name, WRONG, mistake.name, mistake.sentence, rest, adapted=True)


def _replaced(name: str, base: Tensors, saved: Tensor, found: Tensor) -> Finding:
    if same(saved.to(found.dtype), found):
        return Finding(name, EXACT, adapted=True)
    if name in base.about and same(base.read(name).to(found.dtype), found):
        sentence = "the adapter brings this tensor whole, and the base's stands here"
        return Finding(name, WRONG, "saved module ignored", sentence, 1.0, adapted=True)
    return Finding(
        name, WRONG, "changed", "it is neither the base's nor the adapter's", 1.0, True
    )


def _bias(name: str, bias: Tensor, added: Tensor, found: Tensor) -> Finding:
    right = (bias.float() + added.float()).to(found.dtype)
    limit = ROUNDOFF[found.dtype] * right.double().abs() * 2
    if same(right, found):
        return Finding(name, EXACT, adapted=True)
    if bool(((right.double() - found.double()).abs() <= limit).all()):
        return Finding(name, BOUND, adapted=True)
    if same(bias.to(found.dtype), found):
        return Finding(
            name, WRONG, "bias lost", "the bias is that of the base", 1.0, True
        )
    return Finding(
        name, WRONG, "bias scaled", "the bias was added with another scale", 1.0, True
    )


def _unchanged(name: str, base: Tensors, found: Tensors, place: str) -> Finding:
    if base.about[name] == found.about[place]:
        if _same_bytes(base, name, found, place):
            return Finding(name, EXACT)
    elif same(base.read(name).to(found.about[place].dtype), found.read(place)):
        return Finding(name, EXACT, sentence=f"cast to {found.about[place].dtype}")
    return Finding(
        name, WRONG, "wrong base", "the adapter leaves it alone, and it is another", 1.0
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


def _same_bytes(one: Tensors, name: str, other: Tensors, place: str) -> bool:
    pairs = zip(one.pieces(name), other.pieces(place), strict=True)
    return all(a == b for a, b in pairs)
