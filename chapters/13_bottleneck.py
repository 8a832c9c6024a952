# %% [markdown]
# # Bottleneck adapters: what cannot be merged
#
# The first adapters for transformers [@houlsby2019] were small networks, one behind each sublayer: down to a few features, a nonlinearity, up again. A nonlinearity cannot be folded into a weight. So these
# adapters stay in the model, and every token is computed through them. This chapter measures what they learn, what they cost, and how both depend on where they stand.

# %%
import copy
from functools import partial

import numpy as np
import torch

from minipeft.lab import plots, timing, tuning
from minipeft.lab.chapter import start
from minipeft.lab.places import first_block
from minipeft.reference import bottleneck
from minipeft.torch.adapted import Adapted
from minipeft.torch.bottleneck import BottleneckConfig, place_beside
from minipeft.torch.inject import inject, merge, unload
from minipeft.torch.lora import LoRAConfig

chapter = start("13_bottleneck", steps=25, model="tiny")

# %% [markdown]
# ## The problem
#
# LoRA changes weights, so what it adds to a layer is linear. A task may need something else: "if this feature is present, then that one". A small network between the layers can compute it. It must
# begin as a network that changes nothing: with random weights it would add noise to every block, and the loss would jump.
#
# ## The formula
#
# An adapter with $b$ features inside adds
#
# $$ f(x) = s\,\big(\mathrm{ReLU}(x D^T + c)\,U^T + e\big), $$
#
# with $D$ of shape $(b, \text{features})$, $U$ of shape $(\text{features}, b)$, the biases $c$ and $e$, and a scaling $s$ that is chosen before training. $U$, $c$ and $e$ start at zero, so the start is the base model, exactly. There are three places for it:
#
# | placement | in a block with attention $S$ and feed-forward $F$ | adapters |
# |---|---|---|
# | Houlsby [@houlsby2019] | $x \leftarrow x + S(x) + f_1(S(x))$, then $x \leftarrow x + F(x) + f_2(F(x))$ | 2 |
# | Pfeiffer [@pfeiffer2020] | $x \leftarrow x + S(x)$, then $x \leftarrow x + F(x) + f(F(x))$ | 1 |
# | parallel [@he2021] | $x \leftarrow x + S(x)$, then $x \leftarrow x + F(x) + f(x)$ | 1 |
#
# The first two are *serial*: the adapter reads what the sublayer wrote. The third reads what the sublayer reads. Houlsby and others leave the nonlinearity open, and their program has a GELU; ReLU is that of He and others. Pfeiffer's adapter was made for models that normalize
# behind the feed-forward layer, and reads the normalized sum there. A Llama has no norm at that place, so ours reads $F(x)$.
#
# ## The code
#
# @source minipeft.reference.bottleneck.Bottleneck
#
# @source minipeft.reference.bottleneck.forward
# @source minipeft.torch.bottleneck.Bottleneck
#
# @source minipeft.reference.bottleneck.backward
#
# @source minipeft.reference.bottleneck.init
# @source minipeft.torch.bottleneck.init
#
# The placements, in the reference as blocks, in torch as wrappers of what a model already has. A sublayer ends in a linear layer (`o_proj`, `down_proj`), so *behind that
# layer* is *behind the sublayer*:
#
# @source minipeft.reference.bottleneck.serial
# @source minipeft.torch.bottleneck.Serial
#
# @source minipeft.reference.bottleneck.parallel
# @source minipeft.torch.bottleneck.Parallel
#
# @source minipeft.reference.bottleneck.houlsby
#
# @source minipeft.reference.bottleneck.pfeiffer
#
# @source minipeft.reference.bottleneck.beside
# @source minipeft.torch.bottleneck.place_beside
#
# ## The proof: nothing to merge
#
# A linear layer with a bias is affine, so $h(x) + h(-x) = 2\,h(0)$ for every $x$. For an adapter without biases the left side is
# $s\,\lvert x D^T \rvert U^T$, because $\mathrm{ReLU}(a) + \mathrm{ReLU}(-a) = \lvert a \rvert$, and the right side is zero. Row $i$ of $D$ contributes $\lvert x \cdot d_i \rvert$, which has a kink where $x \cdot d_i = 0$. Rows that are not parallel have their kinks
# at different places, so their terms cannot cancel, and the left side is zero for every $x$ only if the adapter adds nothing. So no weight and no bias do what such an adapter does. (Parallel rows can cancel:
# $\mathrm{ReLU}(a) - \mathrm{ReLU}(-a) = a$ is linear. Rows that were drawn at random and trained are not parallel.) The identity holds with `==` on fractions:

