# %% [markdown]
# # Double quantization: the scales cost too
#
# NF4 spends four bits on a weight, and then half a bit more on the scale of its block. On a model of 65 billion
# parameters that half bit is four gigabytes. QLoRA [@dettmers2023] quantizes the scales as well, and then they cost an eighth of a bit.
# This chapter measures what that costs in accuracy, and which 8-bit codebook suits the scales.

# %%
import numpy as np

from minipeft.lab import models, plots
from minipeft.lab.chapter import start
from minipeft.lab.memory import quantized_bits
from minipeft.reference import blockwise, double_quant
from minipeft.reference.codebook import NF4, dynamic_map

chapter = start("03_double_quant", steps=1, model=None)

# %% [markdown]
# ## The problem
#
# A block of $N = 64$ weights has one scale, its absmax $a$, a float32. That is $32/64 = 0.5$ bits a weight. Larger blocks would
# cost fewer bits, but [the last chapter](02_nf4.md) showed that their error is larger.
#
# Instead, look at the scales of a real matrix. They are all positive and close together:

# %%
models.fetch("minilm")
weights = models.minilm_weights()
name, W = next(iter(weights.items()))
absmax = blockwise.quantize(W).absmax
print(f"{name}: {absmax.size} scales")
print(
    f"smallest {absmax.min():.3f}, mean {absmax.mean():.3f}, largest {absmax.max():.3f}"
)
print(f"standard deviation {absmax.std():.3f}")

# %% [markdown]
# Such numbers do not need the 24 bits of precision and the eight bits of exponent of a float32.
#
# ## The formula
#
# Quantize the scales as if they were weights. Subtract their mean $\bar a$, because a codebook with two signs would waste half of its codes on numbers that are all positive.
# Cut the differences into blocks of $N' = 256$, give each block a scale $a' = \max |a - \bar a|$, and round to a codebook $q'$ of 256 values. The primes mark the second level;
# $c_i$ is the code of weight $i$, $a_j$ is the scale of its block $j$, and $q$ is the codebook of the weights, NF4:
#
# $$ c'_j = \arg\min_k \left| q'_k - \frac{a_j - \bar a}{a'} \right|, \qquad
#    \hat a_j = q'_{c'_j} \, a' + \bar a, \qquad \hat W_i = q_{c_i} \, \hat a_j. $$
#
# The cost in bits a weight is
#
# $$ \underbrace{4}_{\text{code}} + \underbrace{\frac{8}{N}}_{\text{code of the scale}} + \underbrace{\frac{32}{N\,N'}}_{\text{nested scale}}
#    = 4 + 0.125 + 0.001953125, $$
#
# and 32 bits once, for $\bar a$.

# %%
before = quantized_bits(4, 64) - 4
after = quantized_bits(4, 64, 256) - 4
print(f"{before} bits of scale become {after}: {before - after:.6f} fewer")
saved = 65e9 * (before - after) / 8 / 1e9
print(f"on 65 billion weights: {saved:.2f} GB")
assert (before, after) == (0.5, 0.126953125)

# %% [markdown]
# The paper says 0.127 bits, and "approximately 3 GB for a 65B model". It speaks of "8-bit floats" for the codebook $q'$. The authors' library uses the dynamic map
# that is described below, and so do we.
#
# ## The code
#
# @source minipeft.reference.double_quant.quantize
# @source minipeft.torch.double_quant.quantize
#
# The function that quantizes weights also quantizes the scales, with another codebook. Decoding multiplies and adds, and rounds
# to float32 after each of the two. A fused multiply-add rounds once and would give other last bits, and then the
# weights of two libraries would differ.
#
# @source minipeft.reference.double_quant.unnest
# @source minipeft.torch.double_quant.unnest
#
# @source minipeft.reference.double_quant.dequantize
# @source minipeft.torch.double_quant.dequantize
#
# The mean needs a rule. A sum of floats depends on the order of its terms, and libraries add in different orders. Our rule does not
# depend on an order: take the *exact* sum, and round it once.
#
# @source minipeft.reference.double_quant.mean
# @source minipeft.torch.double_quant.mean

