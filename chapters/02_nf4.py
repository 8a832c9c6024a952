# %% [markdown]
# # NF4: sixteen numbers for a bell curve
#
# A model of 7 billion parameters in 16 bits fills {=7 * 16 / 8:g=} GB before the first gradient.
# In 4 bits it fills {=7 * 4 / 8:g=}. Four bits name one of sixteen values, and everything in
# this chapter is about choosing them well: where the sixteen come from, how a block of
# weights shares one scale, and what is lost.

# %%
import numpy as np

from minipeft.lab import models, plots
from minipeft.lab.chapter import start
from minipeft.reference import blockwise
from minipeft.reference.codebook import FP4, NF4, normal_float

chapter = start("02_nf4", steps=1, model="minilm")

# %% [markdown]
# ## The problem
#
# Rounding to a grid of evenly spaced numbers is the obvious way, and for weights it is
# the wrong one. Weights of a trained network look like draws from a normal
# distribution: most are small, a few are large. An even grid that reaches the largest
# weight of a tensor spends most of its sixteen values where almost nothing lies.
#
# Two ideas repair this, and QLoRA [@dettmers2023] joins them.
#
# 1. **Blocks.** Cut the tensor into blocks of 64 consecutive values and scale each by
#    its own largest magnitude, its *absmax*. An outlier then costs precision only among
#    its 63 neighbours.
# 2. **Quantiles.** Put the sixteen values where the weights are: at quantiles of the
#    normal distribution, so that every code is used about equally often.
#
# ## The formula
#
# With $\Phi^{-1}$ the quantile function of the standard normal distribution and
# $\delta = 929/960$, NormalFloat takes evenly spaced probabilities from $\delta$ down to
# $1/2$, eight on the positive side and seven on the negative, an exact zero between
# them, and divides by the largest:
#
# $$ q_i = \frac{\Phi^{-1}(p_i)}{\Phi^{-1}(\delta)}. $$
#
# The outermost probability cannot be 1, whose quantile is infinite. The number 929/960 is
# the mean of $1 - 1/30$ and $1 - 1/32$: half a step inside the end for fifteen intervals, and
# for sixteen.
#
# @source minipeft.reference.codebook.normal_float

# %%
derived = normal_float(4)
for code, (value, published) in enumerate(zip(derived, NF4, strict=True)):
    print(f"{code:2d}  {value:+.7f}  {published:+.7f}  {value - published:+.1e}")
assert np.abs(derived - NF4).max() < 2.0**-22

# %% [markdown]
# The second column is the formula, the third is the table that every implementation
# ships. They differ in the last digit: the published table was once computed from
# float32 probabilities, and what other programs load must be *those* bits. So the
# table is written literally, and the derivation is a test of it.

# %%
INT4 = (np.arange(-8, 8) / np.float32(7)).astype(np.float32)
CODEBOOKS = {"NF4": NF4, "FP4": FP4, "int4": INT4}
COLORS = dict(zip(CODEBOOKS, plots.PALETTE, strict=False))

# How values of a normal block of 64 lie once they are divided by the block's absmax.
rng = np.random.default_rng(0)
normal = rng.standard_normal((1024, 1024)).astype(np.float32)
scaled = (
    normal.reshape(-1, 64) / np.abs(normal.reshape(-1, 64)).max(1, keepdims=True)
).reshape(-1)

# %% tags=["fold"]
figure, ax = plots.axes(x="weight / absmax of its block", size=(6.4, 3.4))
inner = scaled[np.abs(scaled) < 1]
density, edges = np.histogram(inner, 200, (-1, 1), density=True)
ax.fill_between((edges[1:] + edges[:-1]) / 2, density, color=plots.FAINT, step="mid")
for row, (name, codebook) in enumerate(CODEBOOKS.items()):
    values = codebook[np.abs(codebook) <= 1]
    ax.plot(
        values,
        np.full(values.size, -0.16 - 0.17 * row),
        "|",
        color=COLORS[name],
        markersize=11,
        markeredgewidth=2,
    )
    ax.text(
        -1.06,
        -0.16 - 0.17 * row,
        name,
        ha="right",
        va="center",
        color=COLORS[name],
        weight="bold",
    )
