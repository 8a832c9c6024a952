# %% [markdown]
# # VeRA: train two vectors
#
# LoRA trains two thin matrices for every layer. VeRA [@kopiczko2023] draws one pair of random matrices, freezes it, uses it in *all* layers,
# and trains two vectors for each layer that scale it. A file then needs only those vectors and a seed, provided that every program draws the same
# numbers from that seed. One section of this chapter is about drawing the same numbers, and the others are about VeRA.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import plots, train
from minipeft.lab.chapter import start
from minipeft.reference import linear, vera
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.vera import VeRAConfig

chapter = start("09_vera", steps=30, model="tiny")

# %% [markdown]
# ## The problem
#
# A LoRA adapter of rank 8 for a large model takes tens of megabytes. That is little beside the model, but much if each of many users has an adapter. It holds $r\,(\text{in} + \text{out})$
# numbers for each layer, and $r$ cannot be less than 1.
#
# ## The formula
#
# Draw $A$ of shape $(r, \text{in})$ and $B$ of shape $(\text{out}, r)$ once. Each layer trains $d$, of $r$ numbers, and $b$, of out numbers:
#
# $$ \Delta W = \Lambda_b\, B\, \Lambda_d\, A, $$
#
# with the vectors on the diagonals of $\Lambda_b$ and $\Lambda_d$. $b$ starts at zero, so training begins at the base model, and $d$ at a number that is chosen, here 0.1. There is no $\alpha$, because the trained vectors
# set the size. As in peft, the pair is as large as the largest layer needs, and a smaller layer uses the upper left corner of each matrix.
#
# That is $r + \text{out}$ trained numbers a layer. In a layer of 4,096 outputs, a rank of 256 adds 6 % to them.
#
# ## The code
#
# @source minipeft.reference.vera.VeRA
#
# @source minipeft.reference.vera.delta
#
# @source minipeft.reference.vera.forward
# @source minipeft.torch.vera.VeRALinear
#
# @source minipeft.reference.vera.backward
#
# @source minipeft.reference.vera.init
#
# @source minipeft.reference.vera.merge
#
# @source minipeft.reference.vera.fit
#
# ## One seed, the same bits everywhere
#
# An adapter that keeps only a seed is useless where the seed gives other numbers. torch's CPU generator is the Mersenne Twister
# MT19937 [@matsumoto1998], and so is NumPy's old `RandomState`, whose stream NumPy has promised never to change. From the same 32-bit words, torch makes a uniform number
# in three steps: take the low 24 bits as a fraction $u$, multiply by the width of the interval, add its lower end. The compiler fuses the last two into one
# operation, which rounds *once*. Our NumPy code rounds once too:
#
# @source minipeft.reference.vera.projections
# @source minipeft.torch.vera.projections
#
# @source minipeft.reference.vera.kaiming_uniform
# @source minipeft.torch.vera.kaiming_uniform

# %%
seed, r, in_features, out_features = 42, 64, 300, 200
ours = vera.projections(seed, r, in_features, out_features)
stream = torch.Generator().manual_seed(seed)
bound = (6 / in_features) ** 0.5
theirs = torch.empty(r, in_features).uniform_(-bound, bound, generator=stream)
assert ours.A.tobytes() == theirs.numpy().tobytes()

words = np.frombuffer(np.random.RandomState(seed).bytes(4 * ours.A.size), "<u4")
u, b32 = ((words & 0xFFFFFF) * 2.0**-24).astype(np.float32), np.float32(bound)
twice = (u * (b32 + b32) - b32).reshape(ours.A.shape)
off = float((twice != ours.A).mean())
print(f"one rounding: all {ours.A.size:,} numbers are torch's, bit for bit")
print(f"two roundings: {off:.0%} of them differ in the last bit")

# %% [markdown]
# The tests compare with torch and with peft's own initializer for many seeds and sizes, and [the golden vectors](../verify.md) contain the numbers for other implementations.
#
# The pair depends on more than the seed. The numbers fill $A$ row by row, so if the largest layer is *wider*, every row but the first begins at another place of the stream. Two models with different
# target layers can therefore draw different pairs from one seed. Our state dict holds four numbers, the seed and the three sizes, and loading it draws that pair
# again.

# %%
wider = vera.projections(seed, r, in_features + 1, out_features)
scale = np.sqrt((in_features + 1) / in_features)
same = np.isclose(wider.A[:, :in_features] * scale, ours.A)
print(f"row 0 the same: {same[0].mean():.0%}; other rows: {same[1:].mean():.2%}")
assert same[0].all()
assert same[1:].mean() < 0.01

# %% [markdown]
# ## How many parameters?
#
# The paper's first table counts the query and key projections. Here are its numbers ("printed") and ours.