# %%
rng = np.random.default_rng(0)
orders = [rng.permutation(absmax) for _ in range(200)]
naive = {
    np.cumsum(order, dtype=np.float32)[-1] / np.float32(order.size) for order in orders
}
exact = {double_quant.mean(order) for order in orders}
print(f"200 orders: {len(naive)} different float32 means, {len(exact)} by our rule")
assert len(exact) == 1 < len(naive)

# %% [markdown]
# The eight-bit codebook is the *dynamic map* of the 8-bit optimizers [@dettmers2021]. The first bit is the sign. The number of zeros that follow, up to the first 1, says how
# often to divide by ten. The bits after that 1 divide the interval from 0.1 to 1 evenly. So the map covers seven powers of ten, and the smaller a number is, the fewer bits are left for its
# digits.
#
# @source minipeft.reference.codebook.dynamic_map
# @source minipeft.torch.codebook.dynamic_map
#
# The cost in bits is counted from the arrays:
#
# @source minipeft.reference.double_quant.bits_per_parameter
# @source minipeft.torch.double_quant.bits_per_parameter

# %%
q = double_quant.quantize(W)
print(f"{W.shape}: {double_quant.bits_per_parameter(q):.6f} bits a weight")
print(f"of which the offset: {32 / W.size:.6f}")
assert double_quant.bits_per_parameter(q) - 32 / W.size == 4 + after

# %% [markdown]
# ## The proof
#
# - **The weights keep their codes.** `packed` is that of plain NF4, byte for byte: quantizing the scales does not change it.
# - **A scale comes back within half a gap** of the map, times its nested scale.
# - **Two roundings and no more.** Computed over the rationals, product and sum, each rounded to float32, give the bits of `unnest`.
# - **Zero is a code.** Equal scales come back exactly, since their distance from the mean is 0 and 0 is in the map.
# - **Both columns, and bitsandbytes.** NumPy and torch agree in every byte; bitsandbytes, given our bytes, decodes the same weights.
#
# The cell checks the first two on one real matrix; the tests check all five on drawn ones.

# %%
decoded = double_quant.unnest(q).absmax
half_gap = np.diff(dynamic_map()).max() / 2
nested = q.nested_absmax.repeat(256)[: absmax.size]
print(
    f"largest error of a scale: {np.max(np.abs(decoded - absmax) / nested):.5f} of its nested scale"
)
print(f"half of the widest gap of the map: {half_gap:.5f}")
assert np.all(np.abs(decoded - absmax) <= nested * half_gap * (1 + 2.0**-20))
assert q.packed.tobytes() == blockwise.quantize(W).packed.tobytes()

# %% [markdown]
# ## The experiment: which eight bits?
#
# torchao stores the scales as signed bytes that stand for evenly spaced values, a *linear* map. Like bitsandbytes it subtracts the mean and takes blocks of
# 256. So the two differ only in where the 256 values lie.

# %%
MAPS = {
    "dynamic": dynamic_map(),
    "linear": (np.arange(-128, 128) / 128).astype(np.float32),
}
COLORS = dict(zip(MAPS, plots.PALETTE, strict=False))


def nested_scales(absmax, codebook):
    """The scales that come back from eight bits, and what the map was asked to hold."""
    offset = double_quant.mean(absmax)
    scales = blockwise.quantize(absmax - offset, codebook, 256)
    wanted = (absmax - offset) / scales.absmax.repeat(256)[: absmax.size]
    return blockwise.dequantize(scales) + offset, wanted


def scale_error(absmax, codebook):
    """Relative RMS error of the scales."""
    back, _ = nested_scales(absmax, codebook)
    return float(np.sqrt(np.mean((back - absmax) ** 2) / np.mean(absmax**2)))


normal = rng.standard_normal((1024, 1024)).astype(np.float32)
normal_scales = blockwise.quantize(normal).absmax
on_normal = {k: scale_error(normal_scales, codebook) for k, codebook in MAPS.items()}
for label, error in on_normal.items():
    print(f"normal weights, {label:8s} map: relative RMS error of a scale {error:.5f}")
