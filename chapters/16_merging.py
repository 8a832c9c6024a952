# %% [markdown]
# # Merging: when is it the same?
#
# A trained adapter can become part of the weight and cost nothing afterwards. "Merging is exact", one reads, and also "merged
# and unmerged outputs differ". Both are true, of different numbers. This chapter goes through them: fractions, integers, floats, sixteen bits, and
# a base in four.

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

chapter = start("16_merging", steps=1, model="minilm")

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
# In torch, merging never writes to the base. $W'$ stands *beside* $W$ and is computed with; to unmerge is to throw $W'$ away. The price is memory: while merged, the weight is there twice. `unload`
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
# Where nothing is rounded, the two are equal. Not nearly: `==`.

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
# CUDA must agree *bit for bit*, and whoever does not has a defect and no excuse.

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
# float32. Here is the difference beside the bound, for growing layers.

# %%
print("in_features   largest difference   its bound")
for k in (64, 256, 1024, 4096):
    x, V, A, B = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((8, k), (64, k), (8, k), (64, 8))
    )
    adapter = lora.LoRA(A, B, 0.3)
    difference = lora.forward(x, V, adapter) - linear.forward(x, lora.merge(V, adapter))
    n = k + 8 + 4
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    size = lora.forward(abs(x), abs(V), lora.LoRA(abs(A), abs(B), 0.3))
    print(
        f"{k:11d}   {np.abs(difference).max():18.2e}   {(2 * gamma * size).max():.2e}"
    )
    assert np.all(np.abs(difference) <= 2 * gamma * size)

# %% [markdown]
# The bound is generous because roundings do not conspire. It is still the only tolerance that the tests of this book use: whoever finds a difference above it has found a bug, and not bad luck.
#
# ## The experiment: a thousand cycles in bfloat16
#
# A server switches adapters: merge, answer, unmerge, a thousand times. The usual way to unmerge is to subtract what was added. In bfloat16, with 8 bits of precision, $(W + \Delta) - \Delta$ is not
# $W$. How bad is it, and does it get worse? Three ways, one matrix of MiniLM:
#
# 1. **add and subtract**, each rounded to bfloat16, with the same adapter every time;
# 2. **the same with a hundred adapters** that take turns;
# 3. **ours**, with the same hundred.

# %%
models.fetch("minilm")
weights = models.minilm_weights()
W = weights["encoder.layer.3.attention.self.query.weight"]
R, CYCLES = 8, 1000
original = torch.from_numpy(W).bfloat16()


