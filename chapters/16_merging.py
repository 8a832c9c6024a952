# %% [markdown]
# # Merging: when is it the same?
#
# A trained adapter can become part of the weight, and then costs no time. "Merging is exact", one reads, and also "merged
# and unmerged outputs differ". Both are true, for different kinds of numbers. This chapter goes through them: fractions, integers, floats, 16 bits, and
# a base in 4 bits.

# %%
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from minipeft.lab import models, plots
from minipeft.lab.chapter import start
from minipeft.reference import blockwise, linear, lora, qlora
from minipeft.torch import lora as lora_torch
from minipeft.torch.lora import LoRALinear

chapter = start("16_merging", steps=1, model=None)

# %% [markdown]
# ## The problem
#
# Two functions are claimed to be one:
#
# $$ x W^T + s\,(x A^T) B^T \qquad\text{and}\qquad x\,(W + s\,BA)^T. $$
#
# As real numbers they are, by the distributive law. A computer rounds after every operation, and the two round at different places.
#
# ## The formula, and the code
#
# @source minipeft.reference.lora.merge
#
# In torch, merging never writes to the base. The layer keeps $W$, computes with a second matrix $W'$, and unmerges by dropping $W'$. The price is memory: while merged, the weight is there twice. `unload`
# keeps only one of them.
#
# @source minipeft.torch.adapted.Adapted.merge
#
# @source minipeft.torch.adapted.Adapted.unmerge
#
# @source minipeft.torch.adapted.Adapted.merged
#
# ## The proof: fractions
#
# On fractions nothing is rounded, and the two are equal: `==` holds for every output.

# %%
rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    values = [
        Fraction(int(n), int(d)) for n, d in rng.integers(1, 9, (np.prod(shape), 2))
    ]
    return np.array(values, dtype=object).reshape(shape)


x, V = fractions(3, 5), fractions(4, 5)
exact = lora.LoRA(fractions(2, 5), fractions(4, 2), Fraction(7, 3))
apart = lora.forward(x, V, exact)
together = linear.forward(x, lora.merge(V, exact))
assert (apart == together).all()
back = lora.merge(lora.merge(V, exact), lora.LoRA(exact.A, exact.B, -exact.scaling))
assert (back == V).all()
print("apart:   ", *apart[0])
print("together:", *together[0])

# %% [markdown]
# ## The proof: integers
#
# Floats are exact too as long as nothing needs more than 24 bits. With small integers and a scaling that is a power of two, every partial sum is an integer below $2^{24}$ (or a multiple of the scaling), in any order. So NumPy, torch and
# CUDA must agree *bit for bit*; a difference in one bit is a defect.

# %%
x, V, A, B = (
    rng.integers(-8, 9, s).astype(np.float32)
    for s in ((3, 50), (40, 50), (4, 50), (40, 4))
)
whole = lora.LoRA(A, B, 0.5)
apart = lora.forward(x, V, whole)
together = linear.forward(x, lora.merge(V, whole))
assert apart.tobytes() == together.tobytes()
print(f"{apart.size} outputs up to {np.abs(apart).max():.0f}, the same bytes both ways")

# %% [markdown]
# ## The proof: floats
#
# With ordinary numbers the two differ, by no more than a bound that can be written down. A sum of $n$ rounded products errs by at most $\gamma_n = n u / (1 - n u)$ times the sum of absolute values [@higham2002], where $u = 2^{-24}$ in
# float32. The bound holds for every input, so it adds up all roundings as if each had its largest size and all had the same sign. Real errors are much smaller, and a bound that is too large detects no mistake that is smaller than itself.
#
# So here are, for growing layers: the difference, its bound, and what two planted mistakes change: a scaling of 0.303 instead of 0.3, and an update that is rounded to bfloat16 before it is merged. All are given relative to the largest output.