assert on_normal["linear"] < on_normal["dynamic"]
wanted = nested_scales(normal_scales, MAPS["linear"])[1]
NEAR = 0.1
inside = np.mean(np.abs(wanted) < NEAR)
crowd = np.mean(np.abs(MAPS["dynamic"]) < NEAR)

# %% tags=["fold"]
figure, ax = plots.axes(x="(scale - mean) / nested scale", size=(6.4, 3.2))
density, edges = np.histogram(wanted, 120, (-1, 1), density=True)
ax.fill_between((edges[1:] + edges[:-1]) / 2, density, color=plots.FAINT, step="mid")
top = density.max()
for row, (label, codebook) in enumerate(MAPS.items(), 1):
    y = -0.2 * top * row
    ax.plot(
        codebook,
        np.full(256, y),
        "|",
        color=COLORS[label],
        markersize=13,
        markeredgewidth=0.5,
    )
    ax.text(
        -1.06, y, label, ha="right", va="center", color=COLORS[label], weight="bold"
    )
ax.text(0.98, 0.75 * top, "scales of normal weights", ha="right", color=plots.INK)
ax.set(xlim=(-1.4, 1.05), ylim=(-0.55 * top, 1.05 * top), yticks=[])
ax.spines["left"].set_visible(False)
ax.grid(visible=False)
chapter.show(
    figure,
    "maps",
    alt=f"A histogram of centred scales, a lopsided bell between {edges[0]:.0f} and {edges[-1]:.0f}, above two rows of ticks: the values of the dynamic map, so dense at the middle that they merge, and sparse outside; the values of the linear map, evenly spaced.",
    caption=f"The dynamic map has {100 * crowd:.0f} % of its values within {NEAR} of zero, where only {100 * inside:.0f} % of the scales of normal weights are. The linear map fits them better.",
)

# %% [markdown]
# The dynamic map is made for numbers that spread over seven powers of ten, such as the moments of an optimizer. The scales of normal weights do not: once centred,
# they are spread over the range like a bell. The map puts {=f"{100 * crowd:.0f}"=} % of its codes between −0.1 and 0.1, where only
# {=f"{100 * inside:.0f}"=} % of the scales are, and is coarse outside. So for normal weights the linear map is better: its relative error is {=f"{100 * on_normal['linear']:.2f}"=} %
# against {=f"{100 * on_normal['dynamic']:.2f}"=} %. Is it better on real weights too?

# %%
scales = {name: blockwise.quantize(W).absmax for name, W in weights.items()}
errors = {
    k: np.array([scale_error(a, c) for a in scales.values()]) for k, c in MAPS.items()
}
reach = np.array([a.max() / a.mean() for a in scales.values()])
better = errors["linear"] < errors["dynamic"]
for label, e in errors.items():
    print(f"{label:8s} map: {e.min():.5f} to {e.max():.5f}, mean {e.mean():.5f}")
print(f"the linear map is better on {better.sum()} of {better.size} matrices,")
print(f"whose largest scale is at most {reach[better].max():.1f} times the mean;")
print(f"on the others that is at least {reach[~better].min():.1f}")
assert reach[better].max() < reach[~better].min()
assert errors["linear"].mean() > errors["dynamic"].mean()

# %% tags=["fold"]
figure, ax = plots.axes(
    x="largest scale / mean scale", y="error of the scales", size=(6.4, 3.4)
)
for label, e in errors.items():
    ax.plot(reach, 100 * e, "o", color=COLORS[label], markersize=5, alpha=0.75)
    ax.annotate(
        label,
        (reach.max(), 100 * e[np.argmax(reach)]),
        (0, 9),
        textcoords="offset points",
        ha="center",
        color=COLORS[label],
        weight="bold",
    )