for midpoint in (NF4[1:] + NF4[:-1]) / 2:
    ax.plot(
        [midpoint] * 2,
        [0, np.interp(midpoint, (edges[1:] + edges[:-1]) / 2, density)],
        color=COLORS["NF4"],
        linewidth=0.7,
    )
ax.set(xlim=(-1.28, 1.06), ylim=(-0.62, 1.25), yticks=[])
ax.spines["left"].set_visible(False)
ax.grid(visible=False)
chapter.show(
    figure,
    "codes",
    alt="A bell curve of scaled weights, cut by the boundaries of NF4 into sixteen slices; below it the values of NF4, crowded around zero, of FP4, which leaves wide gaps, and of int4, evenly spaced.",
)

# %% [markdown]
# The bell is what a block of 64 normal weights looks like after scaling, the thin lines
# are NF4's decision boundaries, and the rows of ticks are the values of three
# codebooks. NF4 crowds where the weights are. FP4, a sign with two exponent bits and
# one mantissa bit, spends four codes on two zeros and their nearest neighbours, and leaves a gap on either
# side of it. int4 is the even grid.
#
# Are the sixteen slices equally likely, as "information-theoretically optimal" would
# want? Nearly, not quite: dividing by the absmax of a block is not dividing by a
# standard deviation.

# %%
codes = blockwise.unpack(blockwise.quantize(normal).packed, 4, normal.size)
share = np.bincount(codes, minlength=16) / codes.size
entropy = -(share * np.log2(share)).sum()
print("share of each code, in percent:", " ".join(f"{100 * s:.1f}" for s in share))
print(f"entropy: {entropy:.3f} of 4 bits")
assert round(entropy, 2) == 3.88

# %% [markdown]
# ## The code
#
# A quantized tensor is two arrays: the codes, two to a byte, and one float32 scale for
# each block. Quantizing reads the tensor row by row, so that a block may begin in one row and
# end in the next.
#
# @source minipeft.reference.blockwise.quantize
# @source minipeft.torch.blockwise.quantize
# @source minipeft.kernels.blockwise:quantize
#
# @source minipeft.reference.blockwise.dequantize
# @source minipeft.torch.blockwise.dequantize
# @source minipeft.kernels.blockwise:dequantize
#
# The rounding itself is a search among fifteen midpoints, and one decision: a value exactly on
# a midpoint goes to the lower code.
#
# @source minipeft.reference.blockwise.nearest
#
# ??? note "The small functions around them"
#     Packing writes the first code into the high bits; the checks refuse what has
#     no answer.
#
#     @source minipeft.reference.blockwise.pack
#
#     @source minipeft.reference.blockwise.unpack
#
#     @source minipeft.reference.codebook.code_bits
#
#     @source minipeft.reference.blockwise.check_blocksize
#
#     @source minipeft.reference.blockwise.check_parts
#
#     @source minipeft.reference.blockwise.check_finite

# %%
W = np.array([[0.12, -0.50, 0.03, 0.25], [0.0, 0.0, 0.0, 0.0]], np.float32)
q = blockwise.quantize(W, NF4, blocksize=4)
print("absmax ", q.absmax)
print("codes  ", blockwise.unpack(q.packed, 4, 8))
print("bytes  ", " ".join(f"{byte:08b}" for byte in q.packed))
print("back   ", blockwise.dequantize(q).round(4).tolist())

# %% [markdown]
# Read the bytes: the first code of each pair is in the high four bits. The second block is all
# zeros, and a zero block must not divide by its absmax: every code is 7, the
# code of 0.0.
#
# ## The proof
#
# Three laws hold for every tensor that the tests can think of, subnormal numbers and the
# largest floats included.
#
# - **The error is at most half a gap.** $|W_i - \hat W_i| \le \tfrac12 \, a \max_k (c_{k+1} - c_k)$,
#   up to five roundings that the bound counts.
# - **Quantizing again changes nothing.** The values that came back have the same codes.
# - **Bytes are bytes.** NumPy, torch and the CUDA kernel give the same packed bytes and the same
#   scales, and for whole blocks so does bitsandbytes.