# %%
from fractions import Fraction

rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    top, bottom = rng.integers(-9, 10, shape).flat, rng.integers(1, 9, shape).flat
    values = [Fraction(int(n), int(d)) for n, d in zip(top, bottom, strict=True)]
    return np.array(values, dtype=object).reshape(shape)


D, U, s = fractions(2, 4), fractions(4, 2), Fraction(3, 2)
adapter = bottleneck.Bottleneck(D, 0 * fractions(2), U, 0 * fractions(4), s)
x = fractions(1, 4)
both = bottleneck.forward(x, adapter) + bottleneck.forward(-x, adapter)
assert (both == s * (abs(x @ D.T) @ U.T)).all()
print("f(x) + f(-x):", *both[0], " (a linear layer would give zeros)")

# %% [markdown]
# On inputs for which every unit is on, the adapter *is* affine, and equals a LoRA update $s\,U D$ with a bias. It differs from LoRA through the units that are on for some inputs and off for others.
#
# ## The experiment: what they learn
#
# `tiny` learns the *Devil's Dictionary* with the three placements. Houlsby's two adapters a block are half as wide, so that all three train about the same number of parameters. The control is LoRA with a similar number. Each
# method tries learning rates, two to a decade, until the best one has a worse one on both sides.

# %%
base = chapter.load()
lesson = tuning.lesson(chapter.task, base.tokenizer, kept=chapter.kept)
width = base.model.config.hidden_size
places = chapter.places(base.model)


def adapted(name):
    """A copy of the model with one kind of adapter."""
    model, generator = copy.deepcopy(base.model), torch.Generator().manual_seed(0)
    if name == "Houlsby":
        config = BottleneckConfig(bottleneck=16)
        return inject(model, config, places.ends, generator=generator)
    if name == "Pfeiffer":
        config = BottleneckConfig(bottleneck=32)
        return inject(model, config, places.feedforward, generator=generator)
    if name == "parallel":
        config = BottleneckConfig(bottleneck=32, scaling=4.0)
        return place_beside(model, config, places.beside, width, generator)
    return inject(model, LoRAConfig(r=4, alpha=8), places.linears, generator=generator)


RATES = (3e-3, 1e-2, 3e-2, 1e-1)
trained, losses, counts = {}, {}, {}
for name in ("Houlsby", "Pfeiffer", "parallel", "LoRA"):
    runs = {
        lr: tuning.tune(adapted(name), lesson, chapter.steps, lr, checks=1)
        for lr in RATES
    }
    tried = {lr: run.after for lr, run in runs.items()}
    best = runs[chapter.best(f"{name}, {chapter.steps} steps", tried)]
    trained[name], losses[name], counts[name] = best.model, best.after, best.trained
before = best.before
chapter.quantity(chapter.before, before, "nats per token")
label = f"{chapter.model}, bottleneck of 16 in two places: trained numbers"
chapter.quantity(label, counts["Houlsby"], "", 0)
for name, loss in losses.items():
    print(f"{name:9s} {counts[name]:6,} trained, loss after training {loss:.3f}")