def adapters(count):
    """Updates about a tenth as large as the weight."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        A = torch.randn(R, W.shape[1], generator=generator)
        B = torch.randn(W.shape[0], R, generator=generator)
        scale = 0.1 * W.std() / R**0.5
        found.append(lora_torch.LoRA(A, float(scale) * B, 2.0))
    return found


def drift_naive(updates):
    """RMS distance from the original after each cycle of add and subtract."""
    weight, distances = original.clone(), []
    for cycle in range(CYCLES):
        update = updates[cycle % len(updates)]
        weight = (weight.float() + update).bfloat16()
        weight = (weight.float() - update).bfloat16()
        distances.append(
            float((weight.float() - original.float()).square().mean().sqrt())
        )
    return np.array(distances)


with torch.no_grad():
    hundred = adapters(100)
    deltas = [lora_torch.delta(adapter) for adapter in hundred]
    naive = {
        "one adapter, add and subtract": drift_naive(deltas[:1]),
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
ulp = float(original.float().abs().median()) * 2.0**-8
for name, distances in naive.items():
    print(
        f"{name:37s} after 1: {distances[0]:.1e}, 10: {distances[9]:.1e}, 1000: {distances[-1]:.1e}"
    )
print(f"{'ours':37s} after 1000: {ours[-1]:.1e}")
print(f"half a step of bfloat16 at the median weight: {ulp / 2:.1e}")
assert ours.max() == 0
assert torch.equal(layer.base.weight, original)
assert (
    naive["a hundred in turn, add and subtract"][-1]
    > 5 * naive["a hundred in turn, add and subtract"][0]
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="merge and unmerge cycles", y="RMS distance from the weight", size=(6.4, 3.4)
)
for color, (name, distances) in zip(plots.PALETTE[1:], naive.items(), strict=False):
    ax.plot(
        np.arange(1, CYCLES + 1), distances / float(original.float().std()), color=color
    )
    ax.text(
        CYCLES * 0.9,
        distances[-1] / float(original.float().std()) * 1.12,
        name,
        ha="right",
        va="bottom",
        color=color,
        weight="bold",
    )
ax.plot(np.arange(1, CYCLES + 1), ours, color=plots.PALETTE[0], linewidth=3)
ax.text(
    CYCLES * 0.9, 3e-5, "ours: zero", ha="right", color=plots.PALETTE[0], weight="bold"
)
ax.set_xscale("log")
ax.set_yscale("symlog", linthresh=1e-4)
ax.set_ylim(-2e-5, 0.2)
ax.yaxis.set_major_formatter("{x:.0e}")
chapter.show(
    figure,
    "drift",
    alt="Distance from the original weight over a thousand cycles, relative to its deviation: one adapter added and subtracted settles at once, a hundred in turn drift steadily upwards, and keeping the weight stays at zero.",
)

# %% [markdown]
# With a single adapter the damage is done in the first cycle and stays: the weights have been rounded to a grid on which adding and subtracting *this* update is a closed orbit. With a hundred in turn each begins where the last one left off, and the errors walk:
# {=f"{naive['a hundred in turn, add and subtract'][0]:.1e}"=} after one cycle, {=f"{naive['a hundred in turn, add and subtract'][-1]:.1e}"=} after a thousand. That settles a dispute: reports of "no growth" and of "steady growth" measured two different experiments.
#
# Keeping the weight costs its memory, and the drift is zero because there is nothing that could drift.
#
# ### Round once, or round twice
#
# Even a single merge has a right and a wrong way in sixteen bits. Round the sum, or round the update first and then the sum:

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
# - into **$\hat W$, quantized again**: small, and the update must survive the rounding;
# - into **the original $W$**: a different function, the one that training never saw.
#
# @source minipeft.reference.qlora.merge
#
# @source minipeft.reference.qlora.requantize
#
# We merge updates of different size and ask how much of each arrives. The *effective* update is what the merged weight differs by from the base it came from.

# %%
q = blockwise.quantize(W)
W_hat = blockwise.dequantize(q)
grid = np.linalg.norm(W_hat - W) / np.linalg.norm(W)
A, B = rng.standard_normal((R, W.shape[1])), rng.standard_normal((W.shape[0], R))
direction = (B @ A).astype(np.float32)
direction /= np.linalg.norm(direction)
SIZES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
cosines, lengths = [], []
x = rng.standard_normal((64, W.shape[1])).astype(np.float32)
print(
    "|update| / |W|   direction kept   codes changed   output error: requantized   original"
)
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
    changed = np.mean(
        blockwise.unpack(requantized.packed, 4, W.size)
        != blockwise.unpack(q.packed, 4, W.size)
    )
    wanted = qlora.forward(x, q, adapter)
    miss = [
        np.linalg.norm(linear.forward(x, merged) - wanted) / np.linalg.norm(wanted)
        for merged in (blockwise.dequantize(requantized), lora.merge(W, adapter))
    ]
    print(
        f"{size:14}   {cosine:14.3f}   {changed:13.1%}   {miss[0]:25.3f}   {miss[1]:8.3f}"
    )
    full = qlora.merge(q, adapter)
    assert np.linalg.norm(
        linear.forward(x, full) - wanted
    ) <= 2.0**-18 * np.linalg.norm(wanted)
assert cosines == sorted(cosines)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="size of the update, relative to the weight", y="cosine", size=(6.4, 3.1)
)
ax.plot(SIZES, cosines, "o-", color=plots.PALETTE[1])
ax.axhline(1, color=plots.PALETTE[0], linewidth=3)
ax.text(
    SIZES[0],
    1.03,
    "into the dequantized weight: all of it",
    color=plots.PALETTE[0],
    weight="bold",
)
ax.text(
    0.13,
    0.5,
    "into four bits again",
    color=plots.PALETTE[1],
    weight="bold",
)
ax.axvspan(0.003, 0.03, color=plots.FAINT, alpha=0.5, linewidth=0)
ax.text(0.0095, 0.78, "up to 3 %\nof the weight", ha="center", color=plots.INK)
ax.set(xscale="log", ylim=(0, 1.14))
chapter.show(
    figure,
    "requantized",
    alt="Cosine between the intended and the effective update after requantizing, against the size of the update: near zero for updates of one percent of the weight, near one only when the update is as large as the weight.",
)

# %% [markdown]
# An update of one percent of the weight keeps {=f"{100 * cosines[1]:.0f}"=} % of its direction; one of ten percent, {=f"{100 * cosines[3]:.0f}"=} %. NF4's own rounding errs by {=100 * grid:.0f=} %, and what is smaller than the grid drowns in it. So: merge into sixteen bits, or keep
# the adapter beside the four.
#
# Merging into the original looks attractive, since it would even undo the quantization. Its output differs from the trained one by the error of NF4, whatever the update: that is what
# the last column of the table says. Some report that it helps, some that it hurts. Both can be: it is not the function that was trained.
#
# ## What cannot be merged
#
# | method | merges into a weight? | why |
# |---|---|---|
# | LoRA, rsLoRA, [PiSSA](11_pissa.md), [LoftQ](12_loftq.md) | yes | $W + s\,BA$ |
# | [DoRA](08_dora.md), [VeRA](09_vera.md) | yes | rescaled rows; a product of fixed matrices |
# | [(IA)³](10_ia3.md) | yes, also where $l = 0$ | rows or columns scaled |
# | [bottleneck adapters](13_bottleneck.md) | no | a nonlinearity stands between |
# | [prefix](14_prefix.md) | no | a gate that depends on the query |
# | [soft prompt](15_prompt.md) | no | it acts through attention, not on a token by itself |
#
# ## What goes wrong in practice
#
# - **Unmerge by subtraction** drifts in bfloat16 ([trl 6688](https://github.com/huggingface/trl/issues/6688)), as measured above.
# - **Merging twice.** A second call adds the update again, unless the layer knows that it is merged. Here merging starts from the base each time.
# - **The update in sixteen bits before the sum**: two roundings. In peft `safe_merge=True` and `False` differ in this, so the careful setting is the less exact one.
# - **The bias forgets the scaling** ([peft 2489](https://github.com/huggingface/peft/pull/2489)). It passed every test, because the default has $s = 1$. No case of this book's has.
# - **A merged checkpoint with tied embeddings**: the update of the input table reached the output layer too, or was lost. Tied layers are refused here.
# - **Merged into the wrong base.** $W$, $\hat W$ and $\hat W$ quantized again are three models. A file that does not say which one it wants will meet another.
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
bfloat16 = naive["a hundred in turn, add and subtract"][0]
print(
    f"float32 after {CYCLES}: {float32:.1e}; bfloat16 after 1: {bfloat16:.1e}; the precisions differ by 2^16"
)
assert float32 < bfloat16 / 100

# %% [markdown]
# 3. Quantize, dequantize and quantize again, with no adapter. Does the base drift?

# %% tags=["solution"]
nothing = lora.LoRA(
    np.zeros((1, W.shape[1]), np.float32), np.ones((W.shape[0], 1), np.float32), 2.0
)
again = qlora.requantize(q, nothing)
assert again.packed.tobytes() == q.packed.tobytes()
print("not by a byte: what NF4 can say, it says again")

# %% [markdown]
# ## References
#
# The bounds are Higham's [@higham2002]. LoRA and its merge are by Hu and others [@hu2021], the quantized base by Dettmers and others [@dettmers2023].