ax.set(xscale="log", xlim=(1.7, 100), ylim=(0, 2.35))
ax.set_xticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
ax.minorticks_off()
ax.yaxis.set_major_formatter("{x:.1f} %")
chapter.show(
    figure,
    "tails",
    alt=f"Error of the scales of {better.size} matrices, two dots each, against the ratio of the largest scale to the mean, from {reach.min():.1f} to {reach.max():.0f}. Up to a ratio of {reach[better].max():.1f} both dots lie at {100 * np.maximum(errors['linear'], errors['dynamic'])[better].max():.1f} % or below, the linear map's a little lower; from {reach[~better].min():.1f} on the linear map's rise to {100 * errors['linear'].max():.1f} %, and the dynamic map's to {100 * errors['dynamic'].max():.1f} % at most.",
    caption=f"The linear map is better where no scale is large beside the mean ({better.sum()} matrices). Where one is, its error grows to {100 * errors['linear'].max():.1f} %; that of the dynamic map never exceeds {100 * errors['dynamic'].max():.1f} %.",
)

# %% [markdown]
# On {=better.sum()=} of the {=better.size=} matrices, yes. On the other {=(~better).sum()=}, the error of the linear map is up to
# {=f"{(errors['linear'] / errors['dynamic']).max():.1f}"=} times that of the dynamic one. These matrices have a few enormous weights. A
# single scale of {=f"{reach.max():.0f}"=} times the mean makes $a'$ large, and then the 255 other scales of its block lie within a few of the even steps around zero. The dynamic map has
# fine steps there. Its error is a little larger on ordinary matrices and never above {=f"{100 * errors['dynamic'].max():.1f}"=} %, which makes it the safer default.
#
# All of these are errors of the *scales*. How much larger does the error of the *weights* become?


# %%
def relative(back, W):
    """||back - W|| / ||W||."""
    return float(np.linalg.norm(back - W) / np.linalg.norm(W))


def with_scales(q, absmax):
    """Dequantize with other scales."""
    return blockwise.dequantize(blockwise.Blockwise(q.packed, absmax, NF4, 64, q.shape))


plain, added, tied = [], {label: [] for label in MAPS}, []
for W in weights.values():
    q = blockwise.quantize(W)
    plain.append(relative(blockwise.dequantize(q), W))
    for label, codebook in MAPS.items():
        nested = with_scales(q, nested_scales(q.absmax, codebook)[0])
        added[label].append(100 * (relative(nested, W) / plain[-1] - 1))
    decoded = blockwise.dequantize(q)  # of the last map: errors of scales and of codes
    errors_of = ((nested - decoded).ravel(), (decoded - W).ravel())
    tied.append(float(np.corrcoef(errors_of)[0, 1]))
print(f"plain NF4: relative error of the weights {np.mean(plain):.5f}")
for label, values in added.items():
    print(
        f"{label:8s} map: adds {np.mean(values):.3f} % of that error on average, {np.max(values):.3f} % at most"
    )
print(
    f"correlation of the errors of scales and of codes: at most {np.abs(tied).max():.2f}"
)
assert max(map(max, added.values())) < 5

# %% [markdown]
# Double quantization adds {=f"{np.mean(added['dynamic']):.3f}"=} % *of* the error of NF4, at most {=f"{np.max(added['dynamic']):.3f}"=} % on any matrix; the linear map
# {=f"{np.mean(added['linear']):.3f}"=} %, at most {=f"{np.max(added['linear']):.3f}"=} %. The errors of scales and codes have next to no correlation (at most {=f"{np.abs(tied).max():.2f}"=} on any matrix), so their squares add, and
# the square of half a percent is small beside the square of nine percent. Eight bits are enough for a scale.
#
# ## What goes wrong in practice

# %% tags=["hide"]
BINS = -1 + 2 * np.arange(65536) / 65535
table = blockwise.nearest(BINS.astype(np.float32), dynamic_map())
never = sorted(set(range(256)) - set(table.tolist()))
zero_bin = int((0.0 + 1) * 0.5 * 65535 + 0.5)
zero_code = int(table[zero_bin])
example = np.zeros((8, 64), np.float32)
example[:, 0] = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
back_to_zero = double_quant.unnest(double_quant.quantize(example)).absmax[-1]
edges = [np.linspace(0.1, 1, 2 ** (i + 2) + 1) for i in range(7)]
parts = [10.0 ** (i - 6) * (e[1:] + e[:-1]) / 2 for i, e in enumerate(edges)]
extra = [10.0 ** (i - 6) * np.array([0.325, 0.775]) for i in range(7)]  # the block
too_many = np.sort(np.concatenate([*parts, *extra, [0, 1]]))
once = double_quant.dequantize(double_quant.quantize(W))
twice = double_quant.dequantize(double_quant.quantize(once))
moved = np.mean(once != twice)
assert 0.5 < moved < 1
assert np.array_equal(
    double_quant.quantize(once).packed, double_quant.quantize(W).packed
)