# %%
print("in_features   difference     bound   scaling 1 % off   update in bfloat16")
caught = {}
for k in (8, 64, 512, 4096):
    x, V, A, B = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((8, k), (64, k), (8, k), (64, 8))
    )
    adapter, wrong = lora.LoRA(A, B, 0.3), lora.LoRA(A, B, 0.303)
    apart = lora.forward(x, V, adapter)
    update = torch.from_numpy(lora.delta(adapter)).bfloat16().float().numpy()
    merged = {
        "right": linear.forward(x, lora.merge(V, adapter)),
        "scaling": linear.forward(x, lora.merge(V, wrong)),
        "bfloat16": linear.forward(x, V + update),
    }
    n = k + 8 + 4
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    bound = 2 * gamma * lora.forward(abs(x), abs(V), lora.LoRA(abs(A), abs(B), 0.3))
    off = {name: np.abs(apart - y) for name, y in merged.items()}
    caught[k] = [bool((off[name] > bound).any()) for name in ("scaling", "bfloat16")]
    shares = [float(e.max() / np.abs(apart).max()) for e in (off["right"], bound)]
    marks = [
        f"{float(off[name].max() / np.abs(apart).max()):.0e} {'seen' if seen else 'NOT seen'}"
        for name, seen in zip(("scaling", "bfloat16"), caught[k], strict=True)
    ]
    print(
        f"{k:11d}   {shares[0]:10.0e}   {shares[1]:7.0e}   {marks[0]:>15s}   {marks[1]:>18s}"
    )
    assert np.all(off["right"] <= bound)
assert all(caught[8])
assert not any(caught[4096])

# %% [markdown]
# For 8 features both mistakes change an output by more than the bound. For 4,096 the bound has grown so far that neither does. A bound does not show that two programs compute the same. It shows that they differ by no more than so much.
# The tests of this book therefore use it on small layers only, and use fractions and integers, where the bound is zero, for everything that those can express.
#
# ## The experiment: a thousand cycles in bfloat16
#
# A server switches adapters: merge, answer, unmerge, a thousand times. The usual way to unmerge is to subtract what was added. In bfloat16, with 8 bits of precision, $(W + \Delta) - \Delta$ is not
# $W$. How large is the difference, and does it grow? Four ways, one matrix of MiniLM:
#
# 1. **add and subtract**, each sum rounded to bfloat16, with the same adapter every time;
# 2. **add in float32, subtract in bfloat16**: the update is rounded before it is subtracted, and was not before it was added. So does `merge` of peft 0.21 on a base of 16 bits with adapters of 32;
# 3. **the first with a hundred adapters** that take turns;
# 4. **ours**, which keeps $W$, with the same hundred.

# %%
models.fetch("minilm")
weights = models.minilm_weights()
W = weights["encoder.layer.3.attention.self.query.weight"]
R, CYCLES = 8, 1000
original = torch.from_numpy(W).bfloat16()


