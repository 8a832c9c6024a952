# %% [markdown]
# # PiSSA: train what matters most
#
# LoRA starts with random numbers in $A$ and zeros in $B$. Its first steps, say the authors of PiSSA [@meng2024], are spent on finding a direction. PiSSA starts from the weight
# itself: it moves the largest singular values of $W$, and the directions that belong to them, into the adapter and freezes the rest. These are the best directions
# for rebuilding $W$ from a matrix of rank $r$. Whether they are also the best to learn in is a question for an experiment.

# %%
import copy
from fractions import Fraction

import numpy as np
import torch

from minipeft.lab import models, plots, timing, tuning
from minipeft.lab.chapter import start
from minipeft.reference import blockwise, lora, pissa
from minipeft.torch import pissa as pissa_torch
from minipeft.torch.inject import activate, adapted, inject, merge, unload, unmerge
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.pissa import PiSSAConfig

chapter = start("11_pissa", steps=32, model="tiny")

# %% [markdown]
# ## The problem
#
# With $G$ for the gradient of the loss with respect to the output $y$, the gradient of $B$ is $s\,G^T (x A^T)$ and that of $A$ is $s\,(G B)^T x$. While $B$ is zero, the gradient of $A$ is zero too, and $B$
# sees the input only through a random $A$: through $r$ random combinations of its features. Training mends both, but it takes steps, and fine-tuning has few of them.
#
# ## The formula
#
# Take the singular value decomposition $W = U S V^T$ and split it behind the $r$-th value:
#
# $$ A = \sqrt{S_r / s}\; V_r^T, \qquad B = U_r \sqrt{S_r / s}, \qquad W_{res} = W - s\,B A. $$
#
# The frozen base is now $W_{res}$, and $W_{res} + s\,BA = W$: training begins exactly at the base model, as with LoRA. But neither $A$ nor $B$ is zero, so both have a gradient from the
# first step. The product $s\,BA$ is $U_r S_r V_r^T$ for every $\alpha$ only because of the division by $s$ under the root; without it, only for $\alpha = r$.
#
# Nothing of rank $r$ is nearer to $W$ than $U_r S_r V_r^T$: the theorem of Eckart and Young [@eckart1936]. What the adapter holds is therefore
# the largest part of $W$ that an adapter of this rank *can* hold.

# %%
models.fetch("minilm")
weights = models.minilm_weights()
W = weights["encoder.layer.3.attention.self.query.weight"]
S = np.linalg.svd(W, compute_uv=False)
R = 16
held = np.square(S[:R]).sum() / np.square(S).sum()
print(f"query matrix of layer 3, {W.shape[0]} x {W.shape[1]}")
print(f"largest singular value {S[0]:.2f}, median {np.median(S):.2f}")
print(f"the first {R} of {len(S)} hold {held:.1%} of the squared norm")

# %% tags=["fold"]
figure, ax = plots.axes(
    x="number of the singular value", y="singular value", size=(6.4, 3.0)
)
ax.bar(np.arange(R), S[:R], width=1.0, color=plots.PALETTE[1])
ax.bar(np.arange(R, len(S)), S[R:], width=1.0, color=plots.FAINT)
ax.text(
    R + 4,
    S[3],
    f"adapter: the first {R}, trained",
    color=plots.PALETTE[1],
    weight="bold",
)
ax.text(150, S[60] * 1.2, "residual: the rest, frozen", color=plots.INK)
ax.grid(visible=False)
chapter.show(
    figure,
    "spectrum",
    alt=f"Bars of the singular values of a weight matrix in falling order: the first {R} are coloured, the long tail is grey.",
    caption=f"The first {R} singular values are {S[0]:.1f} to {S[R - 1]:.1f}, the median of all {len(S)} is {np.median(S):.1f}. The adapter holds {R / len(S):.1%} of the values and {held:.0%} of the squared norm.",
)

# %% [markdown]
# ## The code
#
# @source minipeft.reference.pissa.init
# @source minipeft.torch.pissa.init
#
# @source minipeft.reference.pissa.principal
# @source minipeft.torch.pissa.principal
#
# @source minipeft.reference.pissa.residual
# @source minipeft.torch.pissa.residual
#
# An SVD of a large matrix takes long, and all but $r$ of its values are thrown away. The randomized version multiplies $W$ by a few
# random vectors, multiplies the result by $W W^T$ again and again, so that the directions of the largest singular values grow, and takes the SVD of what $W$ is within the span of these products: a matrix
# of at most $3\,(r + 4)$ rows at the default settings. Each multiplication adds a block, and all blocks are kept, which is more accurate than
# keeping the last one [@musco2015; @halko2011]. A start that depends on random numbers must have a seed, or it cannot be repeated: `Sketch` has one.
#
# @source minipeft.reference.pissa.Sketch
#
# @source minipeft.reference.pissa.init_randomized
# @source minipeft.torch.pissa.init_randomized
#
# @source minipeft.reference.pissa.principal_randomized
# @source minipeft.torch.pissa.principal_randomized
#
# A split needs a rank that the matrix has, a positive scaling, and finite weights:
#
# @source minipeft.reference.pissa.checked_scaling

