# %% [markdown]
# # PiSSA: train what matters most
#
# LoRA starts with noise in $A$ and zeros in $B$. Its first steps are spent on finding a
# direction at all. PiSSA [@meng2024] starts with the best directions there are, those of the
# weight itself: it moves the largest singular values of $W$ into the adapter and freezes
# the rest.

# %%
import copy
from fractions import Fraction

import numpy as np
import torch

from minipeft.lab import data, models, plots, text, timing, train
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
# The gradient of $B$ is $s\,G^T (x A^T)$ and that of $A$ is $s\,(G B)^T x$. While $B$ is zero, $A$ learns nothing; and what $B$
# learns goes through a random $A$, which hears only a random part of the input. Both grow out of this, but it costs
# steps, and steps are what fine-tuning has few of.
#
# ## The formula
#
# Take the singular value decomposition $W = U S V^T$ and split it behind the $r$-th value:
#
# $$ A = \sqrt{S_r / s}\; V_r^T, \qquad B = U_r \sqrt{S_r / s}, \qquad W_{res} = W - s\,B A. $$
#
# The frozen base is now $W_{res}$, and $W_{res} + s\,BA = W$: training begins exactly at the base model, as with LoRA. But the
# adapter holds the part of $W$ that acts most, and its gradients are as large as those of that part. The division by $s$ under the
# root is easily forgotten, and then the split is right only for $\alpha = r$.
#
# Nothing of rank $r$ is nearer to $W$ than $U_r S_r V_r^T$: the theorem of Eckart and Young [@eckart1936]. What the adapter holds is therefore
# the largest part of $W$ that an adapter *can* hold.

# %%
models.fetch("minilm")
weights = models.minilm_weights()
W = weights["encoder.layer.3.attention.self.query.weight"]
S = np.linalg.svd(W, compute_uv=False)
R = 16
held = np.square(S[:R]).sum() / np.square(S).sum()
print(f"query matrix of layer 3, {W.shape[0]} x {W.shape[1]}")
print(f"largest singular value {S[0]:.2f}, median {np.median(S):.2f}")
print(f"the first {R} of {len(S)} hold {held:.0%} of the square of the norm")