# %%
RoBERTa_base, RoBERTa_large, GPT3 = (12, 768), (24, 1024), (96, 12288)
rows = [
    ("RoBERTa base", RoBERTa_base, 1, 18.4e3), ("RoBERTa base", RoBERTa_base, 16, 18.8e3),
    ("RoBERTa base", RoBERTa_base, 256, 24.5e3), ("RoBERTa large", RoBERTa_large, 1, 49.2e3),
    ("RoBERTa large", RoBERTa_large, 16, 49.5e3), ("RoBERTa large", RoBERTa_large, 256, 61.4e3),
    ("GPT-3", GPT3, 1, 2.4e6), ("GPT-3", GPT3, 16, 2.8e6), ("GPT-3", GPT3, 256, 8.7e6),
]  # fmt: skip
print(
    f"{'model':14s} {'r':>4s} {'LoRA':>11s} {'VeRA':>10s} {'and A, B':>10s} {'printed':>10s}"
)
for name, (layers, width), rank, printed in rows:
    trained = 2 * layers * (width + rank)
    shared = 2 * width * rank
    low_rank = 2 * layers * 2 * width * rank
    print(
        f"{name:14s} {rank:4d} {low_rank:11,} {trained:10,} {trained + shared:10,} {printed:10,.0f}"
    )
    explained = trained + shared if name == "GPT-3" else trained
    assert abs(explained - printed) < 0.02 * printed

# %% [markdown]
# The comparison shows two things. The rows of RoBERTa count what is trained; those of GPT-3 at ranks 16 and 256 match only if the shared, frozen pair is counted too. And for RoBERTa large at
# rank 16 the formula gives {=f"{2 * 24 * (1024 + 16):,}"=}, where the table prints 49.5 thousand. Either way of counting is right if it is said, but a ratio
# between methods should use one of them.
#
# ## The proof
#
# The formula has only sums and products, so it runs on fractions, and the merged layer equals the adapted one with `==`. The layer here is smaller than the pair:

# %%
from fractions import Fraction

rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    top, bottom = rng.integers(-9, 10, shape).flat, rng.integers(1, 9, shape).flat
    values = [Fraction(int(n), int(d)) for n, d in zip(top, bottom, strict=True)]
    return np.array(values, dtype=object).reshape(shape)


x, W = fractions(3, 5), fractions(4, 5)
pair = vera.Projections(fractions(2, 6), fractions(7, 2))  # for larger layers
adapter = vera.VeRA(fractions(2), fractions(4))
merged = linear.forward(x, vera.merge(W, pair, adapter))
assert (merged == vera.forward(x, W, pair, adapter)).all()
print("merged[0]:", *merged[0])

# %% [markdown]
# ## The experiment
#
# `tiny` learns the *Devil's Dictionary* with VeRA at three ranks, and, as a control, with LoRA of rank 1, the smallest that there is. Each gets the best of three learning rates.

# %%
base = chapter.load()
batches, held_out = (
    chapter.task.training(base.tokenizer),
    chapter.task.held_out(base.tokenizer),
)
places = chapter.places(base.model)
before = train.loss(base.model, held_out)
chapter.quantity(chapter.before, before, "nats per token")