# %% [markdown]
# ## Giving the base back
#
# Once $W_{res}$ stands in the place of $W$, the original is gone. Adding $s\,B_0 A_0$ again gives $W$ only up to rounding:

# %%
base, initial = pissa.init(W, R, 32)
again = lora.merge(base, initial)
differing = np.mean(again != W)
size, left = (float(np.linalg.norm(matrix)) for matrix in (W, base))
print(f"{differing:.0%} of the weights differ, by up to {np.abs(again - W).max():.1e}")
print(f"norm of W {size:.1f}, of the residual alone {left:.1f}: {left / size:.0%}")
print(f"the residual keeps {(left / size) ** 2:.1%} of the squared norm")
assert 0 < differing < 1
assert abs((left / size) ** 2 + held - 1) < 1e-5  # the two parts are orthogonal

# %% [markdown]
# Our layer in torch therefore never forms the residual. It computes
#
# $$ y = x W^T + b + s\,(x A^T) B^T - s\,(x A_0^T) B_0^T, $$
#
# which is the same function, with $W$ left alone. It keeps $A_0$ and $B_0$, $r(\text{in} + \text{out})$ numbers, and
# multiplies by two more thin matrices. In return a new adapter changes *nothing*, not even the last bit; an adapter switched
# off gives the base model; and what was learned can be handed on as a plain LoRA of rank $2r$:
#
# $$ s\,(B A - B_0 A_0) = s\,\big[\,B,\; -B_0\,\big] \begin{bmatrix} A \\ A_0 \end{bmatrix}. $$
#
# @source minipeft.reference.pissa.to_lora
# @source minipeft.torch.pissa.to_lora
#
# @source minipeft.torch.pissa.PiSSALinear
#
# ## The proof
#
# The SVD needs roots, so it does not run on fractions. Everything after it does. For *any* two adapters, the plain LoRA of rank $2r$
# on $W$ is the trained adapter on $W_{res}$:

# %%
rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    values = [
        Fraction(int(n), int(d)) for n, d in rng.integers(1, 9, (np.prod(shape), 2))
    ]
    return np.array(values, dtype=object).reshape(shape)


x, V = fractions(3, 5), fractions(4, 5)
before = lora.LoRA(fractions(2, 5), fractions(4, 2), Fraction(7, 3))
after = lora.LoRA(fractions(2, 5), fractions(4, 2), Fraction(7, 3))
on_residual = lora.forward(x, pissa.residual(V, before), after)
plain = pissa.to_lora(after, before)
assert (lora.forward(x, V, plain) == on_residual).all()
print("rank", len(after.A), "on the residual = rank", len(plain.A), "on W, exactly")

# %% [markdown]
# And the bits, on a whole model: inject, train, switch off.

# %%
base_model = chapter.load()
lesson = tuning.lesson(chapter.task, base_model.tokenizer, kept=chapter.kept)
tokens = lesson.held_out[0]["input_ids"]
places = chapter.places(base_model.model)


@torch.no_grad()
def logits(model):
    return model(tokens.to(model.device)).logits


untouched = logits(base_model.model)
model = inject(
    copy.deepcopy(base_model.model), PiSSAConfig(r=8, alpha=16), places.linears
)
assert torch.equal(logits(model), untouched)
print(f"{len(adapted(model))} layers adapted; every logit as before, bit for bit")

# %% [markdown]
# ## The experiment: a faster start
#
# `tiny` learns the *Devil's Dictionary* once more: LoRA and PiSSA with the same rank, the same scaling, the same batches. Each tries rates two to a decade until the best one has a worse one on both sides.
#
# PiSSA differs from LoRA in three ways: its adapter points along the singular vectors of $W$, its $B$ is not zero, and its entries are large, so that the same step of Adam moves the product $BA$ further. A control separates the
# first from the other two. *Random directions* is PiSSA with other vectors: each singular vector is replaced by a random one, orthogonal to the others, and each singular value stays. Its adapter is as large, and its base is again $W$ minus its start.


