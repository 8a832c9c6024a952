# %% [markdown]
# # Bottleneck adapters: what cannot be merged
#
# The first adapters for transformers [@houlsby2019] were small networks of their own: down to a few features, a nonlinearity, up again, put behind each
# sublayer. They learn well. But a nonlinearity cannot be folded into a weight, so they stay in the model for good, and every token pays for them. This chapter measures
# how much, and where one can put them so that it is less.

# %%
import copy
from functools import partial

import numpy as np
import torch

from minipeft.lab import data, models, plots, text, timing, train
from minipeft.lab.chapter import start
from minipeft.reference import bottleneck
from minipeft.torch.bottleneck import BottleneckConfig, place_beside
from minipeft.torch.inject import inject, merge, trainable_parameters, unload
from minipeft.torch.lora import LoRAConfig

chapter = start("13_bottleneck", steps=25, model="tiny")

# %% [markdown]
# ## The problem
#
# LoRA changes weights. Suppose that what a task needs is not a linear change: an "if this feature, then that one". A layer between the layers could do it. Trained
# from scratch it would have to be small; put in the wrong place, or started with noise, it would destroy what the model knows.
#
# ## The formula
#
# An adapter with $b$ features inside adds
#
# $$ f(x) = s\,\big(\mathrm{ReLU}(x D^T + c)\,U^T + e\big), $$
#
# with $D$ of shape $(b, \text{features})$ and $U$ of shape $(\text{features}, b)$. $U$, $c$ and $e$ start at zero, so the start is the base model, exactly. There are three places for it:
#
# | placement | in a block with attention $S$ and feed-forward $F$ | adapters |
# |---|---|---|
# | Houlsby [@houlsby2019] | $x \leftarrow x + S(x) + f_1(S(x))$, then $x \leftarrow x + F(x) + f_2(F(x))$ | 2 |
# | Pfeiffer [@pfeiffer2020] | $x \leftarrow x + S(x)$, then $x \leftarrow x + F(x) + f(F(x))$ | 1 |
# | parallel [@he2021] | $x \leftarrow x + S(x)$, then $x \leftarrow x + F(x) + f(x)$ | 1 |
#
# The first two are *serial*: the adapter reads what the sublayer wrote. The third reads what the sublayer reads.
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
# A linear layer is affine, so $h(x) + h(-x) = 2\,h(0)$ for every $x$. For an adapter without biases the left side is
# $s\,\lvert x D^T \rvert U^T$, because $\mathrm{ReLU}(a) + \mathrm{ReLU}(-a) = \lvert a \rvert$. That is zero only if every unit is silent. So no weight and no bias do what the adapter
# does, and this holds with `==` on fractions:

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
# The other half of the truth: where every unit is on, the adapter *is* linear, and then equals a LoRA update $s\,U D$. What it can do beyond LoRA is what its corners do.
#
# ## The experiment: what they learn
#
# `tiny` learns the *Devil's Dictionary* with the three placements, at about the same number of trained parameters (so Houlsby's two adapters are half as wide), and with LoRA.

# %%
base = models.load(chapter.model, chapter.device)
pairs = [(entry.prompt, entry.answer) for entry in data.devils_dictionary("train")]
batches = text.examples(base.tokenizer, pairs, (8, 96), seed=0)
judged = [
    (entry.prompt, entry.answer) for entry in data.devils_dictionary("validation")
]
held_out = text.example_batches(base.tokenizer, judged[:50], (25, 96))
width = base.model.config.hidden_size
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(name):
    """A copy of the model with one kind of adapter."""
    model, generator = copy.deepcopy(base.model), torch.Generator().manual_seed(0)
    if name == "Houlsby":
        config = BottleneckConfig(bottleneck=16)
        return inject(model, config, ["o_proj", "down_proj"], generator=generator)
    if name == "Pfeiffer":
        config = BottleneckConfig(bottleneck=32)
        return inject(model, config, ["down_proj"], generator=generator)
    if name == "parallel":
        config = BottleneckConfig(bottleneck=32, scaling=4.0)
        return place_beside(model, config, ["mlp"], width, generator)
    return inject(model, LoRAConfig(r=4, alpha=8), LINEARS, generator=generator)


before, trained, losses = train.loss(base.model, held_out), {}, {}
for name in ("Houlsby", "Pfeiffer", "parallel", "LoRA"):
    trained[name] = adapted(name)
    settings = train.TrainConfig(chapter.steps, lr=4e-3, warmup=3)
    history = train.train(trained[name], batches, settings, held_out)
    losses[name] = history.validation[-1][1]
    count = sum(p.numel() for p in trainable_parameters(trained[name]))
    print(
        f"{name:9s} {count:6,} trained, held-out loss {losses[name]:.3f} (before: {before:.3f})"
    )