# %%
back = blockwise.dequantize(blockwise.quantize(normal))
half_gap = np.diff(NF4).max() / 2
absmax = np.abs(normal).reshape(-1, 64).max(1).repeat(64).reshape(normal.shape)
worst = (np.abs(back - normal) / absmax).max()
print(f"largest error: {worst:.6f} of absmax; half of NF4's widest gap: {half_gap:.6f}")
assert worst <= half_gap * (1 + 2.0**-20)
again = blockwise.quantize(back)
assert again.packed.tobytes() == blockwise.quantize(normal).packed.tobytes()

# %% [markdown]
# ## The experiment, on numbers with a known answer
#
# bitsandbytes publishes the mean error of NF4 on normal numbers for every block size, as
# the thresholds of its own tests. They are reproduced here on one matrix of a million values.

# %%
PUBLISHED = {
    32: 0.067746,
    64: 0.072798,
    128: 0.076831,
    256: 0.080337,
    512: 0.083547,
    1024: 0.086610,
    2048: 0.089592,
    4096: 0.092547,
}


def mean_error(W, codebook, blocksize):
    """Mean absolute difference between W and what comes back."""
    return float(
        np.abs(
            blockwise.dequantize(blockwise.quantize(W, codebook, blocksize)) - W
        ).mean()
    )


print("block   published   measured   difference")
deviations = []
for blocksize, published in PUBLISHED.items():
    measured = mean_error(normal, NF4, blocksize)
    deviations.append(abs(measured / published - 1))
    print(
        f"{blocksize:5d}   {published:.6f}    {measured:.6f}   {100 * (measured / published - 1):+.2f} %"
    )
assert max(deviations) < 0.005
fp4_error = mean_error(normal, FP4, 64)
print(f"FP4 at 64: published 0.096543, measured {fp4_error:.6f}")
assert abs(fp4_error / 0.096543 - 1) < 0.005

# %% tags=["fold"]
figure, ax = plots.axes(
    x="values in a block", y="mean |error| on N(0, 1)", size=(6.4, 3.2)
)
grown = {}
for name, codebook in CODEBOOKS.items():
    errors = grown[name] = [mean_error(normal, codebook, b) for b in PUBLISHED]
    ax.plot([*PUBLISHED], errors, "o-", color=COLORS[name], markersize=4)
    ax.text(
        4096 * 1.12, errors[-1], name, color=COLORS[name], va="center", weight="bold"
    )
assert grown["int4"][0] < grown["FP4"][0]
assert grown["int4"][-1] > grown["FP4"][-1]
ax.plot(
    [*PUBLISHED], [*PUBLISHED.values()], "+", color=plots.INK, markersize=9, zorder=3
)
ax.annotate("+ published for NF4", (32, 0.0677), (36, 0.0585), color=plots.INK)
ax.set_xscale("log", base=2)
ax.set(
    xticks=[*PUBLISHED], xticklabels=[*PUBLISHED], ylim=(0.05, 0.145), xlim=(28, 7000)
)
ax.minorticks_off()
chapter.show(
    figure,
    "blocksizes",
    alt="Mean error against block size for three codebooks. All grow slowly; NF4 is lowest everywhere and lies on the published crosses, and int4 overtakes FP4 at blocks of 512.",
)

# %% [markdown]
# All eight points lie within {=f"{100 * max(deviations):.2f}"=} % of the published ones. Larger blocks
# hold larger outliers, so the error grows, and the cheapest codebook suffers most: int4 is
# better than FP4 for small blocks and worse for large ones.
#
# ## The experiment, on real weights
#
# Normal numbers are a model of weights. Here are weights: the {=len(weights)=} linear layers of
# all-MiniLM-L6-v2, a sentence encoder kept in true float32. Six layers, six matrices
# each; the figure shows what fraction of each matrix is lost.

