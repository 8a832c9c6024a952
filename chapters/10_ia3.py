# %% [markdown]
# # IA3: train one vector
#
# The smallest adapter of this book multiplies activations by a vector. IA3, "infused adapter by inhibiting and amplifying inner activations" [@liu2022], learns how loud each key, each value and
# each feed-forward feature should be, and nothing else.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import data, models, plots, text, train
from minipeft.lab.chapter import start
from minipeft.reference import ia3, linear
from minipeft.torch.ia3 import IA3Config, IA3Linear
from minipeft.torch.inject import adapted, inject, merge, trainable_parameters, unmerge

chapter = start("10_ia3", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Even a rank of 1 trains a row and a column for each weight. Is there something smaller that still reaches every layer, and still disappears when it is merged?
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
# The side matters. Behind $W_1$ and *before* $\gamma$ the vector could not be merged into $W_2$, and $l_\mathrm{ff}$ cannot be merged into $W_1$, because $\gamma$ stands between:
# $\gamma(l\,x) \ne l\,\gamma(x)$. Merging works where the method is linear in the layer, and only there.

# %%
x = torch.linspace(-2, 2, 5)
silu = torch.nn.functional.silu
print("silu(3 x):", (silu(3 * x)).numpy().round(2))
print("3 silu(x):", (3 * silu(x)).numpy().round(2))
assert not torch.allclose(silu(3 * x), 3 * silu(x))

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
for feedforward in (False, True):
    scale = fractions(5 if feedforward else 4)
    scale[0] = Fraction(0)
    adapter = ia3.IA3(scale, feedforward)
    merged = linear.forward(x, ia3.merge(W, adapter), ia3.merge_bias(bias, adapter))
    assert (merged == ia3.forward(x, W, adapter, bias)).all()
    print("feed-forward:" if feedforward else "keys, values:", *merged[0])

# %% [markdown]
# ## The experiment
#
# `tiny` learns the *Devil's Dictionary* with nothing but these vectors, at three learning rates.

# %%
base = models.load(chapter.model, chapter.device)
pairs = [(entry.prompt, entry.answer) for entry in data.devils_dictionary("train")]
batches = text.examples(base.tokenizer, pairs, (8, 96), seed=0)
judged = [
    (entry.prompt, entry.answer) for entry in data.devils_dictionary("validation")
]
held_out = text.example_batches(base.tokenizer, judged[:50], (25, 96))
TARGETS = ["k_proj", "v_proj", "down_proj"]
before = train.loss(base.model, held_out)
histories = {}
for lr in (3e-3, 1e-2, 3e-2):
    model = inject(
        copy.deepcopy(base.model), IA3Config(feedforward=["down_proj"]), TARGETS
    )
    settings = train.TrainConfig(
        chapter.steps, lr=lr, warmup=5, validate_every=max(1, chapter.steps // 5)
    )
    histories[f"learning rate {lr:g}"] = train.train(model, batches, settings, held_out)
final = {name: history.validation[-1][1] for name, history in histories.items()}
trained = sum(p.numel() for p in trainable_parameters(model))
everything = sum(p.numel() for p in base.model.parameters())
print(f"{trained:,} of {everything:,} parameters; loss before: {before:.3f}")
for name, value in final.items():
    print(f"  {name}: {value:.3f}")
best = min(final, key=final.get)
assert min(final.values()) < before

# %% [markdown]
# What did it learn? The vectors of the last run, sorted by block:

# %%
figure, ax = plots.axes("Where the vectors moved", "block", "values of l")
for place, (part, color) in enumerate(zip(TARGETS, plots.PALETTE, strict=False)):
    for name, layer in adapted(model).items():
        if name.endswith(part):
            block = int(name.split(".")[2])
            values = layer.adapters["default"].l.detach().cpu().numpy()
            shift = 0.25 * (place - 1) + 0.02 * rng.standard_normal(len(values))
            ax.plot(block + shift, values, ".", color=color, alpha=0.4, markersize=4)
    ax.plot([], [], "o", color=color, label=part.removesuffix("_proj"))
ax.axhline(1, color=plots.INK, linewidth=0.8)
ax.set_xticks(range(len(base.model.model.layers)))
ax.legend(ncols=3, frameon=False, labelcolor=plots.INK)
ax.margins(y=0.15)
chapter.show(
    figure,
    "vectors",
    alt="Values of the trained vectors by block, for keys, values and the feed-forward layer; all began at 1 and now spread around it.",
)
spread = {
    part: float(
        torch.cat(
            [
                a.adapters["default"].l.detach()
                for n, a in adapted(model).items()
                if n.endswith(part)
            ]
        ).std()
    )
    for part in TARGETS
}
print({part: round(value, 3) for part, value in spread.items()})

# %% [markdown]
# {=f"{trained:,}"=} numbers, {=f"{100 * trained / everything:.2f}"=} % of the model, bring the held-out loss from {=f"{before:.3f}"=} to
# {=f"{min(final.values()):.3f}"=}. The best of the three runs is that with {=best=}: a factor
# that starts at 1 must move by a fair part of 1 to matter, so IA3 wants larger steps than LoRA.
#
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
share = (divided / original).detach().numpy().mean(axis=1)
print("rows that division gives back:", share.round(3))
layer.unmerge()
assert torch.equal(layer.base.weight, original)

# %% [markdown]
# - **The wrong side.** On a square weight, scaling the rows where the columns were meant raises no error. No weight in the tests is square but where that is the question.
# - **The bias forgotten.** Keys with a bias (GPT-2, BERT, Qwen) need $l \odot b$ in the merged layer. Merging the weight alone is right only for models without biases.
# - **The feed-forward list.** A library must be told which targets are scaled at the input. Left out of that list, `down_proj` trains a vector of another length at another
#   place, and the run looks normal. Here a name in the list that matches no target is an error.
#
# The whole model merges and comes back, bit for bit:

# %%
tokens = held_out[0]["input_ids"]
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
# IA3 is by Liu and others [@liu2022]. Bottleneck adapters, which also act on activations but bend them, have [their own chapter](13_bottleneck.md).
