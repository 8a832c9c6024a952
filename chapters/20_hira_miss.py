# %% [markdown]
# # HiRA, MiSS and LoRA+: three changes to LoRA
#
# LoRA makes three choices: the update is *added* to the weight, it is a product of *two* trained matrices, and both learn at *one* rate. Three methods change one choice each. HiRA [@huang2025] multiplies
# the weight by the product, MiSS [@kang2024] trains one matrix alone, and LoRA+ [@hayou2024] gives each matrix a rate of its own.

# %%
import copy
from fractions import Fraction

import numpy as np
import torch

from minipeft.lab import plots, train, tuning
from minipeft.lab.chapter import start
from minipeft.reference import hira, linear, lora, miss
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.inject import adapted, inject, merge, unmerge
from minipeft.torch.linear import weight_of
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.lora_plus import parameter_groups
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.targets import layers

chapter = start("20_hira_miss", steps=24, model="tiny")

# %% [markdown]
# ## The problem
#
# An update $s\,BA$ has rank $r$ at most. Full fine-tuning changes a weight by a matrix of higher rank. HiRA gives a high rank without more trained numbers. MiSS trains fewer: LoRA's $A$ chooses
# the $r$ combinations of the inputs that $B$ sees, and a choice that is fixed might do as well.
#
# ## The formula
#
# HiRA multiplies entry by entry; $\odot$ is that product:
#
# $$ \Delta W = s\,W \odot BA. $$
#
# Each weight is changed by a share of itself. The rank of $W \odot BA$ is at most the rank of $W$ times $r$ [@huang2025, section 4.2], and a weight that is zero stays zero. The scaling $s$ is ours: the paper has $s = 1$. There is a price: the layer cannot be computed by two thin products any more. $W \odot BA$ is formed in every pass, a matrix as large as $W$.
#
# MiSS cuts the inputs into shards of $r$ neighbours. All shards share one matrix $D$ of shape ($r$, out):
#
# $$ \Delta W_{oi} = D_{i \bmod r,\,o}, \qquad x\,\Delta W^T = \mathrm{fold}(x)\,D, \qquad \mathrm{fold}(x)_j = \sum_{i \bmod r = j} x_i. $$
#
# If $r$ does not divide the number of inputs, the last shard is short and uses the first rows of $D$. There is no random matrix and no scaling, and the start is $D = 0$. It is LoRA with $B = D^T$ and a frozen $A$ of zeros and ones. The paper calls this form MiSS$^e$, for "efficient" [@kang2024, section 4.2], and peft has this one. In the first form of the paper (section 4.1) the outputs are cut into shards, and the rows of a shard
# are equal.
#
# ## The code
#
# @source minipeft.reference.hira.delta
# @source minipeft.torch.hira.delta
#
# @source minipeft.reference.hira.forward
# @source minipeft.torch.hira.HiRA
#
# @source minipeft.reference.hira.backward
#
# @source minipeft.reference.hira.merge
# @source minipeft.torch.hira.HiRALinear
#
# @source minipeft.reference.hira.init
#
# @source minipeft.reference.hira.check_fits
#
# The formulas of MiSS:
#
# @source minipeft.reference.miss.delta
# @source minipeft.torch.miss.delta
#
# @source minipeft.reference.miss.fold
#
# @source minipeft.reference.miss.forward
# @source minipeft.torch.miss.MiSS
#
# @source minipeft.reference.miss.backward
#
# @source minipeft.reference.miss.merge
# @source minipeft.torch.miss.MiSSLinear
#
# @source minipeft.reference.miss.init
# @source minipeft.torch.miss.init
#
# ## The proof
#
# On fractions nothing is rounded. The merged layer is the same function, and MiSS is LoRA with a frozen $A$:

# %%
rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    pairs = rng.integers(1, 9, (np.prod(shape), 2))
    values = [Fraction(int(n), int(d)) for n, d in pairs]
    return np.array(values, dtype=object).reshape(shape)


x, W = fractions(3, 7), fractions(4, 7)
high = hira.HiRA(fractions(2, 7), fractions(4, 2), Fraction(7, 3))
shared = miss.MiSS(fractions(3, 4))  # 7 inputs, r = 3: the last shard is short
assert (linear.forward(x, hira.merge(W, high)) == hira.forward(x, W, high)).all()
assert (linear.forward(x, miss.merge(W, shared)) == miss.forward(x, W, shared)).all()
ones = np.array([[int(i % 3 == j) for i in range(7)] for j in range(3)], dtype=object)
as_lora = lora.LoRA(ones, shared.D.T, 1)
assert (lora.delta(as_lora) == miss.delta(shared, 7)).all()
print("merged and unmerged layers agree exactly; MiSS is LoRA with this A:")
print(ones)

# %% [markdown]
# And the rank of the update, on a weight of a trained model:

# %%
base = chapter.load()
places = chapter.places(base.model)
R = 4
first = next(iter(layers(base.model, places.linears).values()))
own = weight_of(first).detach().cpu().float().numpy()
A = rng.standard_normal((R, own.shape[1])).astype(np.float32)
B = rng.standard_normal((own.shape[0], R)).astype(np.float32)
rank = {
    "LoRA": np.linalg.matrix_rank(lora.delta(lora.LoRA(A, B, 1.0))),
    "HiRA": np.linalg.matrix_rank(hira.delta(own, hira.HiRA(A, B, 1.0))),
    "MiSS": np.linalg.matrix_rank(miss.delta(miss.MiSS(B.T), own.shape[1])),
}
print(
    f"a weight of {own.shape[0]} x {own.shape[1]}, r = {R}; rank of the update:",
    ", ".join(f"{name} {value}" for name, value in rank.items()),
)
chapter.claim(
    "the update of HiRA has a higher rank than r",
    rank["HiRA"] > R,
    control="LoRA with the same A and B, whose update has rank r",
)
assert rank["LoRA"] == rank["MiSS"] == R

# %% [markdown]
# ## Two learning rates: LoRA+
#
# LoRA+ is no other adapter. It is a recipe: $B$ learns at $\lambda$ times the rate of $A$. The argument is about wide layers. With one rate for both, $A$ and $B$ cannot both move the output by an amount that
# does not depend on the width; $B$ moves too little. Which $\lambda$ is best depends on the model, the task and the start [@hayou2024, section 5.3]: on RoBERTa about 16 if $A$ starts at zero, 4 to 8 if $B$ does, as in LoRA, and 2 to 4 on Llama. We take 4. In code LoRA+ is a function that groups the parameters, and any optimizer of torch takes what it returns:
#
# @source minipeft.torch.lora_plus.parameter_groups
#
# ## The experiment
#
# `tiny` learns the *Devil's Dictionary* with LoRA of rank 4, LoRA+ on the same adapter, HiRA of rank 4 with $s = 16$, and MiSS with $r = 8$, which trains about as many numbers. Each tries rates two to a decade, and the best of each must have a worse one on both
# sides. LoRA at its own best rate is the control of all three.

# %%
lesson = tuning.lesson(chapter.task, base.tokenizer, kept=chapter.kept)
PLUS = 4.0


def two_rates(model, config):
    """The recipe, as the training loop takes it."""
    return torch.optim.AdamW(parameter_groups(model, config.lr, PLUS))