# %%
weights = models.minilm_weights()


def relative_error(W, codebook):
    """||W - what comes back|| / ||W||, blocks of 64."""
    return float(
        np.linalg.norm(blockwise.dequantize(blockwise.quantize(W, codebook)) - W)
        / np.linalg.norm(W)
    )


errors = {
    name: np.array([relative_error(W, c) for W in weights.values()])
    for name, c in CODEBOOKS.items()
}
kurtosis = np.array(
    [(((W - W.mean()) / W.std()) ** 4).mean() - 3 for W in weights.values()]
)
for name, e in errors.items():
    print(
        f"{name:5s} relative error: {e.min():.4f} to {e.max():.4f}, mean {e.mean():.4f}"
    )
assert np.all(errors["NF4"] < errors["int4"])
assert np.all(errors["int4"] < errors["FP4"])

# %% tags=["fold"]
figure, ax = plots.axes(
    x="matrix, in the order of the network", y="relative error", size=(6.4, 3.4)
)
at = np.arange(len(weights))
for name, e in errors.items():
    ax.plot(at, 100 * e, "o", color=COLORS[name], markersize=4)
    ax.text(
        at[-1] + 0.9, 100 * e[-2], name, color=COLORS[name], va="center", weight="bold"
    )
heavy = np.flatnonzero(kurtosis > 10)
assert (len(weights), len(heavy)) == (36, 6)
ax.vlines(
    heavy,
    100 * errors["NF4"][heavy],
    100 * errors["FP4"][heavy],
    color=plots.FAINT,
    zorder=0,
    linewidth=6,
)
ax.set(
    xticks=[6 * i + 2.5 for i in range(6)],
    xticklabels=[f"layer {i}" for i in range(6)],
    xlim=(-1, 39.5),
    ylim=(8, 14.5),
)
ax.yaxis.set_major_formatter("{x:.0f} %")
ax.grid(visible=False, axis="x")
chapter.show(
    figure,
    "minilm",
    alt="Relative error of 36 weight matrices under three codebooks: NF4 near 9 percent for every one, int4 near 11, FP4 near 13. The grey bars mark the six matrices with heavy tails, where all three rise a little and NF4 least.",
)

# %% [markdown]
# NF4 loses {=f"{100 * errors['NF4'].mean():.1f}"=} % of a matrix in the Frobenius norm, int4
# {=f"{100 * errors['int4'].mean():.1f}"=} %, FP4 {=f"{100 * errors['FP4'].mean():.1f}"=} %: the same order for
# every one of the {=len(weights)=} matrices. Grey bars mark the {=len(heavy)=} matrices
# whose excess kurtosis is above 10 (the largest, {=f"{kurtosis.max():.0f}"=}, is a single enormous weight:
# a normal distribution has 0). Blocks confine such outliers to their 63 neighbours; the error there is
# {=f"{100 * errors['NF4'][heavy].mean():.1f}"=} % instead of {=f"{100 * np.delete(errors['NF4'], heavy).mean():.1f}"=} %.
#
# Memory is exact arithmetic: four bits for the code, and 32 bits of scale for 64 values.

# %%
q = blockwise.quantize(next(iter(weights.values())))
bits = 8 * (q.packed.nbytes + q.absmax.nbytes) / np.prod(q.shape)
print(f"{bits} bits per parameter")
assert bits == 4 + 32 / 64

# %% [markdown]
# Half a bit of scale for four bits of code is a lot. The next chapter quantizes the
# scales too.
#
# ## What goes wrong in practice