def run(config, rate):
    """Train an adapter; return how many numbers that trained, and the loss."""
    generator = torch.Generator().manual_seed(0)
    model = inject(
        copy.deepcopy(base.model), config, places.linears, generator=generator
    )
    settings = train.TrainConfig(chapter.steps, lr=rate, warmup=chapter.steps // 10)
    history = train.train(model, batches, settings, held_out, chapter.kept())
    count = sum(p.numel() for p in trainable_parameters(model))
    return count, history.validation[-1][1]


found, best = {}, {}
for name, config, rates in [
    ("VeRA, r = 4", VeRAConfig(r=4), (1e-1, 3e-1, 1.0)),
    ("VeRA, r = 64", VeRAConfig(r=64), (3e-2, 1e-1, 3e-1)),
    ("VeRA, r = 256", VeRAConfig(r=256), (3e-2, 1e-1, 3e-1)),
    ("LoRA, r = 1", LoRAConfig(r=1, alpha=2), (1e-2, 3e-2, 1e-1)),
]:
    runs = {rate: run(config, rate) for rate in rates}
    losses = {rate: loss for rate, (_, loss) in runs.items()}
    best[name] = chapter.best(f"{name}, {chapter.steps} steps", losses)
    found[name] = (runs[best[name]][0], before - losses[best[name]])
    print(f"{name:14s} {found[name][0]:6,} trained, gains {found[name][1]:.3f} nats")
gains = {name: gain for name, (_, gain) in found.items()}
chapter.claim(
    "VeRA gains more with a larger rank",
    gains["VeRA, r = 4"] < gains["VeRA, r = 64"] < gains["VeRA, r = 256"],
    control="the same batches at the smaller ranks, each at its best rate",
)
chapter.claim(
    "on a model this narrow VeRA is no better than LoRA of rank 1",
    max(gains, key=gains.get) == "LoRA, r = 1",
    control="LoRA of rank 1 at its best rate, with fewer numbers than VeRA of rank 256",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    "Gain after a short training", "trained parameters", "gain (nats per token)"
)
ranks = [point for name, point in found.items() if name.startswith("VeRA")]
ax.plot(*zip(*ranks, strict=True), "o-", color=plots.PALETTE[0], markersize=8)
ax.plot(*found["LoRA, r = 1"], "o", color=plots.PALETTE[1], markersize=8)
for name, point in found.items():
    left = name.startswith("LoRA")
    ax.annotate(
        name,
        point,
        xytext=(-9 if left else 9, -3 if left else -13),
        textcoords="offset points",
        ha="right" if left else "left",
        color=plots.INK,
    )
ax.set_ylim(0, 1.25 * max(gains.values()))
ax.set_xlim(0, max(count for count, _ in found.values()) * 1.3)
ax.xaxis.set_major_formatter("{x:,.0f}")
chapter.show(
    figure,
    "gain",
    alt="Gain in loss against the number of trained parameters: three joined points for VeRA, which rise from left to right with the rank, and one point for LoRA of rank 1, left of the third and at about its height.",
    caption=f"VeRA gains more as its rank grows: {gains['VeRA, r = 4']:.2f} nats at rank 4, {gains['VeRA, r = 256']:.2f} at rank 256. On this narrow model LoRA of rank 1 gains {gains['LoRA, r = 1']:.2f} with fewer parameters.",
)

# %% [markdown]
# The rank grows 64-fold from 4 to 256, the trained parameters only from {=f"{found['VeRA, r = 4'][0]:,}"=} to {=f"{found['VeRA, r = 256'][0]:,}"=}. On a model this narrow that is still no
# saving: LoRA of rank 1 trains {=f"{found['LoRA, r = 1'][0]:,}"=} and gains {=f"{gains['LoRA, r = 1']:.3f}"=} nats, VeRA of rank 256 {=f"{gains['VeRA, r = 256']:.3f}"=}. One seed does not order two numbers that lie so close. The table above shows where
# VeRA saves: LoRA's count grows with width *times* rank, VeRA's with width *plus* rank. Note the rates: the best ones of VeRA are {=f"{best['VeRA, r = 4']:g}"=}, {=f"{best['VeRA, r = 64']:g}"=} and {=f"{best['VeRA, r = 256']:g}"=} as the rank grows, that of LoRA of rank 1 is {=f"{best['LoRA, r = 1']:g}"=}.
# The paper expects one rate for all ranks, because the size of the entries of $BA$ does not depend on $r$ [@kopiczko2023, section 3.3].
#
# ## What goes wrong in practice
#
# - **The pair is not reproducible.** peft warns that it cannot promise the same numbers on all devices and in all future versions, and by default stores $A$ and $B$ with the
#   adapter: {=f"{2 * 256 * 3072 * 4 / 1e6:.1f}"=} MB beside half a megabyte of vectors for a model of width 3,072
#   ([peft 1039](https://github.com/huggingface/peft/pull/1039), [peft 1564](https://github.com/huggingface/peft/pull/1564)). The other way is to
#   specify the stream of random numbers, as above.
# - **A generator on the GPU** gives other numbers than one on the CPU. Our code always uses the CPU's stream.
# - **Another set of target layers** changes the largest sizes and with them the pair, as shown above.
# - **A pair rounded to bfloat16** is another pair. Here it stays in float32, also over a base of 16 bits.
#
# ## Exercises
#
# 1. An adapter for a model of 32 layers, width 4,096, on q and v at $r = 256$: how many bytes in float32, with and without the shared pair?

# %% tags=["solution"]
vectors = 4 * 32 * 2 * (4096 + 256)
pair_bytes = 4 * 2 * 4096 * 256
print(f"{vectors / 1e6:.1f} MB, and {pair_bytes / 1e6:.1f} MB for the pair")
assert vectors + pair_bytes == 9_502_720

# %% [markdown]
# 2. Why does $b$ start at zero and $d$ not? Compute both gradients with the reference when $d$ is zero as well.

# %% tags=["solution"]
pair = vera.projections(0, 4, 5, 3)
x, W, G = (rng.standard_normal(shape) for shape in ((6, 5), (3, 5), (6, 3)))
dead = vera.backward(G, x, W, pair, vera.VeRA(np.zeros(4), np.zeros(3)))
alive = vera.backward(G, x, W, pair, vera.init(4, 3))
print("gradient of b:", abs(dead.b).sum(), "against", abs(alive.b).sum().round(3))
assert not dead.b.any()
assert not dead.d.any()
assert alive.b.any()

# %% [markdown]
# 3. The update has rank at most $r$, and at most the number of rows with $b_i \ne 0$. Show it.

# %% tags=["solution"]
pair = vera.projections(0, 6, 9, 8)
b = np.array([1.0, 0, 2, 0, 0, 3, 0, 0])
update = vera.delta(pair, vera.VeRA(rng.standard_normal(6), b))
print("rank", np.linalg.matrix_rank(update))
assert np.linalg.matrix_rank(update) == 3

# %% [markdown]
# ## References
#
# VeRA is by Kopiczko, Blankevoort and Asano [@kopiczko2023]. The generator is by Matsumoto and Nishimura [@matsumoto1998], and the bound of the uniform distribution by
# He and others [@he2015].