METHODS = {
    "LoRA": (LoRAConfig(R, 2 * R), (3e-3, 1e-2, 3e-2)),
    "LoRA+": (LoRAConfig(R, 2 * R), (1e-3, 3e-3, 1e-2)),
    "HiRA": (HiRAConfig(R, 16.0), (3e-3, 1e-2, 3e-2)),
    "MiSS": (MiSSConfig(2 * R), (1e-3, 3e-3, 1e-2)),
}
before = chapter.quantity(
    chapter.before, train.loss(base.model, lesson.held_out), "nats per token"
)
losses, best, count, trained = {}, {}, {}, {}
for name, (config, rates) in METHODS.items():
    for lr in rates:
        generator = torch.Generator().manual_seed(0)
        model = inject(
            copy.deepcopy(base.model), config, places.linears, generator=generator
        )
        extra = {"optimizer": two_rates} if name == "LoRA+" else {}
        settings = train.TrainConfig(chapter.steps, lr, warmup=2, **extra)
        history = train.train(
            model, lesson.batches, settings, lesson.held_out, chapter.kept()
        )
        losses[name, lr] = history.validation[-1][1]
        print(f"{name:5s} at {lr:g}: loss {losses[name, lr]:.3f}")
        trained[name] = model
    count[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    best[name] = chapter.best(name, {lr: losses[name, lr] for lr in rates})
at_best = {name: losses[name, best[name]] for name in METHODS}
for name in METHODS:
    print(f"{name:5s} trains {count[name]:,} numbers, best loss {at_best[name]:.3f}")
chapter.claim(
    "HiRA and MiSS learn the task",
    max(at_best["HiRA"], at_best["MiSS"]) < before,
    control="the model before training",
)
chapter.claim(
    "tuned, none of the three is ahead of LoRA here",
    all(at_best["LoRA"] < at_best[name] for name in ("LoRA+", "HiRA", "MiSS")),
    control="LoRA, with about as many trained numbers, at its own best rate",
)
common = 3e-3
plus_lead = losses["LoRA", common] - losses["LoRA+", common]
chapter.claim(
    f"at the rate {common:g}, LoRA+ is ahead of LoRA, and one larger rate for both gains more",
    plus_lead > 0 and at_best["LoRA"] < losses["LoRA+", common],
    control="LoRA at that rate, and at its own best rate",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="learning rate (LoRA+: that of A)",
    y="loss on held-out definitions",
    size=(6.4, 3.4),
)
for color, (name, (_, rates)) in zip(plots.PALETTE, METHODS.items(), strict=False):
    ax.plot(rates, [losses[name, lr] for lr in rates], "o-", color=color, label=name)
ax.axhline(before, color=plots.INK, linestyle="--", linewidth=1)
ax.text(1e-3, before, "before training", va="bottom", color=plots.INK)
ax.set(xscale="log")
ticks = sorted({lr for _, rates in METHODS.values() for lr in rates})
ax.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
ax.minorticks_off()
ax.legend(loc="lower left")
chapter.show(
    figure,
    "rates",
    alt="Loss on held-out definitions against the learning rate: one curve each for LoRA, LoRA plus, HiRA and MiSS, each lowest in the middle of its own three rates.",
    caption=f"The best losses: LoRA {at_best['LoRA']:.2f}, LoRA+ {at_best['LoRA+']:.2f}, HiRA {at_best['HiRA']:.2f}, MiSS {at_best['MiSS']:.2f}. The best rates lie between {min(best.values()):g} and {max(best.values()):g}.",
)

# %% [markdown]
# Before training the loss is {=f"{before:.3f}"=}. LoRA reaches {=f"{at_best['LoRA']:.3f}"=}, HiRA {=f"{at_best['HiRA']:.3f}"=}, LoRA+ {=f"{at_best['LoRA+']:.3f}"=} and MiSS {=f"{at_best['MiSS']:.3f}"=}, each at its own best rate. At the rate {=f"{common:g}"=} LoRA+ is {=f"{plus_lead:.3f}"=} nats ahead of LoRA. A larger
# rate for both matrices is worth {=f"{losses['LoRA', common] - at_best['LoRA']:.3f}"=}. This is one seed and {=chapter.steps=} steps on a narrow model, while the argument of LoRA+ is about wide ones. So it shows no more than this: compare methods at *their own* best rates.
#
# Merging and coming back, on the whole model:

# %%
tokens = lesson.held_out[0]["input_ids"].to(base.model.device)
for name in ("HiRA", "MiSS"):
    model = trained[name]
    with torch.no_grad():
        apart = model(tokens).logits
        joined = merge(model)(tokens).logits
        assert torch.equal(unmerge(model)(tokens).logits, apart)
    off = (joined - apart).abs().max()
    print(f"{name}: merging moves a logit by {off:.1e} at most, unmerging by nothing")

# %% [markdown]
# ## What goes wrong in practice
#
# - **Unmerging HiRA from the merged weight.** $W' = W \odot (1 + c)$ with $c = s\,BA$. Subtracting the update *of $W'$* gives $W \odot (1 - c^2)$, and division fails where $c = -1$. peft keeps a copy of the weight from before the merge; we never overwrite it.
# - **Two HiRA adapters.** Both must multiply the frozen weight. If the second multiplies what the first has left, a product $c_1 c_2$ appears that training never saw.
# - **Unmerging MiSS by subtraction.** peft subtracts $D$ again. That gives the weight back only up to rounding:

# %%
shards = rng.standard_normal((8, own.shape[0])).astype(np.float32)
update = miss.delta(miss.MiSS(shards), own.shape[1])
differing = np.mean((own + update) - update != own)
print(f"{differing:.0%} of the weights are not what they were")
assert differing > 0
layer = next(iter(adapted(trained["MiSS"]).values()))
frozen = layer.base.weight.clone()
layer.merge().unmerge()
assert torch.equal(layer.base.weight, frozen)

# %% [markdown]
# - **The short shard.** Where $r$ does not divide the inputs, peft 0.21 fills $x$ up with zeros in the forward pass and treats the last columns by themselves when it merges: two paths that must agree. They do, and [the golden vectors](../verify.md) have a flag for it.
# - **A scaling that is not there.** peft's HiRA has no $s$. An adapter with $s \ne 1$ must carry it in $B$ before it is handed over.
#
# ## Exercises
#
# 1. Llama-2-7B has layers of 4,096 inputs and outputs. How many numbers does MiSS train in one of them at $r = 64$, and LoRA at $r = 32$?

# %% tags=["solution"]
assert 64 * 4096 == 32 * (4096 + 4096) == 262_144
print(f"both {64 * 4096:,}")

# %% [markdown]
# 2. A weight matrix was pruned: nine tenths of its entries are zero. Which of the three methods keeps them at zero in the merged weight?

# %% tags=["solution"]
pruned = np.where(rng.random(own.shape) < 0.9, 0, own)
assert not hira.merge(pruned, hira.HiRA(A, B, 1.0))[pruned == 0].any()
assert lora.merge(pruned, lora.LoRA(A, B, 1.0))[pruned == 0].any()
assert miss.merge(pruned, miss.MiSS(B.T))[pruned == 0].any()
print("HiRA alone: it multiplies")

# %% [markdown]
# 3. $D$ is zero in a new MiSS adapter. Does it have a gradient?

# %% tags=["solution"]
x, grad_y = rng.standard_normal((5, 7)), rng.standard_normal((5, 4))
new = miss.MiSS(np.zeros((3, 4)))
found = miss.backward(grad_y, x, rng.standard_normal((4, 7)), new).D
assert np.abs(found).min() > 0
print("all of D: its gradient is fold(x)^T G, in which D does not occur")

# %% [markdown]
# ## References
#
# HiRA is by Huang and others [@huang2025], MiSS by Kang and Yin [@kang2024], LoRA+ by Hayou and others [@hayou2024]. LoRA itself has [its own chapter](01_lora.md), and [chapter 7](07_rslora.md) is about the scaling.