chapter.claim(
    "every placement learns", max(losses.values()) < before, control="the base"
)
three = [losses[name] for name in ("Houlsby", "Pfeiffer", "parallel")]
spread = max(three) - min(three)
of_a_block = sum(p.numel() for p in first_block(base.model).parameters())
part_of_a_block = 2 * 32 * width / of_a_block

# %% [markdown]
# From {=f"{before:.3f}"=} nats, Houlsby's placement reaches {=f"{losses['Houlsby']:.3f}"=}, Pfeiffer's {=f"{losses['Pfeiffer']:.3f}"=}, the parallel one {=f"{losses['parallel']:.3f}"=} and LoRA {=f"{losses['LoRA']:.3f}"=}. The placements lie
# {=f"{spread:.3f}"=} nats apart, all four methods {=f"{max(losses.values()) - min(losses.values()):.3f}"=}. One seed and {=chapter.steps=} steps do not rank methods that lie so close: in [chapter 17](17_side_by_side.md) the three seeds of LoRA alone lie 0.02 nats apart. What they show is that every placement learns, and that the
# nonlinearity brings no large gain over LoRA on this task. So the choice depends on the cost.
#
# ## The experiment: what they cost
#
# A language model writes one token at a time, so we time exactly that: one token through the model, again and again, all models in turn, so that
# a busy moment slows all of them, on one thread, in CPU time, so that other programs do not count. LoRA is measured merged and unloaded, as one would serve it.

# %%
timed = {"base": copy.deepcopy(base.model), **trained}
timed["LoRA, merged"] = unload(merge(timed.pop("LoRA")))
one = lesson.held_out[0]["input_ids"][:1, :1].to(base.model.device)
seconds = {name: [] for name in timed}
with torch.inference_mode():
    for _ in range(100):
        for name, model in timed.items():
            seconds[name].append(
                timing.cost(chapter.device, partial(model, use_cache=False), one)
            )
fast = {name: float(np.quantile(values, 0.2)) for name, values in seconds.items()}
added = {
    name: 100 * (fast[name] / fast["base"] - 1) for name in timed if name != "base"
}
print(f"base: {1000 * fast['base']:.2f} ms for a token")
for name, percent in added.items():
    print(f"  {name:13s} {percent:+.0f} %")

# %% tags=["fold"]
figure = plots.bars(added, "time added to a token (%)", form="{:+.0f} %")
chapter.show(
    figure,
    "latency",
    alt="Bars of the time that each method adds to one token. The bar of Houlsby's two adapters a block is longest, those of Pfeiffer's and of the parallel adapter are shorter, that of merged LoRA is shortest.",
    caption=f"Two adapters a block add {added['Houlsby']:.0f} % to the time of a token, one adds {min(added['Pfeiffer'], added['parallel']):.0f} to {max(added['Pfeiffer'], added['parallel']):.0f} %. LoRA, merged, has no layer left that could add time: its {added['LoRA, merged']:+.0f} % is the noise of this measurement.",
)
chapter.claim(
    "two adapters a block cost most",
    added["Houlsby"] > max(added["Pfeiffer"], added["parallel"]),
    control="one adapter a block",
)
chapter.claim(
    "an adapter that stays costs time",
    added["Pfeiffer"] > added["LoRA, merged"],
    control="LoRA, merged and unloaded",
)

# %% [markdown]
# Houlsby's placement adds {=f"{added['Houlsby']:.0f}"=} %, Pfeiffer's {=f"{added['Pfeiffer']:.0f}"=} %, the parallel one {=f"{added['parallel']:.0f}"=} %. Merged and unloaded, LoRA leaves plain layers, so it adds nothing; the measured {=f"{added['LoRA, merged']:+.0f}"=} %
# shows how far two measurements of the same work lie apart.
#
# Why so much, for so few multiplications? An adapter of this size has {=f"{100 * part_of_a_block:.0f}"=} % of the weights of a block. But a model this small
# spends its time on starting operations, not on arithmetic, and a parallel adapter starts five more: two products, the ReLU, the scaling and the sum. A serial one starts six, for it is also multiplied by its share, here 1. On a GPU it is similar as long as the batch is small: Hu and others [@hu2021, table 1] measured 20.7 % and 30.3 % more time for
# two kinds of adapters in GPT-2 medium for one text of 128 tokens, and, with smaller adapters, 2.2 % and 3.0 % for 32 texts of 512. A parallel adapter could run at the same time as its sublayer; nothing here arranges that.
#
# `merge` raises an error for a serial adapter, and the message gives the reason:

# %%
from minipeft.errors import InputError

try:
    merge(trained["Pfeiffer"])
except InputError as error:
    print(error)

# %% [markdown]
# ## What goes wrong in practice
#
# - **What the scaling covers.** He et al. scale the parallel adapter by 4 for summaries and translation (by 2 in their script for classification), and leave the serial one unscaled. Here the scaling covers the bias of the up projection too.
#   A library that leaves this bias unscaled trains as well, and gives wrong outputs with weights from another library.
# - **A start that is not the base model.** If the up projection starts random as well, every block adds noise in the first step. It must be zero or very small; Houlsby and others draw it with a deviation of $10^{-2}$.
# - **Which input does a parallel adapter read?** BART and RoBERTa normalize *behind* a sublayer, so that adapter and sublayer read the same $x$. In a Llama the norm stands in
#   *front*, as in mBART, the third model of He et al. Our torch column reads what the module reads, the normalized $x$. In [their program](https://github.com/jxhe/unify-parameter-efficient-tuning) the adapter parallel to mBART's feed-forward layer reads the $x$ before the norm; earlier versions had an option for either, `hi_lnbefore`.
# - **"It has few parameters, so it is fast."** Parameters are not latency. Measure it.
#
# ## Exercises
#
# 1. Houlsby's adapters at 64 inside, in a model of 12 blocks and width 768: how many parameters, with biases?

# %% tags=["solution"]
count = 12 * 2 * (2 * 64 * 768 + 64 + 768)
print(f"{count:,}")
assert count == 2_379_264

# %% [markdown]
# 2. If all units are always on, the adapter is a LoRA update. Show it: raise the inner bias far enough.

# %% tags=["solution"]
D, U = rng.standard_normal((2, 5)), rng.standard_normal((5, 2))
c = np.full(2, 100.0)
on = bottleneck.Bottleneck(D, c, U, np.zeros(5), 0.5)
x = rng.standard_normal((3, 5))
assert np.allclose(bottleneck.forward(x, on), 0.5 * (x @ (U @ D).T + c @ U.T))
print("the same as W = 0.5 U D with the bias 0.5 U c")

# %% [markdown]
# 3. How many of the trained units make the adapter nonlinear? Count, over the held-out text, the units of the first Pfeiffer adapter that are on for 1 % to 99 % of the tokens.

# %% tags=["solution"]
layer = next(m for m in trained["Pfeiffer"].modules() if isinstance(m, Adapted))
adapter, states = layer.adapters["default"], []
hook = layer.base.register_forward_hook(
    lambda module, inputs, output: states.append(
        output @ adapter.down.T + adapter.down_bias > 0
    )
)
with torch.no_grad():
    for batch in lesson.held_out:
        trained["Pfeiffer"](batch["input_ids"].to(base.model.device))
        states[-1] = states[-1].cpu()[batch["attention_mask"].bool()]  # no padding
hook.remove()
share = torch.cat(states).float().mean(dim=0)
mixed = int(((share > 0.01) & (share < 0.99)).sum())
print(f"{mixed} of {len(share)} units are on for some tokens and off for others")
assert mixed

# %% [markdown]
# ## References
#
# The adapters are by Houlsby and others [@houlsby2019], the lighter placement was the best of a search by Pfeiffer and others [@pfeiffer2020], the parallel one and the common view of adapters,
# prefixes and LoRA by He and others [@he2021].