# %% [markdown]
# - **A zero that has no code.** The CPU kernel of bitsandbytes is fast because it looks the code up in a table of 65,536 bins, and no bin is centred at 0. With the table rebuilt here,
#   {=len(never)=} codes, {=never[0]=} to {=never[-1]=}, are never chosen, and an exact zero becomes code {=zero_code=}: {=f"{dynamic_map()[zero_code]:.3e}"=} of the absmax. For scales this does no
#   harm; for the moments of [an optimizer](04_adamw.md) it means that weights without a gradient move. One of our laws says that quantizing the map itself gives every code from 0 to 255.
# - **A map with too many values.** In the versions 0.36 to 0.41.0 of bitsandbytes a block of code was [indented too far](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/659), and one bit was counted twice. The unsigned map, for
#   $v$ of [Adam](04_adamw.md), then had {=too_many.size=} values, of which a byte can name 256. The first 256 end at {=f"{too_many[255]:.3f}"=} instead of 1, and 8-bit Adam [ended in NaN](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/227). The golden vectors contain all 256 numbers.
# - **Scales of zero blocks.** The map ends at {=f"{dynamic_map()[0]:.4f}"=} on the left and at 1 on the right. A block of zeros among seven blocks with scale 1 gets the scale
#   {=f"{back_to_zero:.4f}"=} back. The weights stay zero, because the code of 0 is 0; but do not test for `absmax == 0` after decoding.
# - **Not idempotent.** Plain NF4 may be quantized again without a change. Nested, the *codes* stay, but the mean of the decoded scales is not the mean
#   of the scales: in the last matrix of the experiment {=f"{moved:.0%}"=} of the values change when they are quantized again, by {=f"{np.abs(once - twice).max():.0e}"=} at most.
# - **A decoder that leaves out the second level** uses the codes of the scales as if they were scales ([bitsandbytes 1549](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1549)).
#
# ## Exercises
#
# 1. *Without the mean.* Quantize the scales themselves instead of their distances from the mean. By what factor does their error grow? Which codes are used?

# %% tags=["solution"]
a = scales[name]
around_zero = blockwise.dequantize(blockwise.quantize(a, dynamic_map(), 256))
around_mean, _ = nested_scales(a, dynamic_map())
factor = np.std(around_zero - a) / np.std(around_mean - a)
print(f"the error grows by a factor of {factor:.1f}")
print(
    "the lowest code in use:",
    np.unique(blockwise.quantize(a, dynamic_map(), 256).packed).min(),
)
assert factor > 1.2

# %% [markdown]
# 2. *Nest again.* The nested scales are floats too. What would a third level save, in bits a weight? Is it worth its code?

# %% tags=["solution"]
third = 32 / (64 * 256) - (8 / (64 * 256) + 32 / (64 * 256 * 256))
print(f"{third:.6f} bits a weight, {65e9 * third / 8 / 1e6:.0f} MB on 65 billion")
assert third < 0.0015

# %% [markdown]
# 3. *Smaller blocks for the same money.* With double quantization, which block size costs about as much as plain blocks of 64? How much
#    smaller is the error?

# %% tags=["solution"]
print("blocks of 16, nested:", quantized_bits(4, 16, 256), "bits; 64, plain: 4.5 bits")
W = weights[name]
fine = relative(double_quant.dequantize(double_quant.quantize(W, NF4, 16)), W)
coarse = relative(blockwise.dequantize(blockwise.quantize(W)), W)
print(f"relative error {fine:.4f} instead of {coarse:.4f}")
assert quantized_bits(4, 16, 256) < 4.51
assert fine < 0.9 * coarse

# %% [markdown]
# ## References
#
# Double quantization is section 3 of QLoRA [@dettmers2023]; the dynamic map comes from the 8-bit optimizers [@dettmers2021].
