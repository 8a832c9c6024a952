"""Check whether a model is base + adapter; if not, name the mistake.

Each tensor gets one of three findings: equal, bit for bit, to the merge that is rounded
once; within the error bound of a correct merge in another order of sums; or wrong, with
the name of the nearest mistake.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minipeft.interop.adapter import Adapter
from minipeft.interop.apart import alike
from minipeft.interop.bound import ROUNDOFF, allowed
from minipeft.interop.mistakes import (
    BIAS_MISTAKES,
    INTO_DEQUANTIZED,
    MISTAKES,
    Mistake,
    experts,
    in_4_bits,
    other_alphas,
    other_expert,
    through_nested_nf4,
    through_nf4,
)
from minipeft.interop.rounding import Cast, FourBits, Rounded, Rounding, of
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import Tensors, bytes_of, is_finite, rows
from minipeft.interop.tying import HEAD, pulled_apart
from minipeft.interop.update import (
    ROWS,
    Update,
    delta,
    exact,
    in_rows,
    merged,
    merged_rows,
    one_thread,
    read,
    stored,
)

EXACT, BOUND, WRONG = "exact", "within the bound", "wrong"
WRONG_BASE, UNEXPLAINED = "wrong base", "unexplained"
RETIED = "head tied to the merged embedding"
INTO_ORIGINAL = "merged into the original weights"
OF_ORIGINAL = (
    "without the update, the tensor is rounded to the base's 4 bits; give the original "
    "with --base to judge it bit for bit"
)
NOT_FINITE = "the tensor holds NaN or an infinity"


@dataclass(frozen=True)
class Finding:
    """The finding of the audit for one tensor.

    Args:
        tensor: its name in the base.
        verdict: `exact`, `within the bound` or `wrong`.
        mistake: the name of the nearest mistake, if it is wrong; `unexplained` if that
            mistake leaves more than it explains.
        sentence: what happened.
        residual: distance of the tensor from the result of the mistake, or from the
            right merge if no mistake explains it, relative to the size of the update
            (0: the mistake explains the tensor).
        adapted: whether the adapter changes the tensor.
        stored: how the file changes a tensor that the adapter leaves alone.
    """

    tensor: str
    verdict: str
    mistake: str = ""
    sentence: str = ""
    residual: float = 0.0
    adapted: bool = False
    stored: str = ""


@dataclass(frozen=True)
class Stored:
    """A tensor of the audited model, and how its file rounds."""

    values: Tensor
    rounding: Rounding


def audit(base: Tensors, adapter: Adapter, found: Tensors) -> Iterator[Finding]:
    """Yield a finding for each tensor of the base, and for each extra tensor.

    Args:
        base: the model on which the adapter was trained.
        adapter: that should have been merged.
        found: the model to audit.

    Raises:
        InputError: the adapter does not belong to the base.
    """
    base, found = alike(base, found)
    ties = bool(counterpart(HEAD, {**found.about, **adapter.updates, **adapter.saved}))
    base, adapter = pulled_apart(base, adapter, ties)
    adapter = adapter.renamed(base.about)
    adapter.check_tables(base)
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


def concluded(findings: list[Finding]) -> list[Finding]:
    """Report another base once, instead of once for every tensor.

    The base is another one if more than half of the tensors that the adapter does not
    change differ from the base's, or if some differ and all that it does change are
    unexplained. Then the other tensors cannot be judged.
    """
    alone = [f for f in findings if not f.adapted]
    other = [f for f in alone if f.mistake == WRONG_BASE]
    changed = {f.mistake for f in findings if f.adapted}
    lost = bool(other) and changed == {UNEXPLAINED}
    if 2 * len(other) <= len(alone) and not lost:
        return findings
    sentence = (
        f"{len(other)} of the {len(alone)} tensors that the adapter leaves alone are "
        "not those of this base; give the base that was merged"
    )
    kept = [f for f in findings if f.verdict != WRONG]
    return [Finding(other[0].tensor, WRONG, WRONG_BASE, sentence, 1.0), *kept]


def _missing(name: str, adapter: Adapter) -> Finding:
    adapted = name in adapter.saved or name in adapter.updates
    sentence = "the adapter trains this tensor, and the model does not have it"
    if name == HEAD and not adapted:
        sentence = "the adapter changes the embedding alone, and the model has no head"
    if name == HEAD or (adapted and "embed" in name):
        what = "head untied and lost"
        return Finding(name, WRONG, what, sentence, 1.0, adapted=True)
    if adapted:
        return Finding(name, WRONG, "lost", sentence, 1.0, adapted=True)
    return Finding(name, WRONG, "missing", "the model does not have this tensor", 1.0)


def _surplus(name: str, base: Tensors, found: Tensors) -> Finding:
    # A tied head may be stored too: correct if it is a copy of the embedding.
    if copied := _embedding_of(name, found):
        return Finding(name, EXACT, sentence=f"a copy of {copied}")
    return Finding(name, WRONG, "surplus", "the base has no such tensor", 1.0)


def _judged(
    name: str, base: Tensors, adapter: Adapter, found: Tensors, place: str
) -> Finding:
    if found.about[place].shape != _shape(name, base, adapter):
        wanted = _shape(name, base, adapter)
        sentence = f"its shape is {found.about[place].shape}, not {wanted}"
        return Finding(name, WRONG, "reshaped", sentence, 1.0, name in adapter.updates)
    own, kept = base.about.get(name), found.about[place].dtype
    adapted = name in {*adapter.saved, *adapter.biases, *adapter.updates}
    if own is not None and own.dtype.is_floating_point > kept.is_floating_point:
        sentence = f"it holds {kept}, and the base {own.dtype}".replace("torch.", "")
        return Finding(name, WRONG, "no floats", sentence, 1.0, adapted)
    if not adapted:
        return _unchanged(name, base, found, place)
    if _is_exact(name, base, adapter, found, place):
        return Finding(name, EXACT, adapted=True)
    held = Stored(found.read(place), of(found, place, kept))
    return _changed(name, base, adapter, held)


def _changed(name: str, base: Tensors, adapter: Adapter, held: Stored) -> Finding:
    """Judge a tensor that the adapter changes."""
    if name in adapter.saved:
        return _replaced(name, base, adapter.saved[name], held)
    if name in adapter.biases:
        weight = adapter.updates.get(f"{name.removesuffix('bias')}weight")
        s = weight.scaling if weight else 1.0
        return _bias(name, base.read(name), (adapter.biases[name], s), held.values)
    alphas = {update.alpha for update in adapter.updates.values()}
    finding = judge(name, base.read(name), adapter.updates[name], held, alphas)
    if finding.verdict == WRONG and finding.residual:
        if _before_4_bits(name, base, held.values, adapter.updates[name]):
            return Finding(name, WRONG, INTO_ORIGINAL, OF_ORIGINAL, adapted=True)
        return _of_another_expert(finding, base, adapter, held)
    return finding


def _is_exact(
    name: str, base: Tensors, adapter: Adapter, found: Tensors, place: str
) -> bool:
    """Return whether a matrix is the merged one, rounded by a cast, and finite.

    Both are read some rows at a time, and no further than the first that differ.
    """
    update, about = adapter.updates.get(name), found.about[place]
    if update is None or not in_rows(update, about) or isinstance(found, Rounded):
        return False
    rounded = torch.empty(min(ROWS, about.shape[0]), about.shape[1], dtype=about.dtype)
    pairs = merged_rows(base, name, update), rows(found, place, ROWS)
    with one_thread():
        for V, held in zip(*pairs, strict=True):
            right = rounded[: len(V)].copy_(V)
            if not same(right, held) or not is_finite(right):
                return False
    return True


def _of_another_expert(
    finding: Finding, base: Tensors, adapter: Adapter, held: Stored
) -> Finding:
    """Return the finding "another expert's update", if that mistake is nearer."""
    name = finding.tensor
    W, update = held.rounding.wide(base.read(name)), adapter.updates[name]
    mistakes = [
        mistake
        for other in experts(name, adapter.updates)
        if base.about[other].shape == base.about[name].shape
        for mistake in other_expert(
            other, held.rounding.wide(base.read(other)), adapter.updates[other]
        )
    ]
    found = nearest(name, W, update, held, mistakes) if mistakes else finding
    return min(finding, found, key=lambda one: one.residual)


def _shape(name: str, base: Tensors, adapter: Adapter) -> tuple[int, ...]:
    if name in adapter.saved:
        return tuple(adapter.saved[name].shape)
    return base.about[name].shape


def judge(
    name: str, W: Tensor, update: Update, found: Tensor | Stored, alphas: set[float]
) -> Finding:
    """Tell whether one tensor is W merged with its update.

    Args:
        name: of the tensor.
        W: of the base.
        update: of the adapter.
        found: the tensor to judge.
        alphas: of all layers, because another layer's alpha is a possible mistake.
    """
    held = found if isinstance(found, Stored) else Stored(found, Cast(found.dtype))
    if not is_finite(held.values):
        return Finding(name, WRONG, "not finite", NOT_FINITE, 1.0, adapted=True)
    if W.ndim == 3:
        return _stack(name, W, update, held, alphas)
    W = held.rounding.wide(W)  # wide enough for a single rounding
    if same(held.rounding.round(merged(W, update)), held.values):
        return Finding(name, EXACT, adapted=True)
    if _within(W, update, held):
        return Finding(name, BOUND, adapted=True)
    mistakes = (*MISTAKES, *other_alphas(W, update, alphas))
    return nearest(name, W, update, held, mistakes)


def _stack(
    name: str, W: Tensor, update: Update, held: Stored, alphas: set[float]
) -> Finding:
    """Say whether a stack of experts is right, expert by expert."""
    found = [_expert(e, W, update, held, alphas) for e in range(len(W))]
    wrong = [f"expert {e}" for e, one in enumerate(found) if one.verdict == WRONG]
    if not wrong:
        exactly = all(one.verdict == EXACT for one in found)
        return Finding(name, EXACT if exactly else BOUND, adapted=True)
    worst = max(found, key=lambda one: (one.verdict == WRONG, one.residual))
    number = found.index(worst)
    sentence = f"expert {number}: {worst.sentence} ({len(wrong)} of {len(W)} are wrong)"
    return replace(worst, tensor=name, sentence=sentence)


def _expert(
    e: int, W: Tensor, update: Update, held: Stored, alphas: set[float]
) -> Finding:
    name = f"expert {e}"
    own, one = update.expert(e), Stored(held.values[e], held.rounding)
    finding = judge(name, W[e], own, one, alphas)
    if finding.verdict != WRONG or not finding.residual:
        return finding
    wide = held.rounding.wide
    mistakes = [
        mistake
        for o in range(len(W))
        if o != e
        for mistake in other_expert(f"expert {o}", wide(W[o]), update.expert(o))
    ]
    other = nearest(name, wide(W[e]), own, one, mistakes) if mistakes else finding
    return min(finding, other, key=lambda f: f.residual)


def _within(W: Tensor, update: Update, held: Stored) -> bool:
    """Return whether a correct merge in another order of sums can give the tensor."""
    exactly = exact(W, update, torch.float64)
    if type(held.rounding) is not Cast:
        slack = stored(allowed(W, update, exactly), update)
        return held.rounding.reachable(held.values, stored(exactly, update), slack)
    difference = (held.values.to(torch.float64) - stored(exactly, update)).abs()
    rounded = W.to(held.values.dtype)  # only the dtype of `found` matters
    return bool((difference <= stored(allowed(rounded, update, exactly), update)).all())


def nearest(
    name: str, W: Tensor, update: Update, held: Stored, mistakes: Iterable[Mistake]
) -> Finding:
    r"""Return the finding with the mistake that is nearest to a wrong tensor.

    The mistake has its name only if it explains more than it leaves: if the tensor
    found is less than half as far from the mistake's result as from the right merge.
    $2\,|V_{found} - V_{mistake}| < |V_{found} - V_{right}|$; else it is unexplained.
    """
    right = merged(W, update)
    size = float((right.double() - W.double()).norm()) or 1.0
    whole = _distance(held.rounding.round(right), held.values, size)
    del right  # it may be large
    made = ((mistake, mistake.make(W, update)) for mistake in mistakes)
    rests = [
        (_distance(held.rounding.round(V), held.values, size), mistake)
        for mistake, V in made
        if V is not None
    ]
    rest, mistake = min(rests, key=lambda one: one[0])
    if isinstance(held.rounding, FourBits):
        mistake = in_4_bits(mistake)
    if not 2 * rest < whole:
        return _unexplained(name, mistake.name, rest, whole)
    return Finding(name, WRONG, mistake.name, mistake.sentence, rest, adapted=True)


def _distance(made: Tensor, found: Tensor, size: float) -> float:
    """Return |made - found| / size; infinite if it is no number."""
    rest = float((made.double() - found.double()).norm()) / size
    return math.inf if math.isnan(rest) else rest


def _unexplained(name: str, mistake: str, rest: float, whole: float) -> Finding:
    sentence = (
        f"no known mistake explains more than it leaves; the nearest, {mistake!r}, "
        f"leaves {rest:.2g} of the update"
    )
    return Finding(name, WRONG, UNEXPLAINED, sentence, whole, adapted=True)


def _replaced(name: str, base: Tensors, saved: Tensor, held: Stored) -> Finding:
    found = held.values
    if same(held.rounding.round(saved), found):
        return Finding(name, EXACT, adapted=True)
    if name in base.about and same(held.rounding.round(base.read(name)), found):
        sentence = "the adapter brings this tensor whole, and the base's stands here"
        return Finding(name, WRONG, "saved module ignored", sentence, 1.0, adapted=True)
    return Finding(
        name, WRONG, "changed", "it is neither the base's nor the adapter's", 1.0, True
    )


def _bias(
    name: str, bias: Tensor, change: tuple[Tensor, float], found: Tensor
) -> Finding:
    """Judge a bias; the change comes with the scale of the update beside it."""
    added, s = change[0].float(), change[1]
    right = (bias.float() + added).to(found.dtype)
    limit = ROUNDOFF[found.dtype] * right.double().abs() * 2
    if same(right, found):
        return Finding(name, EXACT, adapted=True)
    if bool(((right.double() - found.double()).abs() <= limit).all()):
        return Finding(name, BOUND, adapted=True)
    size = float(added.double().norm()) or 1.0
    made = (m.make(bias.float(), added, s).to(found.dtype) for m in BIAS_MISTAKES)
    rests = [_distance(one, found, size) for one in made]
    rest = min(rests)
    mistake = BIAS_MISTAKES[rests.index(rest)]
    whole = _distance(right, found, size)
    if not 2 * rest < whole:
        return _unexplained(name, mistake.name, rest, whole)
    return Finding(name, WRONG, mistake.name, mistake.sentence, rest, adapted=True)


def _unchanged(name: str, base: Tensors, found: Tensors, place: str) -> Finding:
    about = found.about[place]
    if base.about[name] == about and _same_bytes(base, name, found, place):
        return Finding(name, EXACT)
    if base.about[name] != about or isinstance(found, Rounded):
        rounding, W = of(found, place, about.dtype), base.read(name)
        held = found.read(place)
        if same(rounding.round(W), held):
            if not is_finite(held) and is_finite(W):
                return Finding(name, WRONG, "not finite", NOT_FINITE, 1.0)
            wider = rounding == Cast(torch.promote_types(W.dtype, about.dtype))
            how = f"{'kept in' if wider else 'rounded to'} {rounding.name}"
            sentence = "the base's, as this file rounds"
            return Finding(name, EXACT, sentence=sentence, stored=how)
    held = found.read(place)
    if _before_4_bits(name, base, held):
        how = f"before it was rounded to {of(base, name, held.dtype).name}"
        return Finding(name, EXACT, sentence="the base rounds it", stored=how)
    if _is_through_nf4(base.read(name), held):
        return Finding(name, WRONG, INTO_DEQUANTIZED, "it is what NF4 leaves of it")
    if name == HEAD and (copied := _embedding_of(place, found)):
        sentence = f"the adapter leaves it alone, and it is a copy of {copied}"
        return Finding(name, WRONG, RETIED, sentence, 1.0)
    return Finding(
        name, WRONG, WRONG_BASE, "the adapter leaves it alone, and it is another", 1.0
    )


def _embedding_of(head: str, found: Tensors) -> str:
    """Return the name of the embedding of which the head is a copy, or ""."""
    for other, about in found.about.items():
        tied = "embed" in other and other != head and about == found.about[head]
        if tied and _same_bytes(found, head, found, other):
            return other
    return ""


def _before_4_bits(
    name: str, base: Tensors, found: Tensor, update: Update | None = None
) -> bool:
    """Return whether a 4-bit base is what a tensor without its update is rounded to.

    Then the adapter was merged into the weights before they were quantized.
    """
    rounding = of(base, name, found.dtype)
    if not isinstance(rounding, FourBits) or not found.is_floating_point():
        return False
    wanted, slack = found.double(), torch.zeros(())
    if update is not None:
        if update.magnitude is not None or found.ndim != 2:
            return False
        bound = allowed(found, update, read(wanted, update))
        slack = stored(bound, update)
        wanted = wanted - stored(delta(update, torch.float64), update)
    return rounding.reachable(base.read(name), wanted, slack)


def _is_through_nf4(W: Tensor, found: Tensor) -> bool:
    """Return whether a tensor is a plain weight after NF4, its scales nested or not."""
    if not W.is_floating_point() or W.ndim != 2 or W.dtype != found.dtype:
        return False
    return any(same(make(W), found) for make in (through_nf4, through_nested_nf4))


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same bits."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return _equal(bytes_of(one), bytes_of(other))


def _same_bytes(one: Tensors, name: str, other: Tensors, place: str) -> bool:
    pairs = zip(one.pieces(name), other.pieces(place), strict=True)
    return all(_equal(a, b) for a, b in pairs)


def _equal(one: memoryview, other: memoryview) -> bool:
    # Python compares two memoryviews value by value, which is slow.
    return np.array_equal(np.frombuffer(one, "u1"), np.frombuffer(other, "u1"))