# %%
@torch.no_grad()
def random_directions(model):
    """Replace the singular vectors of each PiSSA layer by random orthonormal ones."""
    generator = torch.Generator().manual_seed(0)
    for layer in adapted(model).values():
        own = layer.adapters["default"]
        for now, start_at, dim in ((own.A, own.A_0, 1), (own.B, own.B_0, 0)):
            shape = now.shape if dim == 0 else now.T.shape
            Q = torch.linalg.qr(torch.randn(shape, generator=generator)).Q.to(now)
            other = now.norm(dim=dim, keepdim=True) * (Q if dim == 0 else Q.T)
            now.copy_(other)
            start_at.copy_(other)
    return model


def adapt(name):
    """A copy of the base with one start."""
    config = LoRAConfig(r=8, alpha=16) if name == "LoRA" else PiSSAConfig(r=8, alpha=16)
    torch.manual_seed(0)
    model = inject(copy.deepcopy(base_model.model), config, places.linears)
    return random_directions(model) if name == "random directions" else model


SLOW = 1e-3
STARTS = {
    "LoRA": (SLOW, 3e-3, 1e-2, 3e-2),
    "PiSSA": (SLOW, 3e-3, 1e-2),
    "random directions": (SLOW, 3e-3, 1e-2),
}
last, best = {}, {}
for name, rates in STARTS.items():
    for lr in rates:
        run = tuning.tune(adapt(name), lesson, chapter.steps, lr, checks=1)
        last[name, lr] = run.after
        print(f"{name} at {lr:g}: loss {run.after:.3f}")
        if (name, lr) == ("PiSSA", SLOW):
            model, before = run.model, run.before
    losses = {lr: last[name, lr] for lr in rates}
    best[name] = chapter.best(f"{name}, {chapter.steps} steps", losses)
chapter.quantity(chapter.before, before, "nats per token")
at_best = {name: last[name, best[name]] for name in STARTS}
slow = {name: last[name, SLOW] for name in STARTS}
lead, by_size = slow["LoRA"] - slow["PiSSA"], slow["LoRA"] - slow["random directions"]
chapter.claim(
    f"at the rate {SLOW:g}, PiSSA learns more",
    lead > 0,
    control="LoRA at that rate",
)
chapter.claim(
    "its directions are part of the reason",
    by_size < lead,
    control="random directions of the same size, at that rate",
)
chapter.claim(
    "PiSSA's lead does not survive tuning",
    at_best["LoRA"] < at_best["PiSSA"],
    control="each at its own best rate",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="learning rate", y="loss on held-out definitions", size=(6.4, 3.4)
)
for color, (name, rates) in zip(plots.PALETTE, STARTS.items(), strict=False):
    points = [last[name, lr] for lr in rates]
    ax.plot(rates, points, "o-", color=color, label=name)
    ax.plot(best[name], at_best[name], "o", color=color, markersize=10)
ax.axhline(before, color=plots.INK, linestyle="--", linewidth=1)
ax.text(SLOW, before, "before training", va="bottom", color=plots.INK)
ax.set(xscale="log")
ax.set_xticks(STARTS["LoRA"], [f"{lr:g}" for lr in STARTS["LoRA"]])
ax.minorticks_off()
plots.legend_below(figure, columns=3)
chapter.show(
    figure,
    "start",
    alt="Loss on held-out definitions against the learning rate for LoRA, PiSSA and random directions of PiSSA's size. PiSSA is lowest at the two small rates, LoRA at the third, and random directions lie between them; the best point of each is marked.",
    caption=f"At {SLOW:g} PiSSA is {lead:.2f} nats ahead of LoRA, and random directions of the same size are {by_size:.2f} ahead. At its own best rate LoRA reaches {at_best['LoRA']:.2f}, PiSSA {at_best['PiSSA']:.2f}.",
)

# %% [markdown]
# At the smallest rate, {=f"{SLOW:g}"=}, PiSSA ends at {=f"{slow['PiSSA']:.3f}"=} nats and LoRA at
# {=f"{slow['LoRA']:.3f}"=}. Random directions of the same size end at {=f"{slow['random directions']:.3f}"=}: {=f"{100 * by_size / lead:.0f}"=} % of the lead is there with directions that were drawn without looking at $W$. That part comes from the start's size and from
# a $B$ that is not zero; this experiment does not separate the two. The rest, {=f"{slow['random directions'] - slow['PiSSA']:.3f}"=} nats, is what the directions are worth here.
#
# At the best rate of each it is {=f"{at_best['PiSSA']:.3f}"=} for PiSSA
# (rate {=f"{best['PiSSA']:g}"=}) and {=f"{at_best['LoRA']:.3f}"=} for LoRA (rate {=f"{best['LoRA']:g}"=}): on this model LoRA, tuned, is ahead. This is one seed and {=chapter.steps=} steps on a model of one million parameters, while the paper's claim of faster convergence mostly concerns models
# thousands of times as large. [Chapter 17](17_side_by_side.md) repeats the comparison with more steps and three seeds. What carries over is the caution: compare starts at *their own* best rates.
#
# The base is still there:

# %%
trained = logits(model)
activate(model, {})
assert torch.equal(logits(model), untouched)
activate(model, "default")
unmerge(merge(model))
assert torch.equal(logits(model), trained)
given_back = unload(model).state_dict()
assert all(
    torch.equal(given_back[k], v) for k, v in base_model.model.state_dict().items()
)
print("switched off, unmerged, unloaded: every weight is bit for bit as it was")

# %% [markdown]
# ## The experiment: less lost in four bits
#
# Freeze the residual *in NF4* and keep the adapter in full precision: then the part of $W$ with the largest singular values is never quantized. The
# residual has smaller values and loses less. The paper measures the gain by the nuclear norm, as an *error-reduction ratio*:
#
# $$ 1 - \frac{\lVert W - (\mathrm{nf4}(W_{res}) + s\,BA) \rVert_*}{\lVert W - \mathrm{nf4}(W) \rVert_*}. $$


# %%
def nf4(W):
    """What comes back from four bits."""
    return blockwise.dequantize(blockwise.quantize(W))


def nuclear(error):
    """The sum of the singular values."""
    return float(np.linalg.svd(error, compute_uv=False).sum())


def reduction(W, r):
    """The error-reduction ratio of QPiSSA."""
    base, initial = pissa.init_randomized(W, r, 2 * r)
    return 1 - nuclear(W - nf4(base) - lora.delta(initial)) / nuclear(W - nf4(W))


parts = [
    "query",
    "key",
    "value",
    "attention output",
    "feed-forward up",
    "feed-forward down",
]
ratios = {name: 100 * reduction(W, 32) for name, W in weights.items()}
by_kind = {kind: [*ratios.values()][i::6] for i, kind in enumerate(parts)}
for kind, values in by_kind.items():
    print(
        f"{kind:18s}",
        " ".join(f"{v:5.1f}" for v in values),
        f"  mean {np.mean(values):5.1f} %",
    )
assert min(ratios.values()) > 0

# %% tags=["fold"]
figure, ax = plots.axes(x="error of NF4 removed, by the nuclear norm", size=(6.4, 2.9))
for row, values in enumerate(by_kind.values()):
    ax.plot(values, [row] * 6, "o", color=plots.PALETTE[0], markersize=6, alpha=0.75)
    ax.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=plots.INK, linewidth=2)
ax.set(yticks=range(6), yticklabels=parts, xlim=(0, None))
ax.xaxis.set_major_formatter("{x:.0f} %")
ax.invert_yaxis()
ax.grid(visible=False, axis="y")
chapter.show(
    figure,
    "reduction",
    alt="Error-reduction ratio of QPiSSA at rank 32 for the six kinds of matrices of MiniLM, one dot a layer and a bar at the mean.",
    caption=f"Queries and keys gain most: {np.mean(by_kind['query']):.0f} % and {np.mean(by_kind['key']):.0f} % of the error on average, the other kinds {min(map(np.mean, by_kind.values())):.0f} to {sorted(map(np.mean, by_kind.values()))[-3]:.0f} %.",
)

# %% [markdown]
# At rank 32 of 384, QPiSSA removes {=f"{np.mean([*ratios.values()]):.1f}"=} % of NF4's error on average, most for queries
# ({=f"{np.mean(by_kind['query']):.1f}"=} %) and keys ({=f"{np.mean(by_kind['key']):.1f}"=} %). The paper finds the same two ahead on Llama 2 7B
# with rank 128 of 4096. In one step as here: 19.0 % for queries, 18.1 % for keys, 5.9 % to 8.9 % elsewhere; in five: 27.9 %, 27.2 %, and 13.6 % to 18.7 % (exercise 2 takes more steps). [LoftQ](12_loftq.md) aims at the same error directly.
#
# ## What the randomized SVD costs
#
# Processor time and error, against `torch.svd_lowrank` with four iterations, which is what peft's `pissa_niter_4` calls.

# %%
torch.manual_seed(0)
LARGE = torch.from_numpy(weights["encoder.layer.3.intermediate.dense.weight"])
spectrum = torch.linalg.svdvals(LARGE)
optimum = float(spectrum[R:].square().sum().sqrt())


def lowrank(W):
    """The residual of torch.svd_lowrank."""
    U, S, V = torch.svd_lowrank(W, R, niter=4)
    return W - (U * S) @ V.T


