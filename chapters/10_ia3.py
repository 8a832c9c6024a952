# %% [markdown]
# # IA3: train one vector
#
# IA3, "infused adapter by inhibiting and amplifying inner activations" [@liu2022], multiplies activations by trained vectors: one factor for each feature of the keys, of the values and
# of the feed-forward layer. Of the methods that [chapter 17](17_side_by_side.md) compares and that merge into a weight, it trains the fewest numbers.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import plots, tuning
from minipeft.lab.chapter import start
from minipeft.lab.places import block_of
from minipeft.reference import ia3, linear
from minipeft.torch.ia3 import IA3Config, IA3Linear
from minipeft.torch.inject import adapted, inject, merge, unmerge
from minipeft.torch.lora import LoRAConfig

chapter = start("10_ia3", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Even a rank of 1 trains a row and a column for each weight. Is there something smaller that still changes every block, and can still be merged into the weights?
#
# ## The formula
#
# Three vectors for each block, all starting at 1:
#
# $$ k' = l_k \odot k, \qquad v' = l_v \odot v, \qquad \mathrm{FFN}'(x) = \big(l_\mathrm{ff} \odot \gamma(x W_1^T)\big)\, W_2^T . $$
#
# For keys and values, $l$ scales the *output* of a linear layer, so it scales the rows of its weight, and the bias too. In the feed-forward layer it scales what
# comes out of the nonlinearity $\gamma$. That is the *input* of the second linear layer, so it scales the columns of $W_2$:
#
# $$ W' = \Lambda_l W \quad\text{(keys, values)}, \qquad W' = W \Lambda_l \quad\text{(feed-forward)}. $$
#
# The side matters. A vector between $W_1$ and $\gamma$ could not be merged into $W_2$, and $l_\mathrm{ff}$ cannot be merged into $W_1$, because $\gamma$ stands between them and
# $\gamma(l\,x) \ne l\,\gamma(x)$. The vector merges into the linear layer that it touches with nothing in between.
#
# In many models, `tiny` among them, the feed-forward layer has a *gate*: $W_2$ reads $\gamma(x W_g^T) \odot x W_1^T$, so no nonlinearity follows $W_1$. There $l_\mathrm{ff}$ may as well scale the output of $W_1$, and merge into
# its rows, as in [the authors' code](https://github.com/r-three/t-few/blob/master/configs/ia3.json). Both ways compute the same.

# %%
x = torch.linspace(-2, 2, 5)
silu = torch.nn.functional.silu
print("silu(3 x):", (silu(3 * x)).numpy().round(2))
print("3 silu(x):", (3 * silu(x)).numpy().round(2))
assert not torch.allclose(silu(3 * x), 3 * silu(x))
assert torch.allclose(silu(x) * (3 * x), 3 * (silu(x) * x))  # behind a gate

# %% [markdown]
# ## The code
#
# @source minipeft.reference.ia3.IA3
#
# @source minipeft.reference.ia3.init
# @source minipeft.torch.ia3.init
#
# @source minipeft.reference.ia3.forward
# @source minipeft.torch.ia3.IA3Linear
#
# @source minipeft.reference.ia3.backward
#
# @source minipeft.reference.ia3.merge
#
# @source minipeft.reference.ia3.merge_bias
#
# ## The proof
#
# On fractions, merged equals adapted with `==`, on both sides, with bias, and with a zero among the $l$:

# %%
from fractions import Fraction

rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    top, bottom = rng.integers(-9, 10, shape).flat, rng.integers(1, 9, shape).flat
    values = [Fraction(int(n), int(d)) for n, d in zip(top, bottom, strict=True)]
    return np.array(values, dtype=object).reshape(shape)


x, W, bias = fractions(3, 5), fractions(4, 5), fractions(4)
for side, features in (("output", 4), ("input", 5)):
    scale = fractions(features)
    scale[0] = Fraction(0)
    adapter = ia3.IA3(scale, side)
    merged = linear.forward(x, ia3.merge(W, adapter), ia3.merge_bias(bias, adapter))
    assert (merged == ia3.forward(x, W, adapter, bias)).all()
    print(f"{side} scaled:", *merged[0])

# %% [markdown]
# ## The experiment
#
# `tiny` learns the *Devil's Dictionary* with these vectors alone. The control is LoRA of rank 1 on the same three layers of each block: the smallest LoRA for these layers. Each tries five or more learning rates, two to a
# decade, until the best one has a worse one on both sides.

# %%
base = chapter.load()
lesson = tuning.lesson(chapter.task, base.tokenizer, kept=chapter.kept)
places = chapter.places(base.model)
METHODS = {
    "IA3": (
        IA3Config(feedforward=places.feedforward),
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    ),
    "LoRA, r = 1": (LoRAConfig(r=1, alpha=2), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}
everything = sum(p.numel() for p in base.model.parameters())
sweeps, best, chosen = {}, {}, {}
for name, (config, rates) in METHODS.items():
    runs = {}
    for lr in rates:
        torch.manual_seed(0)
        model = inject(copy.deepcopy(base.model), config, places.scaled)
        runs[lr] = tuning.tune(model, lesson, chapter.steps, lr, checks=1)
    sweeps[name] = {lr: run.after for lr, run in runs.items()}
    print(f"{name}, the loss at each rate:")
    print("  " + ", ".join(f"{lr:g}: {loss:.2f}" for lr, loss in sweeps[name].items()))
    best[name] = chapter.best(f"{name}, {chapter.steps} steps", sweeps[name])
    chosen[name] = runs[best[name]]
before = chosen["IA3"].before
chapter.quantity(chapter.before, before, "nats per token")
chapter.quantity(f"{chapter.model}, IA3: trained numbers", chosen["IA3"].trained, "", 0)
for name, run in chosen.items():
    print(f"{name}, on keys, values and down_proj:")
    print(f"  {run.trained:,} of {everything:,} parameters, loss {run.after:.3f}")
ia3_gain, lora_gain = (before - run.after for run in chosen.values())
chapter.claim("IA3 lowers the loss", ia3_gain > 0, control="the base before training")
chapter.claim(
    "the best rate of IA3 is larger",
    best["IA3"] > best["LoRA, r = 1"],
    control="LoRA, r = 1",
)

# %% tags=["fold"]
figure, ax = plots.axes(
    x="learning rate", y="loss on held-out definitions", size=(6.4, 3.3)
)
for color, (name, losses) in zip(plots.PALETTE, sweeps.items(), strict=False):
    ax.plot([*losses], [*losses.values()], "o-", color=color, label=name)
    ax.plot(best[name], losses[best[name]], "o", color=color, markersize=10)
ax.axhline(before, color=plots.INK, linestyle="--", linewidth=1)
ax.text(1e-3, before, "before training", va="bottom", color=plots.INK)
ax.set(xscale="log", ylim=(None, before + 0.03))
ax.set_xticks([1e-3, 1e-2, 1e-1], ["0.001", "0.01", "0.1"])
ax.minorticks_off()
ax.legend()
chapter.show(
    figure,
    "rates",
    alt="Loss on held-out definitions against the learning rate for IA3 and for LoRA of rank 1. Both curves fall, reach a lowest point, which is marked, and rise again; that of IA3 lies further right and higher.",
    caption=f"IA3 is best at {best['IA3']:g}, LoRA of rank 1 at {best['LoRA, r = 1']:g}. At its best rate IA3 gains {ia3_gain:.2f} nats with {chosen['IA3'].trained:,} numbers, LoRA {lora_gain:.2f} with {chosen['LoRA, r = 1'].trained:,}.",
)

# %% [markdown]
# {=f"{chosen['IA3'].trained:,}"=} numbers, {=f"{100 * chosen['IA3'].trained / everything:.2f}"=} % of the model, bring the held-out loss from {=f"{before:.3f}"=} to
# {=f"{chosen['IA3'].after:.3f}"=}. LoRA of rank 1 trains {=f"{chosen['LoRA, r = 1'].trained / chosen['IA3'].trained:.1f}"=} times as many and reaches {=f"{chosen['LoRA, r = 1'].after:.3f}"=}. Its best rate is {=f"{best['LoRA, r = 1']:g}"=}, that of IA3 {=f"{best['IA3']:g}"=}:
# Adam moves each number by about one learning rate a step, and a factor that starts at 1 must move by a good part of 1 to change much. (One seed and {=chapter.steps=} steps; [chapter 17](17_side_by_side.md) compares over three seeds.)
#
# What have the vectors become? Here is the run at the best rate, block by block:

# %%
model = chosen["IA3"].model
figure, ax = plots.axes(x="block", y="values of l", size=(6.4, 3.6))
spread, moved = {}, {}
parts = dict.fromkeys(name.rpartition(".")[2] for name in adapted(model))
for place, (part, color) in enumerate(zip(parts, plots.PALETTE, strict=False)):
    layers = {n: layer for n, layer in adapted(model).items() if n.endswith(f".{part}")}
    vectors = [layer.adapters["default"].l.detach().cpu() for layer in layers.values()]
    for name, vector in zip(layers, vectors, strict=True):
        block = block_of(name)
        shift = 0.75 / len(parts) * (
            place - (len(parts) - 1) / 2
        ) + 0.02 * rng.standard_normal(len(vector))
        ax.plot(
            block + shift, vector.numpy(), ".", color=color, alpha=0.4, markersize=4
        )
    ax.plot([], [], "o", color=color, label=part.removesuffix("_proj"))
    spread[part] = float(torch.cat(vectors).std())
    moved[part] = float((torch.cat(vectors) - 1).abs().max())
    print(
        f"{part:9s} standard deviation {spread[part]:.3f}, largest distance from 1: {moved[part]:.2f}"
    )
ax.axhline(1, color=plots.INK, linewidth=0.8)
ax.set_xticks(sorted(set(map(block_of, adapted(model)))))
ax.legend(ncols=3, loc="upper left")
ax.margins(y=0.15)
deviations = ", ".join(f"{part[:-5]} {s:.2f}" for part, s in spread.items())
chapter.show(
    figure,
    "vectors",
    alt="Values of the trained vectors by block, in three columns of dots a block: keys, values and the feed-forward layer. All began on the dark horizontal line and are scattered around it now.",
    caption=f"After {chapter.steps} steps the factors lie up to {max(moved.values()):.2f} from where they began. Their standard deviations: {deviations}.",
)

# %% [markdown]
# ## What goes wrong in practice
#
# - **Unmerging by division.** What was multiplied by 0 is gone, and no division brings it back. peft divides by $l + 10^{-8}$: a row with $l = 0$ comes back as zeros, and one with
#   $l = 10^{-8}$ at half its size. Ours keeps the weight:

# %%
layer = IA3Linear(
    torch.nn.Linear(3, 4), IA3Config().adapters({"x": torch.nn.Linear(3, 4)})["x"]
)
original = layer.base.weight.clone()
with torch.no_grad():
    layer.adapters["default"].l.copy_(torch.tensor([0.0, 1e-8, 1.0, 2.0]))
merged = layer.merge().merged_weight
divided = merged / (layer.adapters["default"].l.detach()[:, None] + 1e-8)
share = (divided / original).detach().float().numpy().mean(axis=1)
print("rows that division gives back:", share.round(3))
layer.unmerge()
assert torch.equal(layer.base.weight, original)

# %% [markdown]
# - **The wrong side.** On a square weight, scaling the rows where the columns were meant raises no error. So the tests use weights that are not square, except where a square one is what is tested.
# - **The bias forgotten.** Keys with a bias (GPT-2, BERT, Qwen 2) need $l \odot b$ in the merged layer. Merging the weight alone is right only for models without biases.
# - **The feed-forward list.** A library must be told which targets are scaled at the input. Left out of that list, `down_proj` trains a vector of another length at another
#   place, and the run looks normal. Here a name in the list that matches no target is an error.
#
# The whole model merges and comes back, bit for bit:

# %%
tokens = lesson.held_out[0]["input_ids"].to(base.model.device)
with torch.no_grad():
    separate = model(tokens).logits
    joined = merge(model)(tokens).logits
    again = unmerge(model)(tokens).logits
print(
    f"largest difference of a logit after merging: {(separate - joined).abs().max():.1e}"
)
assert torch.equal(separate, again)

# %% [markdown]
# ## Exercises
#
# 1. Llama-3.2-3B has 28 blocks, keys and values of width 1,024 and an MLP of 8,192. How many parameters does IA3 train?

# %% tags=["solution"]
count = 28 * (1024 + 1024 + 8192)
print(f"{count:,}")
assert count == 286_720

# %% [markdown]
# 2. $l_k$ scales keys, and a score is $q \cdot k$. Show that scaling the queries instead gives the same attention scores.

# %% tags=["solution"]
q, k, scale = (
    rng.standard_normal((3, 8)),
    rng.standard_normal((5, 8)),
    rng.standard_normal(8),
)
assert np.allclose(q @ (scale * k).T, (scale * q) @ k.T)
print("the same scores: IA3 could as well have been defined on the queries")

# %% [markdown]
# 3. With rotary positions the keys are rotated after the projection. Does exercise 2 still hold? Rotate pairs of features by an angle that depends on the position.


# %% tags=["solution"]
def rotate(v, angle):
    """Rotate neighbouring pairs of features."""
    a, b = v[..., 0::2], v[..., 1::2]
    turned = np.stack(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)],
        -1,
    )
    return turned.reshape(v.shape)


scores = rotate(q, 0.3) @ rotate(scale * k, 1.1).T
swapped = rotate(scale * q, 0.3) @ rotate(k, 1.1).T
print("largest difference:", abs(scores - swapped).max().round(2))
# A rotation mixes the two features of a pair, and l scales them differently.
assert not np.allclose(scores, swapped)

# %% [markdown]
# ## References
#
# IA3 is by Liu and others [@liu2022]. Bottleneck adapters also act on activations, but with a nonlinearity; they have [their own chapter](13_bottleneck.md).