# %% tags=["fold"]
figure, ax = plots.axes(x="singular value, by size", y="", size=(6.4, 3.0))
ax.bar(np.arange(R), S[:R], width=1.0, color=plots.PALETTE[1])
ax.bar(np.arange(R, len(S)), S[R:], width=1.0, color=plots.FAINT)
ax.text(
    R + 4,
    S[3],
    f"adapter: the first {R}, trained",
    color=plots.PALETTE[1],
    weight="bold",
)
ax.text(150, S[120] * 1.5, "residual: the rest, frozen", color=plots.INK)
ax.grid(visible=False)
chapter.show(
    figure,
    "spectrum",
    alt="Singular values of a weight matrix in falling order: the first sixteen, coloured, stand far above the long grey tail that stays frozen.",
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
# random vectors, lets $W W^T$ pull them towards the largest directions, and takes the SVD of what is left: a matrix
# as thin as the adapter. Each pass of $W$ adds a block, and all blocks are kept, which is worth more than
# the last one alone [@musco2015; @halko2011]. A start that depends on random numbers must have a seed, or it cannot be repeated: `Sketch` has one.
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
# Once $W_{res}$ stands in the place of $W$, the original is gone. Adding $s\,B_0 A_0$ again gives almost $W$:

# %%
base, initial = pissa.init(W, R, 32)
again = lora.merge(base, initial)
differing = np.mean(again != W)
print(f"{differing:.0%} of the weights differ, by up to {np.abs(again - W).max():.1e}")
print(
    f"switched off, the layer has lost {np.linalg.norm(base - W) / np.linalg.norm(W):.0%} of its weight"
)
assert 0 < differing < 1

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
# The SVD needs roots, so it does not run on fractions. All that follows it does. For *any* two adapters, the plain LoRA of rank $2r$
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
base_model = models.load(chapter.model, chapter.device)
tokenizer = base_model.tokenizer
pairs = {
    split: [(entry.prompt, entry.answer) for entry in data.devils_dictionary(split)]
    for split in ("train", "validation")
}
size = (6, 64)
batches = text.examples(tokenizer, pairs["train"], size, seed=0)
held_out = text.example_batches(tokenizer, pairs["validation"], (25, 64))
tokens = held_out[0]["input_ids"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@torch.no_grad()
def logits(model):
    return model(tokens.to(model.device)).logits


untouched = logits(base_model.model)
model = inject(copy.deepcopy(base_model.model), PiSSAConfig(r=8, alpha=16), LINEARS)
assert torch.equal(logits(model), untouched)
print(f"{len(adapted(model))} layers adapted; every logit as before, bit for bit")

# %% [markdown]
# ## The experiment: a faster start
#
# `tiny` learns the *Devil's Dictionary* once more: LoRA and PiSSA with the same rank, the same scaling, the same batches, the
# same learning rates. Three rates for each, because the better start deserves no better tuning.

# %%
RATES = (1e-3, 3e-3, 1e-2)
CONFIGS = {"LoRA": LoRAConfig(r=8, alpha=16), "PiSSA": PiSSAConfig(r=8, alpha=16)}
histories, last = {}, {}
for name, config in CONFIGS.items():
    for lr in RATES:
        torch.manual_seed(0)
        model = inject(copy.deepcopy(base_model.model), config, LINEARS)
        setting = train.TrainConfig(chapter.steps, lr=lr, warmup=chapter.steps // 10)
        histories[name, lr] = train.train(model, batches, setting, held_out)
        last[name, lr] = histories[name, lr].validation[-1][1]
        print(f"{name:5s} at {lr:.0e}: validation loss {last[name, lr]:.3f}")
assert last["PiSSA", RATES[0]] < last["LoRA", RATES[0]]
best = {name: min(RATES, key=lambda lr: last[name, lr]) for name in CONFIGS}

# %% tags=["fold"]
figure, ax = plots.axes(
    x="learning rate", y="validation loss (nats per token)", size=(6.4, 3.2)
)
for color, name in zip(plots.PALETTE, CONFIGS, strict=False):
    points = [last[name, lr] for lr in RATES]
    ax.plot(RATES, points, "o-", color=color)
    ax.text(RATES[0] * 0.93, points[0], name, color=color, ha="right", weight="bold")
    ax.plot(best[name], last[name, best[name]], "o", color=color, markersize=10)
ax.set(xscale="log", xlim=(6.5e-4, 1.3e-2))
ax.set_xticks(RATES, [f"{lr:g}" for lr in RATES])
ax.minorticks_off()
chapter.show(
    figure,
    "start",
    alt="Validation loss against the learning rate: PiSSA lies below LoRA at the small rates and above it at the largest, and the best point of each is marked.",
)

# %% [markdown]
# At the smallest rate, {=f"{RATES[0]:.0e}"=}, PiSSA ends at {=f"{last['PiSSA', RATES[0]]:.3f}"=} nats and LoRA at
# {=f"{last['LoRA', RATES[0]]:.3f}"=}: a clear lead. At the best rate of each it is {=f"{last['PiSSA', best['PiSSA']]:.3f}"=} for PiSSA
# ({=f"{best['PiSSA']:.0e}"=}) and {=f"{last['LoRA', best['LoRA']]:.3f}"=} for LoRA ({=f"{best['LoRA']:.0e}"=}). The adapter of PiSSA has large entries from the
# start, so the same step of Adam moves its product further: much of what looks like a better direction is a
# larger effective step. This is one seed and a short run on a small model, while the paper's claim of faster convergence concerns models
# thousands of times as large. What carries over is the caution: compare initializations at *their own* best rates.
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
print("switched off, unmerged, unloaded: every weight bit for bit as it was")

# %% [markdown]
# ## The experiment: less lost in four bits
#
# Freeze the residual *in NF4*, keep the adapter in full precision, and the part of $W$ that matters most is never quantized. The
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
    alt="Error-reduction ratio of QPiSSA at rank 32 for the six kinds of matrices of MiniLM, one dot a layer and a bar at the mean: queries and keys gain most.",
)

# %% [markdown]
# At rank 32 of 384, QPiSSA removes {=f"{np.mean([*ratios.values()]):.1f}"=} % of NF4's error on average, most for queries
# ({=f"{np.mean(by_kind['query']):.1f}"=} %) and keys ({=f"{np.mean(by_kind['key']):.1f}"=} %), whose spectra fall fastest. The paper finds the same order on Llama 2 7B
# with rank 128 of 4096: 27.9 % for queries, 27.2 % for keys, 13.6 % to 18.7 % elsewhere. [LoftQ](12_loftq.md) aims at the same error directly.
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
for name in WAYS:
    print(
        f"{name:21s} {1000 * np.median(seconds[name]):7.1f} ms, residual {100 * excess[name]:.3f} % above the optimum"
    )
assert excess["ours"] < excess["svd_lowrank, niter 4"]
assert np.median(seconds["ours"]) < np.median(seconds["exact SVD"])

# %% [markdown]
# Whatever the error, the split is exact: what the adapter misses stays in the residual.
#
# ## What goes wrong in practice
#
# - **The residual is what you get back.** In peft, `disable_adapter()` and `unload()` on a PiSSA model return $W_{res}$, not $W$: a model that has lost its most
#   important directions. Above, that was {=f"{np.linalg.norm(base - W) / np.linalg.norm(W):.0%}"=} of the norm of one matrix. A
#   [discussion of the conversion](https://github.com/huggingface/peft/pull/1626) led to the rank-$2r$ form.
# - **A start that cannot be repeated.** With `pissa_niter_N` the random projection comes from the global generator. Load the adapter in another process without converting it, and the
#   SVD comes out differently, so that the residual no longer fits the adapter. Here the seed is part of the configuration, and a saved adapter carries $A_0$ and $B_0$.
# - **Quantize, then start?** $\mathrm{nf4}(W_{res}) + s\,BA$ is not $\mathrm{nf4}(W)$ plus a change of the adapter. Converting to a plain LoRA on the 4-bit *original* gives another model.
# - **The scaling.** An initializer that forgets to divide by $s$ gives a base that is wrong by $(s - 1)$ times the principal part, and is right for the default $\alpha = r$. [LoftQ](12_loftq.md) has
#   the same story, unrepaired.
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
# 3. Is the better start a matter of *which* singular values? Start with the smallest $r$ instead, and compare how much of $W$ the adapter holds.

# %% tags=["solution"]
smallest = np.square(S[-R:]).sum() / np.square(S).sum()
print(f"largest {R}: {held:.1%} of the squared norm, smallest {R}: {smallest:.3%}")
assert smallest < held / 10

# %% [markdown]
# ## References
#
# PiSSA and QPiSSA are by Meng, Wang and Zhang [@meng2024]. Randomized decompositions are surveyed by Halko, Martinsson and Tropp [@halko2011]; block
# Krylov iteration is analysed by Musco and Musco [@musco2015].