assert max(losses.values()) < before

# %% [markdown]
# ## The experiment: what they cost
#
# A language model writes one token at a time, so we time exactly that: one token through the model, again and again, all models in turn so that they
# meet the same machine, on one thread, in CPU time, so that other programs do not count. LoRA is measured merged and unloaded, as one would serve it.

# %%
timed = {"base": copy.deepcopy(base.model), **trained}
timed["LoRA, merged"] = unload(merge(timed.pop("LoRA")))
one = held_out[0]["input_ids"][:1, :1]
seconds = {name: [] for name in timed}
with torch.inference_mode():
    for _ in range(100):
        for name, model in timed.items():
            seconds[name].append(
                timing.cost(chapter.device, partial(model, use_cache=False), one)
            )
best = {name: float(np.quantile(values, 0.2)) for name, values in seconds.items()}
added = {
    name: 100 * (best[name] / best["base"] - 1) for name in timed if name != "base"
}
print(f"base: {1000 * best['base']:.2f} ms for a token")
for name, percent in added.items():
    print(f"  {name:13s} {percent:+.0f} %")

# %% tags=["fold"]
figure = plots.bars(
    {name: max(percent, 0.0) for name, percent in added.items()},
    "time added to a token (%)",
    "What stays in the model",
)
chapter.show(
    figure,
    "latency",
    alt="Bars of the time that each method adds to one token: Houlsby's two serial adapters a block add most, Pfeiffer's and the parallel adapter about half of that, merged LoRA next to nothing.",
)
assert added["Houlsby"] > max(added["Pfeiffer"], added["LoRA, merged"])

# %% [markdown]
# Houlsby's placement adds {=f"{added['Houlsby']:.0f}"=} %, Pfeiffer's {=f"{added['Pfeiffer']:.0f}"=} %, the parallel one {=f"{added['parallel']:.0f}"=} %, merged
# LoRA {=f"{added['LoRA, merged']:.0f}"=} % (its layers are plain again; what is
# left is the noise of the measurement).
#
# Why so much, for so few multiplications? An adapter of this size has {=f"{100 * 2 * 32 * width / sum(p.numel() for p in base.model.model.layers[0].parameters()):.0f}"=} % of the weights of a block, but a model this small
# spends its time on starting operations, not on arithmetic, and an adapter starts three or four more. On a GPU at batch size 1 it is the same: operations wait for each
# other, and a serial adapter makes the chain longer. The parallel one can run at the same time as the sublayer, if somebody schedules it so; here nobody does. With large batches the
# share falls to that of the multiplications.
#
# Merging refuses, and says why:

# %%
from minipeft.errors import InputError

try:
    merge(trained["Pfeiffer"])
except InputError as error:
    print(error)

# %% [markdown]
# ## What goes wrong in practice
#
# - **The scaling hides in two places.** He et al. scale the parallel adapter by 4 and leave the serial one unscaled. A library that applies its scale before the up projection's bias,
#   or not to it, trains the same and loads wrongly.
# - **A start that is not the base model.** If the up projection starts random as well, every block adds noise in the first step. It must be zero, or so small that it is as good as
#   zero.
# - **Which input does a parallel adapter read?** He et al. worked on models that normalize *behind* a sublayer, where adapter and sublayer read the same $x$. In a Llama the norm stands in
#   *front*. Ours reads what the module reads, the normalized $x$. Others read the raw one.
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
# 3. How many of the trained units are corners that matter? Count, over the held-out text, the units of the first Pfeiffer adapter that are sometimes on and sometimes off.

# %% tags=["solution"]
layer = trained["Pfeiffer"].model.layers[0].mlp.down_proj
adapter, states = layer.adapters["default"], []
hook = layer.base.register_forward_hook(
    lambda module, inputs, output: states.append(
        output @ adapter.down.T + adapter.down_bias > 0
    )
)
with torch.no_grad():
    trained["Pfeiffer"](held_out[0]["input_ids"])
hook.remove()
share = states[0].flatten(0, 1).float().mean(dim=0)
mixed = int(((share > 0.01) & (share < 0.99)).sum())
print(f"{mixed} of {len(share)} units bend within the text")
assert mixed > 0  # with none, the adapter could have been merged after all

# %% [markdown]
# ## References
#
# The adapters are by Houlsby and others [@houlsby2019], the lighter placement by Pfeiffer and others [@pfeiffer2020], the parallel one and the common view of adapters,
# prefixes and LoRA by He and others [@he2021].