WAYS = {
    "exact SVD": lambda W: pissa_torch.init(W, R, 32)[0],
    "svd_lowrank, niter 4": lowrank,
    "ours": lambda W: pissa_torch.init_randomized(W, R, 32)[0],
}
seconds = {name: [] for name in WAYS}
for _ in range(7):
    for name, way in WAYS.items():
        seconds[name].append(timing.cost(LARGE.device.type, way, LARGE))
excess = {name: float(way(LARGE).norm()) / optimum - 1 for name, way in WAYS.items()}
assert abs(excess["exact SVD"]) < 1e-5  # rounding
excess["exact SVD"] = abs(excess["exact SVD"])
for name in WAYS:
    print(
        f"{name:21s} {1000 * np.median(seconds[name]):7.1f} ms, residual {100 * excess[name]:.3f} % above the optimum"
    )
chapter.claim(
    "the randomized SVD is more accurate",
    excess["ours"] < excess["svd_lowrank, niter 4"],
    control="torch.svd_lowrank, 4 iterations",
)
chapter.claim(
    "and faster",
    np.median(seconds["ours"]) < np.median(seconds["exact SVD"]),
    control="the exact SVD",
)

# %% [markdown]
# Ours took {=f"{np.median(seconds['ours']) / np.median(seconds['svd_lowrank, niter 4']):.1f}"=} times as long as `svd_lowrank` here. Whatever the error, the split is exact: what the adapter misses stays in the residual.
#
# ## What goes wrong in practice
#
# - **The residual is what you get back.** In peft, `disable_adapter()` and `unload()` on a PiSSA model return $W_{res}$, not $W$: a model without the directions of its largest
#   singular values. In the matrix above they hold {=f"{held:.0%}"=} of the squared norm, and the norm of the residual is {=f"{left / size:.0%}"=} of that of $W$. A
#   [discussion of the conversion](https://github.com/huggingface/peft/pull/1626) led to the rank-$2r$ form.
# - **A start that cannot be repeated.** With `pissa_niter_N` the random projection comes from the global generator. Load the adapter in another process without converting it, and the
#   SVD comes out differently, so that the residual no longer fits the adapter. Here the seed is part of the configuration, and a saved adapter carries $A_0$ and $B_0$.
# - **Quantize, then start?** $\mathrm{nf4}(W_{res}) + s\,BA$ is not $\mathrm{nf4}(W)$ plus a change of the adapter. Converting to a plain LoRA on the 4-bit *original* gives another model.
# - **The scaling.** An initializer that does not divide by $s$ gives a base that is wrong by $(s - 1)$ times the principal part, and is right for the default $\alpha = r$. peft made the same mistake in
#   [LoftQ](12_loftq.md).
#
# ## Exercises
#
# 1. Change $\alpha$ and compare the residuals. Which of base, adapter and product depends on it?

# %% tags=["solution"]
one, four = pissa.init(W, R, 16), pissa.init(W, R, 64)
print("base equal:", np.array_equal(one[0], four[0]))
print("A halved:", np.array_equal(one[1].A, 2 * four[1].A))
assert np.array_equal(one[0], four[0])
assert np.array_equal(one[1].A, 2 * four[1].A)

# %% [markdown]
# 2. QPiSSA with five steps: alternate between quantizing $W - s\,BA$ and taking the SVD of what that left over, beginning with PiSSA's adapter. How much more
#    error does it remove than one step?

# %% tags=["solution"]
one_step = reduction(W, R)
_, adapter = pissa.init(W, R, 32)
for _ in range(5):
    quantized = nf4(W - lora.delta(adapter))
    adapter = pissa.principal(W - quantized, R, 2.0)
five_steps = 1 - nuclear(W - quantized - lora.delta(adapter)) / nuclear(W - nf4(W))
print(f"one step {one_step:.1%}, five steps {five_steps:.1%}")
assert five_steps > one_step

# %% [markdown]
# 3. Does it matter *which* singular values the adapter starts from? Start with the smallest $r$ instead, and compare how much of $W$ the adapter holds.

# %% tags=["solution"]
smallest = np.square(S[-R:]).sum() / np.square(S).sum()
print(f"largest {R}: {held:.1%} of the squared norm, smallest {R}: {smallest:.3%}")
assert smallest < held / 10

# %% [markdown]
# ## References
#
# PiSSA and QPiSSA are by Meng, Wang and Zhang [@meng2024]. Randomized decompositions are surveyed by Halko, Martinsson and Tropp [@halko2011]; block
# Krylov iteration is analysed by Musco and Musco [@musco2015].
