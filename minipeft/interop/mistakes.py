"""The known mistakes in merging; each function makes one of them.

Each function takes the stored weight and the update, and returns the weight that a
program with this mistake writes. If the mistake cannot be made (no magnitude, not
square), the function returns None. The audit tries all functions on a wrong tensor.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from minipeft.interop.update import (
    Update,
    delta,
    exact,
    merged,
    read,
    row_norm,
    stored,
)
from minipeft.torch import blockwise, double_quant
from minipeft.torch.dora import over_norm

F32 = torch.float32
Maker = Callable[[Tensor, Update], Tensor | None]
Through = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mistake:
    """A name, a sentence about the mistake, and the function that makes it."""

    name: str
    sentence: str
    make: Maker


def not_applied(W: Tensor, update: Update) -> Tensor:
    """Do not change the base."""
    return W


def applied_twice(W: Tensor, update: Update) -> Tensor:
    """Merge into a weight that already contains the update."""
    return merged(merged(W, update), update)


def subtracted(W: Tensor, update: Update) -> Tensor:
    """Subtract the update: an unmerge of a weight that was never merged."""
    return merged(W, replace(update, alpha=-update.alpha))


def alpha_alone(W: Tensor, update: Update) -> Tensor:
    """Scale by alpha, not divided by the rank."""
    return merged(W, _scaled(update, update.alpha))


def not_scaled(W: Tensor, update: Update) -> Tensor:
    """Add B A without any scaling."""
    return merged(W, _scaled(update, 1.0))


def other_root(W: Tensor, update: Update) -> Tensor:
    """Divide by r for a rank-stabilized adapter, or by sqrt(r) for another."""
    return merged(W, replace(update, rank_stabilized=not update.rank_stabilized))


def transposed(W: Tensor, update: Update) -> Tensor | None:
    """Add the transpose of the update, which fits a square weight."""
    if update.magnitude is not None or not _square(update):
        return None
    V = read(W, update).to(F32) + delta(update, F32).T
    return stored(V, update).to(W.dtype)


def swapped(W: Tensor, update: Update) -> Tensor | None:
    """Exchange the values of A and B."""
    if not _square(update):
        return None
    A, B = update.B.reshape(update.A.shape), update.A.reshape(update.B.shape)
    return merged(W, replace(update, A=A, B=B))


def delta_rounded_first(W: Tensor, update: Update) -> Tensor | None:
    """Round the update to the dtype of the weight, then add in that dtype."""
    if update.magnitude is not None or W.dtype.itemsize > 2:
        return None
    rounded = delta(update, F32).to(W.dtype)
    return stored(read(W, update) + rounded, update)


def computed_in_16_bits(dtype: torch.dtype) -> Maker:
    """Multiply A and B after both were rounded to 16 bits, and round the product."""

    def make(W: Tensor, update: Update) -> Tensor | None:
        if update.magnitude is not None:
            return None
        product = update.B.to(dtype) @ update.A.to(dtype)
        change = update.scaling * product
        total = read(W, update).to(dtype) + change
        return stored(total, update).to(W.dtype)

    return make


def matrices_rounded(dtype: torch.dtype) -> Maker:
    """Round A and B to 16 bits, then merge in float32."""

    def make(W: Tensor, update: Update) -> Tensor:
        A, B = update.A.to(dtype).to(F32), update.B.to(dtype).to(F32)
        return merged(W, replace(update, A=A, B=B))

    return make


def through_nf4(W: Tensor) -> Tensor:
    """Return what NF4 leaves of a weight."""
    return blockwise.dequantize(blockwise.quantize(W.to(F32)), W.dtype)


def through_nested_nf4(W: Tensor) -> Tensor:
    """Return what NF4 leaves of a weight if its scales are quantized too."""
    return double_quant.dequantize(double_quant.quantize(W.to(F32)), W.dtype)


def into_dequantized(through: Through) -> Maker:
    """Merge into the base after rounding it to 4 bits."""
    return lambda W, update: merged(through(W), update)


def requantized(through: Through) -> Maker:
    """Merge into the dequantized base, and quantize the result once more."""
    return lambda W, update: through(merged(through(W), update))


def quantized_after(through: Through) -> Maker:
    """Merge correctly, and quantize the result."""
    return lambda W, update: through(merged(W, update))


def norm_of_the_base(W: Tensor, update: Update) -> Tensor | None:
    """Divide DoRA's rows by the norm of W instead of that of W + s B A."""
    return _with_norm(W, update, lambda V: row_norm(read(W, update).to(F32)))