# %% tags=["hide"]
row, column = np.indices((1152, 4304))
misread = np.mean(row * (4304 // 64) + column // 64 != (row * 4304 + column) // 64)
million = np.random.default_rng(4).standard_normal(2**20).astype(np.float32)
short = np.round(NF4, 4)
assert [*NF4[short == NF4]] == [-1, 0, 1]
ours, theirs = (
    blockwise.unpack(blockwise.quantize(million, codes).packed, 4, million.size)
    for codes in (NF4, short)
)
moved = np.mean(ours != theirs)
assert 0 < moved < 0.001

# %% [markdown]
# - **Rows that are not a multiple of the block.** Blocks run across rows. A CPU kernel of bitsandbytes
#   finds the scale of column $j$ in row $i$ by dividing within the row, which is wrong when the row length is
#   no multiple of the block: for a (1152, 4304) matrix, {=f"{100 * misread:.0f}"=} % of the values come back
#   with another block's scale. The golden vectors have such a matrix. The exercise below builds this bug.
# - **Nibbles in the other order.** One back end packed the first code low, another high
#   ([bitsandbytes 1472](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1472)); a vector of two
#   elements finds it.
# - **A packing variable that was not cleared**, at blocks of 1024 and more
#   ([bitsandbytes 1721](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1721)): the error was far too large, and
#   the thresholds of the tests were larger still.
# - **A zero block.** Divide by an absmax of zero, and NaN chooses code 0, which is $-1$: the block comes back as
#   $-1 \cdot 0 = -0.0$. Three implementations give three different bytes here.
# - **NaN.** A maximum that ignores NaN turns it into a finite weight in silence. Here it is an error that names the
#   first bad index.
# - **Four digits instead of sixteen.** torchao rounds the table to four decimals: of 10,000 codes of normal weights,
#   {=f"{1e4 * moved:.1f}"=} differ, and every value but −1, 0 and 1 comes back with other bits.
#
# ## Exercises
#
# 1. *Misaligned rows.* Dequantize a (4, 96) matrix with blocks of 64 as if every row had its own
#    $\lfloor 96/64 \rfloor$ scales. What fraction of the values is wrong?

# %% tags=["solution"]
W = np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)
q = blockwise.quantize(W)
row, column = np.indices(W.shape)
wrong_block = row * (96 // 64) + column // 64
codes = blockwise.unpack(q.packed, 4, W.size).reshape(W.shape)
wrong = NF4[codes] * q.absmax[wrong_block]
right = blockwise.dequantize(q)
print(f"{np.mean(wrong != right):.0%} of the values are wrong;", end=" ")
print(
    f"RMS error {np.sqrt(np.mean((wrong - W) ** 2)):.3f} instead of {np.sqrt(np.mean((right - W) ** 2)):.3f}"
)
assert 0.4 < np.mean(wrong != right) < 0.6

# %% [markdown]
# 2. *Smaller codebooks.* `normal_float` also makes NF3 and NF2. By what factor does the error on
#    normal numbers grow with each bit removed?

# %% tags=["solution"]
errors_by_bits = {
    bits: mean_error(normal, normal_float(bits), 64) for bits in (8, 5, 4, 3, 2)
}
for bits, error in errors_by_bits.items():
    print(f"{bits} bits: {error:.5f}")
print(
    f"4 to 3 bits: x {errors_by_bits[3] / errors_by_bits[4]:.2f}, 3 to 2: x {errors_by_bits[2] / errors_by_bits[3]:.2f}"
)
assert 2 < errors_by_bits[3] / errors_by_bits[4] < 2.5

# %% [markdown]
# 3. *An outlier's reach.* Multiply one weight of a normal matrix by 1,000. How many values come back differently, and
#    what happens if the whole matrix is a single block?

# %% tags=["solution"]
W = normal[:64].copy()
before = blockwise.dequantize(blockwise.quantize(W))
W[3, 7] *= 1000
after = blockwise.dequantize(blockwise.quantize(W))
print(f"blocks of 64: {np.sum(before != after)} values differ")
whole = blockwise.dequantize(blockwise.quantize(W, NF4, 65536))
print(f"one block: {np.mean(whole == 0):.1%} of the matrix becomes zero")
assert np.sum(before != after) <= 64

# %% [markdown]
# ## References
#
# The data type and the blocks are from QLoRA [@dettmers2023]; blocks for 8 bits came first [@dettmers2021]. Whether
# NF4 is optimal, and in which sense, is discussed by Yoshida [@yoshida2023].