def adapters(count):
    """Updates about a fifth as large as the weight."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        A = torch.randn(R, W.shape[1], generator=generator)
        B = torch.randn(W.shape[0], R, generator=generator)
        scale = 0.1 * W.std() / R**0.5
        found.append(lora_torch.LoRA(A, float(scale) * B, 2.0))
    return found


def drift_naive(updates, taken_off=lambda update: update):
    """RMS distance from the original after each cycle of add and subtract."""
    weight, distances = original.clone(), []
    for cycle in range(CYCLES):
        update = updates[cycle % len(updates)]
        weight = (weight.float() + update).bfloat16()
        weight = (weight.float() - taken_off(update)).bfloat16()
        distances.append(
            float((weight.float() - original.float()).square().mean().sqrt())
        )
    return np.array(distances)


with torch.no_grad():
    hundred = adapters(100)
    deltas = [lora_torch.delta(adapter) for adapter in hundred]
    naive = {
        "one adapter, add and subtract": drift_naive(deltas[:1]),
        "one adapter, rounded": drift_naive(
            deltas[:1], lambda update: update.bfloat16().float()
        ),
        "a hundred in turn, add and subtract": drift_naive(deltas),
    }
    base = nn.Linear(*W.T.shape, bias=False, dtype=torch.bfloat16)
    base.weight.copy_(original)
    layer = LoRALinear(base, hundred[0], "0")
    for number, adapter in enumerate(hundred[1:], 1):
        layer.add(str(number), adapter)
    ours = np.zeros(CYCLES)
    for cycle in range(CYCLES):
        layer.activate({str(cycle % 100): 1.0})
        layer.merge()
        layer.unmerge()
        ours[cycle] = float((layer.base.weight - original).abs().max())
deviation = float(original.float().std())
median = float(original.float().abs().median())
step = 2.0 ** (np.floor(np.log2(median)) - 7) / deviation  # 8 bits: 7 behind the first
naive = {name: distances / deviation for name, distances in naive.items()}
print("RMS distance from W, relative to the standard deviation of W")
for name, distances in naive.items():
    print(
        f"{name:37s} after 1: {distances[0]:.1e}, 10: {distances[9]:.1e}, 1000: {distances[-1]:.1e}"
    )
print(f"{'ours':37s} after 1000: {ours[-1]:.1e}")
print(f"half a step of bfloat16 at the median weight: {step / 2:.1e}")
assert ours.max() == 0
assert torch.equal(layer.base.weight, original)
assert np.ptp(naive["one adapter, add and subtract"]) == 0
for name in ("one adapter, rounded", "a hundred in turn, add and subtract"):
    assert naive[name][-1] > 5 * naive[name][0]

# %% tags=["fold"]
figure, ax = plots.axes(
    x="merge and unmerge cycles",
    y="RMS distance / deviation of W",
    size=(6.4, 3.6),
)
cycles = np.arange(1, CYCLES + 1)
for color, (name, distances) in zip(plots.PALETTE[1:], naive.items(), strict=False):
    ax.plot(cycles, distances, color=color)
    below = name.endswith("rounded")  # above it is the line of the hundred
    ax.text(
        CYCLES * 0.9,
        distances[-1] * (0.6 if below else 1.12),
        name,
        ha="right",
        va="top" if below else "bottom",
        color=color,
        weight="bold",
    )
ax.plot(cycles, ours, color=plots.PALETTE[0], linewidth=3)
ax.text(
    CYCLES * 0.9, 3e-5, "ours: zero", ha="right", color=plots.PALETTE[0], weight="bold"
)
ax.set_xscale("log")
ax.set_yscale("symlog", linthresh=1e-4)
ax.set_ylim(-2e-5, 0.2)
ax.set_yticks([0, 1e-4, 1e-3, 1e-2, 1e-1], ["0", "0.0001", "0.001", "0.01", "0.1"])
ax.minorticks_off()
one, rounded, many = naive.values()
chapter.show(
    figure,
    "drift",
    alt=f"Root mean square distance from the original weight over {CYCLES:,} cycles, divided by the standard deviation of the weight, on logarithmic axes: one adapter added and subtracted gives a flat line, the same adapter subtracted rounded a line that rises, {len(hundred)} in turn one that rises further, and keeping the weight stays at zero.",
    caption=f"In {CYCLES:,} cycles {len(hundred)} adapters in turn drift from {many[0]:.1e} to {many[-1]:.1e} of the weight's standard deviation, and one adapter that is rounded before it is subtracted from {rounded[0]:.1e} to {rounded[-1]:.1e}. Where the same numbers are added and subtracted, one adapter stays at {one[-1]:.1e}. Keeping the weight stays at zero.",
)

# %% [markdown]
# With a single adapter the error is there after one cycle, {=f"{one[0]:.1e}"=} of the weight's standard deviation, and is {=f"{one[-1]:.1e}"=} after a thousand: once each weight has been rounded, adding and subtracting *this* update gives the same values again. With a hundred in turn each begins where the last one left off, and the errors add up:
# {=f"{many[0]:.1e}"=} after one cycle, {=f"{many[-1]:.1e}"=} after a thousand.
#
# One adapter drifts too if merging and unmerging do not round alike. The update that is subtracted differs from the one that was added by the rounding of the update, and this difference is the same in every cycle: {=f"{rounded[0]:.1e}"=} after one cycle, {=f"{rounded[99]:.1e}"=} after a hundred, {=f"{rounded[-1]:.1e}"=} after a thousand. So a report of no growth and a report of growth can both be right: they describe different experiments.
#
# Keeping the weight costs its memory. Nothing is subtracted, so nothing drifts.
#
# ### Round once, or round twice
#
# A single merge in 16 bits can be rounded in two ways: round the sum, or round the update first and then the sum. The second has the larger error:

# %%
update = deltas[0]
once = (original.float() + update).bfloat16()
twice = (original.float() + update.bfloat16().float()).bfloat16()
exact_sum = original.double() + update.double()
differ = float((once != twice).float().mean())
errors = {
    name: float((m.double() - exact_sum).abs().mean())
    for name, m in {"once": once, "twice": twice}.items()
}
print(
    f"{differ:.1%} of the weights differ; mean error {errors['once']:.3e} rounded once, {errors['twice']:.3e} twice"
)
assert errors["once"] < errors["twice"]
with torch.no_grad():
    layer.activate({"0": 1.0})
    assert torch.equal(layer.merged(), once)

# %% [markdown]
# ## The experiment: a base in four bits
#
# QLoRA trained its adapter on $\hat W$, what comes back from NF4, and not on $W$. Where can it be merged to?
#
# - into **$\hat W$, kept in full**: exactly the function that was trained, but no longer in four bits;
# - into **$\hat W$, quantized again**: in four bits, but rounding may remove the update;
# - into **the original $W$**: without quantization error, but another function than the one that was trained.
#
# @source minipeft.reference.qlora.merge
#
# @source minipeft.reference.qlora.requantize
#
# We merge updates of different size. The *effective* update is the merged weight minus the base: the change that rounding has let through. Its cosine with the intended update says how much of the direction is left. The last
# two columns give the error of the output, relative to the output of the base.

# %%
q = blockwise.quantize(W)
W_hat = blockwise.dequantize(q)
grid = np.linalg.norm(W_hat - W) / np.linalg.norm(W)
label = "MiniLM, query matrix of layer 3, NF4: norm of the error / norm"
chapter.quantity(label, 100 * grid, "%", 1)
A, B = rng.standard_normal((R, W.shape[1])), rng.standard_normal((W.shape[0], R))
direction = (B @ A).astype(np.float32)
direction /= np.linalg.norm(direction)
SIZES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
cosines, lengths = [], []
x = rng.standard_normal((64, W.shape[1])).astype(np.float32)
print(
    "|update| / |W|   cosine   codes, scales changed   error: requantized   original W"
)
size_of_output = np.linalg.norm(linear.forward(x, W_hat))
into_original, codes = [], []
for size in SIZES:
    root = np.sqrt(size * np.linalg.norm(W) / np.linalg.norm(B @ A) / 2)
    adapter = lora.LoRA(
        (root * A).astype(np.float32), (root * B).astype(np.float32), 2.0
    )
    intended = lora.delta(adapter)
    requantized = qlora.requantize(q, adapter)
    effective = blockwise.dequantize(requantized) - W_hat
    cosine = float(
        (effective * intended).sum()
        / (np.linalg.norm(effective) or 1)
        / np.linalg.norm(intended)
    )
    cosines.append(cosine)
    lengths.append(np.linalg.norm(effective) / np.linalg.norm(intended))
    changed = np.count_nonzero(
        blockwise.unpack(requantized.packed, 4, W.size)
        != blockwise.unpack(q.packed, 4, W.size)
    )
    wanted = qlora.forward(x, q, adapter)
    miss = [
        np.linalg.norm(linear.forward(x, merged) - wanted) / size_of_output
        for merged in (blockwise.dequantize(requantized), lora.merge(W, adapter))
    ]
    into_original.append(miss[1])
    scales = np.count_nonzero(requantized.absmax != q.absmax)
    print(
        f"{size:14}   {cosine:6.3f}   {changed:13,} {scales:8,}   {miss[0]:18.3f}   {miss[1]:10.3f}"
    )
    codes.append(changed)
    full = qlora.merge(q, adapter)
    assert np.linalg.norm(
        linear.forward(x, full) - wanted
    ) <= 2.0**-18 * np.linalg.norm(wanted)
assert cosines == sorted(cosines)
assert np.ptp(into_original) < 1e-3  # the error of NF4, whatever the update

# %% tags=["fold"]
figure, ax = plots.axes(
    x="norm of the update / norm of the weight",
    y="cosine with the intended update",
    size=(6.4, 3.4),
)
ax.plot(SIZES, cosines, "o-", color=plots.PALETTE[1])
for size, cosine in zip(SIZES, cosines, strict=True):
    above = (-3, 6) if cosine < 0.5 else (8, -12)
    ax.annotate(
        f"{cosine:.2f}",
        (size, cosine),
        above,
        textcoords="offset points",
        fontsize=9,
        ha="right" if cosine < 0.5 else "left",
    )
ax.axhline(1, color=plots.PALETTE[0], linewidth=3)
ax.text(
    SIZES[0],
    1.03,
    "merged into the dequantized weight: 1",
    color=plots.PALETTE[0],
    weight="bold",
)
ax.text(
    0.033, 0.62, "into 4 bits again", color=plots.PALETTE[1], weight="bold", ha="right"
)
ax.axvline(grid, ymax=0.84, color=plots.INK, linewidth=0.8, linestyle="--")
ax.text(grid * 1.08, 0.05, f"error of NF4: {grid:.2f}", color=plots.INK)
ax.set(xscale="log", xlim=(0.002, 1.4), ylim=(0, 1.14))
ax.set_xticks(SIZES, [f"{size:g}" for size in SIZES])
ax.minorticks_off()
chapter.show(
    figure,
    "requantized",
    alt=f"Cosine between the intended and the effective update after requantizing, against the size of the update relative to the weight, with the value at each point. The curve rises from {cosines[0]:.2f} at the left to {cosines[-1]:.2f} at the right; a dashed line marks the size of NF4's own error.",
    caption=f"An update of {SIZES[1]:.0%} of the weight comes out of four bits with a cosine of {cosines[1]:.2f}, one of {SIZES[3]:.0%} with {cosines[3]:.2f}, one of {SIZES[5]:.0%} with {cosines[5]:.2f}. NF4's own error is {100 * grid:.0f} % of the weight.",
)

# %% [markdown]
# An update of 1 % of the weight comes out with a cosine of {=f"{cosines[1]:.2f}"=}, one of 10 % with {=f"{cosines[3]:.2f}"=}. NF4's own rounding errs by {=f"{100 * grid:.0f}"=} % of the weight. A code changes only where the update crosses the boundary between two codes. At 1 % it changes {=codes[1]=} of {=f"{W.size:,}"=} codes. What comes out is a
# change of the scales: the largest weight of each block of 64 takes its own update with it, and the other 63 are multiplied by the ratio. That has little to do with their updates.
# So merge into 16 bits, or keep
# the adapter beside the 4 bits.
#
# Merging into the original even removes the quantization error. But the adapter was trained beside $\hat W$, and the output differs from the trained one by the error of NF4, {=f"{into_original[0]:.3f}"=} of the base's output for every size of update: the last column. Whether the
# model becomes better or worse has to be measured for each model; it is not the function that was trained.
#
# ## What cannot be merged
#
# | method | merges into a weight? | why |
# |---|---|---|
# | LoRA, rsLoRA, [PiSSA](11_pissa.md), [LoftQ](12_loftq.md) | yes | $W + s\,BA$ |
# | [DoRA](08_dora.md), [VeRA](09_vera.md) | yes | rescaled rows; a product of fixed matrices |
# | [HiRA, MiSS](20_hira_miss.md) | yes | $W + s\,W \odot BA$; repeated rows of one matrix |
# | [(IA)³](10_ia3.md) | yes, also where $l = 0$ | rows or columns scaled |
# | [bottleneck adapters](13_bottleneck.md) | no | a nonlinearity stands between |
# | [prefix](14_prefix.md) | no | a gate that depends on the query |
# | [soft prompt](15_prompt.md) | no | it acts through attention, not on a token by itself |
#
# ## What goes wrong in practice
#
# - **Unmerge by subtraction** drifts in bfloat16. [trl 6688](https://github.com/huggingface/trl/issues/6688) reports growth over a thousand cycles of peft's merge with one adapter: the second of the four ways above.
# - **Merging twice.** A second call adds the update again, unless the layer keeps a record that it is merged. Here merging starts from the base each time.
# - **The update in sixteen bits before the sum**: two roundings. In peft `safe_merge=True` and `False` differ in this. For one merge the careful setting is the less exact one. Over many cycles it is the better one, because `unmerge` rounds the update as well.
# - **A bias that is merged without the scaling** ([peft 2489](https://github.com/huggingface/peft/pull/2489)). It passed every test, because the default has $s = 1$. The random layers on which this book tests the merge of LoRA never have $s = 1$.
# - **A merged checkpoint with tied embeddings**: the update of the input table reached the output layer too, or was lost. `inject` refuses tied layers, and the merge of files gives the head a weight of its own ([chapter 21](21_files.md)).
# - **Merged into the wrong base.** $W$, $\hat W$ and $\hat W$ quantized again are three models. If the file of an adapter does not name its base, it will be merged into one of the others.
#
# ## Exercises
#
# 1. Merge the same integer adapter as above with $s = 1/3$ instead of $1/2$. Are the bytes still equal? Why not?

# %% tags=["solution"]
x, V, A, B = (
    rng.integers(-8, 9, s).astype(np.float32)
    for s in ((3, 50), (40, 50), (4, 50), (40, 4))
)
third = lora.LoRA(A, B, 1 / 3)
apart, together = lora.forward(x, V, third), linear.forward(x, lora.merge(V, third))
print(f"{np.mean(apart != together):.0%} of the outputs differ: a third is no float")
assert np.any(apart != together)

# %% [markdown]
# 2. How many cycles does naive merging in float32 need to drift as far as one cycle in bfloat16? Estimate from the precision, and check the order of magnitude after a thousand.

# %% tags=["solution"]
weight, start_at = torch.from_numpy(W).clone(), torch.from_numpy(W)
for cycle in range(CYCLES):
    update = deltas[cycle % 100]
    weight = (weight + update) - update
float32 = float((weight - start_at).square().mean().sqrt())
bfloat16 = many[0] * deviation
print(f"float32 after {CYCLES}: {float32:.1e}; bfloat16 after 1: {bfloat16:.1e}")
print(
    "If the errors of the cycles are independent, they grow with the root of the number:"
)
print(f"from the precisions, which differ by 2^16, (2^16)^2 = {2.0**32:.0e} cycles;")
print(f"from this run, {CYCLES * (bfloat16 / float32) ** 2:.0e} cycles")
assert float32 < bfloat16 / 100

# %% [markdown]
# 3. Quantize, dequantize and quantize again, with no adapter. Does the base drift?

# %% tags=["solution"]
nothing = lora.LoRA(
    np.zeros((1, W.shape[1]), np.float32), np.ones((W.shape[0], 1), np.float32), 2.0
)
again = qlora.requantize(q, nothing)
assert again.packed.tobytes() == q.packed.tobytes()
print("not by a byte: a weight that NF4 can represent is rounded to itself")

# %% [markdown]
# ## References
#
# The bounds are Higham's [@higham2002]. LoRA and its merge are by Hu and others [@hu2021], the quantized base by Dettmers and others [@dettmers2023].