def norm_over_the_wrong_axis(W: Tensor, update: Update) -> Tensor | None:
    """Take DoRA's norm over out_features: one number a column, used for the rows."""
    if not _square(update):
        return None
    return _with_norm(W, update, lambda V: torch.linalg.vector_norm(V, dim=0))


def columns_scaled(W: Tensor, update: Update) -> Tensor | None:
    """Take DoRA's norm over out_features and scale the columns."""
    if update.magnitude is None or not _square(update):
        return None
    V = exact(W, replace(update, magnitude=None), F32)
    norm = torch.linalg.vector_norm(V, dim=0)
    return stored(V * over_norm(update.magnitude.to(F32), norm), update).to(W.dtype)


def norm_of_the_merged(W: Tensor, update: Update) -> Tensor | None:
    """Divide by the norm of an already merged weight."""
    if update.magnitude is None:
        return None
    return _with_norm(
        W, update, lambda V: row_norm(_added(exact(W, update, F32), update))
    )


def magnitude_lost(W: Tensor, update: Update) -> Tensor | None:
    """Merge DoRA as if it were LoRA."""
    if update.magnitude is None:
        return None
    return merged(W, replace(update, magnitude=None))


def through_half(W: Tensor, update: Update) -> Tensor | None:
    """Merge correctly, but round the result to float16 in between."""
    if W.dtype == torch.float16:
        return None
    return merged(W, update).to(torch.float16).to(W.dtype)


def through_bfloat16(W: Tensor, update: Update) -> Tensor | None:
    """Merge correctly, but round the result to bfloat16 in between."""
    if W.dtype == torch.bfloat16:
        return None
    return merged(W, update).to(torch.bfloat16).to(W.dtype)


INTO_DEQUANTIZED = "merged into dequantized NF4"
REQUANTIZED = Mistake(
    "requantized",
    "the merge with the 4-bit base was quantized once more",
    requantized(through_nf4),
)


MISTAKES = (
    Mistake("not applied", "the tensor is that of the base", not_applied),
    Mistake("applied twice", "the update was added twice", applied_twice),
    Mistake("subtracted", "the update has the wrong sign", subtracted),
    Mistake("alpha alone", "the scale is alpha, not divided by r", alpha_alone),
    Mistake("not scaled", "B A was added without a scale", not_scaled),
    Mistake(
        "1/r for 1/√r, or the reverse",
        "the rank-stabilized scale was taken for the plain one, or the reverse",
        other_root,
    ),
    Mistake("transposed", "the transpose of the update was added", transposed),
    Mistake("A and B swapped", "the buffers of A and B were exchanged", swapped),
    Mistake(
        "delta rounded first",
        "the update was rounded to the weight's dtype before it was added",
        delta_rounded_first,
    ),
    Mistake(
        "computed in bfloat16",
        "A, B and their product were rounded to bfloat16",
        computed_in_16_bits(torch.bfloat16),
    ),
    Mistake(
        "computed in float16",
        "A, B and their product were rounded to float16",
        computed_in_16_bits(torch.float16),
    ),
    Mistake(
        "A and B in bfloat16",
        "A and B were rounded to bfloat16 before the merge",
        matrices_rounded(torch.bfloat16),
    ),
    Mistake(
        "A and B in float16",
        "A and B were rounded to float16 before the merge",
        matrices_rounded(torch.float16),
    ),
    Mistake(
        "rounded to float16",
        "the merged weight went through float16",
        through_half,
    ),
    Mistake(
        "rounded to bfloat16",
        "the merged weight went through bfloat16",
        through_bfloat16,
    ),
    *(
        mistake
        for through in (through_nf4, through_nested_nf4)
        for mistake in (
            replace(REQUANTIZED, make=requantized(through)),
            Mistake(
                INTO_DEQUANTIZED,
                "the base was read from its 4-bit form, with its errors",
                into_dequantized(through),
            ),
            Mistake(
                "quantized",
                "the right merge was quantized to NF4",
                quantized_after(through),
            ),
        )
    ),
    Mistake(
        "DoRA norm of the base",
        "rows were divided by the norm of W, not of W + s B A",
        norm_of_the_base,
    ),
    Mistake(
        "DoRA norm over the wrong axis",
        "the norm was taken over out_features",
        norm_over_the_wrong_axis,
    ),
    Mistake(
        "DoRA by columns",
        "the norm was taken over out_features, and columns were scaled",
        columns_scaled,
    ),
    Mistake(
        "DoRA norm of the merged weight",
        "the norm was taken after the weight had been merged",
        norm_of_the_merged,
    ),
    Mistake("magnitude lost", "DoRA was merged as LoRA", magnitude_lost),
)


def in_4_bits(mistake: Mistake) -> Mistake:
    """Return what a mistake is called if the file itself holds 4 bits."""
    return REQUANTIZED if mistake.name == INTO_DEQUANTIZED else mistake


BiasMaker = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class BiasMistake:
    """A name, a sentence about the mistake with a bias, and the function that makes it.

    The function takes the bias of the base, the right change, and the scale of the
    update beside it.
    """

    name: str
    sentence: str
    make: BiasMaker


def bias_lost(bias: Tensor, change: Tensor, scaling: float) -> Tensor:
    """Do not change the bias."""
    return bias


def bias_scaled(bias: Tensor, change: Tensor, scaling: float) -> Tensor:
    """Scale a change that is scaled already."""
    return bias + scaling * change


def bias_not_scaled(bias: Tensor, change: Tensor, scaling: float) -> Tensor:
    """Add the bias beside B as it stands in the file."""
    return bias + change / scaling


def whole_bias_scaled(bias: Tensor, change: Tensor, scaling: float) -> Tensor:
    """Scale the bias of the base with the change."""
    return scaling * bias + change


def bias_twice(bias: Tensor, change: Tensor, scaling: float) -> Tensor:
    """Add the change twice."""
    return bias + 2 * change


BIAS_MISTAKES = (
    BiasMistake("bias lost", "the bias is that of the base", bias_lost),
    BiasMistake("bias scaled", "its change was scaled twice", bias_scaled),
    BiasMistake("bias scaled", "its change was not scaled", bias_not_scaled),
    BiasMistake("bias scaled", "the base's bias was scaled too", whole_bias_scaled),
    BiasMistake("applied twice", "its change was added twice", bias_twice),
)


def other_alphas(W: Tensor, update: Update, alphas: set[float]) -> Iterator[Mistake]:
    """Yield, for each alpha in the file, the mistake of using this alpha."""
    for alpha in sorted(alphas - {update.alpha}):

        def make(W: Tensor, update: Update, alpha: float = alpha) -> Tensor:
            return merged(W, replace(update, alpha=alpha))

        sentence = f"alpha is {alpha:g} of another layer, not {update.alpha:g}"
        yield Mistake("another layer's alpha", sentence, make)


def experts(name: str, names: Iterable[str]) -> list[str]:
    """Return the same weight of the other experts of a layer."""
    place = re.search(r"(?<=\.experts\.)\d+(?=\.)", name)
    if place is None:
        return []
    before, after = re.escape(name[: place.start()]), re.escape(name[place.end() :])
    return [n for n in names if n != name and re.fullmatch(rf"{before}\d+{after}", n)]


def other_expert(name: str, V: Tensor, other: Update) -> Iterator[Mistake]:
    """Yield the mistakes with another expert, or only its update.

    Args:
        name: of the other expert's weight.
        V: that weight, in the base.
        other: its update.
    """

    def moved(W: Tensor, update: Update) -> Tensor | None:
        return merged(V, other) if V.shape == W.shape else None

    def crossed(W: Tensor, update: Update) -> Tensor | None:
        return merged(W, other) if V.shape == W.shape else None

    yield Mistake("experts in the wrong order", f"it is {name}, merged", moved)
    sentence = f"the update of {name} was added here"
    yield Mistake("experts in the wrong order", sentence, crossed)


def _scaled(update: Update, scaling: float) -> Update:
    r = sqrt(update.r) if update.rank_stabilized else update.r
    return replace(update, alpha=scaling * r)


def _square(update: Update) -> bool:
    return update.A.shape[1] == update.B.shape[0]


def _added(W: Tensor, update: Update) -> Tensor:
    return W + delta(update, W.dtype)


def _with_norm(
    W: Tensor, update: Update, norm: Callable[[Tensor], Tensor]
) -> Tensor | None:
    if update.magnitude is None:
        return None
    V = exact(W, replace(update, magnitude=None), F32)
    scaled = over_norm(update.magnitude.to(F32), norm(V))[:, None] * V
    return stored(scaled, update).to(W.dtype)
