# %% [markdown]
# # DoRA: length and direction apart
#
# A row of a weight is a vector. Its direction decides which inputs it responds to, and its length decides how strongly. DoRA [@liu2024] trains the two apart: every row gets a trained length of its
# own, and LoRA changes the directions. This chapter measures how the two change together in full fine-tuning, in LoRA and in DoRA, and what DoRA costs.

# %%
import copy

import numpy as np
import torch
from torch import nn

from minipeft.lab import plots, timing, train
from minipeft.lab.chapter import start
from minipeft.reference import dora, linear, lora
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import adapted, inject, trainable_parameters
from minipeft.torch.linear import weight_of
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.targets import layers

chapter = start("08_dora", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Take one row $w$ of a weight, and let training add $u$ to it. In general the row gets longer or shorter while it
# turns: its length stays to first order only if $u$ is orthogonal to $w$. The authors of DoRA
# measured both changes for the queries and the values of a model. Over the layers and steps of a
# run, full fine-tuning has *large* changes of direction where the changes of length are *small*, and the reverse; with
# LoRA the two grow together. The experiment below measures it again.
#
# ## The formula
#
# Write $V = W + s\,B A$, LoRA's weight, and let $\|V_i\|$ be the length of its row $i$. DoRA computes with
#
# $$ W'_i = m_i\, \frac{V_i}{\|V_i\|}, \qquad m_i \text{ starting at } \|W_i\|, $$
#
# so the *magnitude* $m$ holds one trained number for each output. At the start $V = W$, and $W' = W$.
#
# Training need not form $W'$. Output $i$ is that of LoRA times $g_i = m_i / \|V_i\|$, and the length follows from three thin products:
#
# $$ \|V_i\|^2 = \|W_i\|^2 + 2s\,(W A^T)_i \cdot B_i + s^2\, B_i (A A^T) B_i^T . $$
#
# Two rules belong to the definition. In the backward pass **the norm is a constant** [@liu2024, section 4.3]. The paper measures that this saves 24 % of the memory in fine-tuning LLaMA and changes the
# accuracy by 0.2 points. And **the bias is not scaled**.
#
# ## The code
#
# @source minipeft.reference.dora.DoRA
#
# @source minipeft.reference.dora.squared_row_norm
# @source minipeft.torch.dora.squared_row_norm
#
# A row of length zero has no direction. We define its direction as zero: the row stays zero and passes no gradient, where a division would
# give NaN.
#
# @source minipeft.reference.dora.row_norm
#
# @source minipeft.reference.dora.over_norm
#
# @source minipeft.reference.dora.init
# @source minipeft.torch.dora.init
#
# @source minipeft.reference.dora.forward
# @source minipeft.torch.dora.DoRALinear
#
# With the norm constant, DoRA's gradients of $A$ and $B$ are LoRA's for an output gradient that was scaled row by row:
#
# @source minipeft.reference.dora.backward
#
# @source minipeft.reference.dora.merge
#
# ### One tensor less to keep
#
# The gradient of $m$ needs the output before it was scaled, which would be one more tensor to keep for every layer. But dividing the scaled output by $g$ gives the unscaled one back, and the scaled
# output is often kept anyway, because the next operation needs its input: another linear layer, a nonlinearity. So on a CPU the torch column keeps the scaled output.
# Where the next operation is a sum, as behind a block's last layer, no other operation keeps it, and DoRA costs one tensor more. Both cases are measured below.
#
# @source minipeft.torch.dora._Rescale
#
# ## The proof
#
# Over the rationals the expanded norm *equals* the norm of the sum, and with the norm given as data the adapted layer equals the merged one:

# %%
from fractions import Fraction

rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    top, bottom = rng.integers(-9, 10, shape).flat, rng.integers(1, 9, shape).flat
    values = [Fraction(int(n), int(d)) for n, d in zip(top, bottom, strict=True)]
    return np.array(values, dtype=object).reshape(shape)


x, W, A, B = fractions(3, 5), fractions(4, 5), fractions(2, 5), fractions(4, 2)
update = lora.LoRA(A, B, Fraction(16, 6))
V = lora.merge(W, update)
assert (dora.squared_row_norm(W, update) == (V * V).sum(axis=1)).all()

adapter = dora.DoRA(A, B, Fraction(16, 6), magnitude=fractions(4))
norm, bias = abs(fractions(4)), fractions(4)
merged = dora._merge(W, adapter, norm)  # `merge`, for any norms
output = dora._forward(x, W, adapter, bias, norm)
assert (output == linear.forward(x, merged, bias)).all()
print("squared norms:", *dora.squared_row_norm(W, update))

# %% [markdown]
# In floats, the division is exact for rows whose length is a power of two. On such rows NumPy and torch agree bit for bit, in values and gradients.
#
# ## The experiment
#
# `tiny` learns the *Devil's Dictionary* with all weights, with LoRA and with DoRA of
# rank 8, on the same batches, each at the best of three learning rates. For each row of each weight we measure how far it has changed in length and in direction,
#
# $$ \Delta M_i = \big| \|W'_i\| - \|W_i\| \big|, \qquad \Delta D_i = 1 - \cos(W'_i, W_i), $$
#
# and take the correlation of the two in two ways: **over the rows of a layer** at the end of the run, and, as the paper does, **over blocks and four moments** of the run, with the mean
# over the rows of each layer. The paper keeps the kinds of layers apart, queries and values, and so do we: one correlation for each kind, and then the mean of them.

# %%
base = chapter.load()
batches, held_out = (
    chapter.task.training(base.tokenizer),
    chapter.task.held_out(base.tokenizer),
)
places = chapter.places(base.model)
MOMENTS = [max(1, chapter.steps * k // 4) for k in (1, 2, 3, 4)]


def weights(model):
    """The weight that each linear layer computes with now."""
    if adapters := adapted(model):
        return {name: layer.merged().detach() for name, layer in adapters.items()}
    found = layers(model, places.linears)
    return {name: weight_of(layer).detach().clone() for name, layer in found.items()}


def changes(now, before):
    """How far each row has changed: in length, and in direction."""
    length = (now.norm(dim=1) - before.norm(dim=1)).abs()
    return length, 1 - torch.cosine_similarity(now, before, dim=1)


def run(model, lr):
    """Train; return the history, and the weights at every moment."""
    snapshots = []

    def watched(step):
        if step in MOMENTS[:-1]:
            snapshots.append(weights(model))
        return batches(step)

    torch.manual_seed(0)
    config = train.TrainConfig(chapter.steps, lr=lr, warmup=chapter.steps // 10)
    history = train.train(model, watched, config, held_out, chapter.kept())
    return history, [*snapshots, weights(model)]


def correlation(pairs):
    """Pearson's, of lengths and directions."""
    return float(np.corrcoef(np.array(pairs, dtype=np.float64).T)[0, 1])


def over_moments(snapshots, before):
    """The correlation over blocks and moments: of each kind of layer, of all layers."""
    kinds = {}
    for now in snapshots:
        for layer in before:
            pair = [float(part.mean()) for part in changes(now[layer], before[layer])]
            kinds.setdefault(layer.rpartition(".")[2], []).append(pair)
    together = correlation([pair for pairs in kinds.values() for pair in pairs])
    return [correlation(pairs) for pairs in kinds.values()], together


def fresh(config):
    """The base, adapted or as it is."""
    model = copy.deepcopy(base.model)
    return inject(model, config, places.linears) if config else model


untrained = train.loss(base.model, held_out)
chapter.quantity(chapter.before, untrained, "nats per token")
before, within, across, losses, counts = weights(base.model), {}, {}, {}, {}
mixed, lowest = {}, {}
for name, config, rates in [
    ("full fine-tuning", None, (1e-3, 2e-3, 4e-3)),
    ("LoRA", LoRAConfig(r=8, alpha=16), (4e-3, 8e-3, 16e-3)),
    ("DoRA", DoRAConfig(r=8, alpha=16), (4e-3, 8e-3, 16e-3)),
]:
    counts[name] = sum(p.numel() for p in trainable_parameters(fresh(config)))
    runs = {rate: run(fresh(config), rate) for rate in rates}
    tried = {rate: history.validation[-1][1] for rate, (history, _) in runs.items()}
    chosen = chapter.best(f"{name}, {chapter.steps} steps", tried)
    snapshots, losses[name] = runs[chosen][1], tried[chosen]
    rows = [changes(snapshots[-1][layer], before[layer]) for layer in before]
    within[name] = [correlation(torch.stack(pair, dim=1).tolist()) for pair in rows]
    kinds, mixed[name] = over_moments(snapshots, before)
    across[name], lowest[name] = float(np.mean(kinds)), min(kinds)
    print(
        f"{name:16s} over rows {np.mean(within[name]):+.2f}, over blocks and moments "
        f"{across[name]:+.2f} ({lowest[name]:+.2f} to {max(kinds):+.2f} by kind), "
        f"held-out loss {losses[name]:.3f}"
    )

# %% tags=["fold"]
figure, ax = plots.axes(
    "Do rows that turn also change their length?",
    "correlation of the two changes, over the rows of a layer",
    size=(6.4, 2.6),
)
for place, (color, values) in enumerate(
    zip(plots.PALETTE, within.values(), strict=False)
):
    ax.plot(values, np.full(len(values), place), "o", color=color, alpha=0.5)
    ax.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=3)
ax.axvline(0, color=plots.INK, linewidth=0.8)
ax.set_yticks(range(len(within)), list(within))
ax.set_ylim(2.6, -0.6)
chapter.show(
    figure,
    "length_direction",
    alt=f"Three rows of points, one point for each layer, over the correlation, from {min(map(min, within.values())):.1f} to {max(map(max, within.values())):.1f}. The bar at the mean of full fine-tuning is the lowest, that of DoRA lies higher, and that of LoRA the highest.",
    caption=f"In LoRA, rows that turn far also change their length (mean correlation {np.mean(within['LoRA']):+.2f}); in DoRA ({np.mean(within['DoRA']):+.2f}) and in full fine-tuning ({np.mean(within['full fine-tuning']):+.2f}) less so.",
)
chapter.claim(
    "DoRA ties the two changes together less than LoRA does",
    np.mean(within["LoRA"]) > np.mean(within["DoRA"]),
    control="LoRA of the same rank; full fine-tuning below both",
)
chapter.claim(
    "full fine-tuning ties them together the least",
    np.mean(within["full fine-tuning"]) < np.mean(within["DoRA"]),
    control="both adapters",
)
chapter.claim(
    "by the paper's measure full fine-tuning ties them together the least as well",
    across["full fine-tuning"] < min(across["LoRA"], across["DoRA"]),
    control="both adapters, over blocks and moments, each kind of layer for itself",
)
chapter.claim(
    "by the paper's measure no mean is negative here",
    min(across.values()) > 0,
    control="the paper's -0.62 for full fine-tuning and -0.31 for DoRA",
)
chapter.claim(
    "of one kind of layer alone, the lowest is one of full fine-tuning",
    lowest["full fine-tuning"] == min(lowest.values()),
    control="the lowest of LoRA's and of DoRA's kinds",
)

# %% [markdown]
# Each point is a layer, each bar the mean over the layers. In LoRA the rows that turn the furthest are often the rows that change their length the most
# ({=f"{np.mean(within['LoRA']):+.2f}"=} on average). In DoRA ({=f"{np.mean(within['DoRA']):+.2f}"=}) and in full fine-tuning ({=f"{np.mean(within['full fine-tuning']):+.2f}"=})
# the two changes are tied together less, as the authors of DoRA intended.
#
# The paper's own measure, over blocks and moments, gives {=f"{across['full fine-tuning']:+.2f}"=}, {=f"{across['LoRA']:+.2f}"=} and {=f"{across['DoRA']:+.2f}"=} here, where
# it reports −0.62, +0.83 and −0.31 for the queries of VL-BART, a model more than a hundred times as large. Full fine-tuning is the lowest here too, but DoRA differs from LoRA by {=f"{across['DoRA'] - across['LoRA']:+.2f}"=} only, which one seed does not settle, and no mean is
# negative (of one kind of layer alone, full fine-tuning has {=f"{lowest['full fine-tuning']:+.2f}"=}, the lowest). There may be two reasons. In a run of
# {=chapter.steps=} steps all changes grow with time, which is a correlation by itself; and Adam moves DoRA's magnitudes at full speed from the first step. The kinds of layers must be kept apart: a single correlation over all layers
# compares the kinds with each other too. It would be {=f"{mixed['LoRA']:+.2f}"=} for LoRA and {=f"{mixed['DoRA']:+.2f}"=} for DoRA.
#
# The held-out loss is {=f"{losses['LoRA']:.3f}"=} for LoRA and {=f"{losses['DoRA']:.3f}"=} for DoRA, from one seed: that is no ranking. DoRA trains
# {=f"{counts['DoRA'] - counts['LoRA']:,}"=} parameters more than LoRA's {=f"{counts['LoRA']:,}"=}, one for every row.
#
# ### What it costs
#
# First a stack of four linear layers of width 1,024, with rank 16, at batch 256: the time of one step, forward and backward, and the bytes of the weights and of all tensors that are kept between the two. As a control, the
# obvious code for the formula, which forms $W + s\,BA$ and scales its rows. Then the same bytes for `tiny` as a whole.


# %%
def stack(config):
    """Four adapted layers."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    return inject(layers, config, [str(i) for i in range(4)])


def kept(model, x):
    """Bytes that autograd holds between forward and backward, beside the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().sum()
    del loss
    return sum(found.values())


class Obvious(nn.Module):
    """DoRA as the formula is written: form V, scale its rows."""

    def __init__(self, layer):
        super().__init__()
        self.W, self.bias = layer.base.weight, layer.base.bias
        shapes = {"A": (16, 1024), "B": (1024, 16), "m": (1024, 1)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 32))

    def forward(self, x):
        V = self.W + 2.0 * self.B @ self.A
        norm = V.norm(dim=1, keepdim=True).detach()
        return nn.functional.linear(x, self.m * V / norm, self.bias)


features = torch.randn(256, 1024)
stacks = {"LoRA": stack(LoRAConfig(16, 32)), "DoRA": stack(DoRAConfig(16, 32))}
stacks["DoRA, obvious code"] = nn.Sequential(*map(Obvious, stack(DoRAConfig(16, 32))))
seconds = {name: [] for name in stacks}


def train_once(model):
    model(features).square().sum().backward()


for _ in range(5):
    for name, model in stacks.items():  # in turn: a busy moment slows all of them
        seconds[name].append(timing.cost(chapter.device, train_once, model))
frozen = sum(p.nbytes for p in stacks["LoRA"].parameters())
memory = {name: frozen + kept(model, features) for name, model in stacks.items()}
slower = np.median(seconds["DoRA"]) / np.median(seconds["LoRA"])
larger = memory["DoRA"] / memory["LoRA"]
for name in stacks:
    cost = f"{1000 * np.median(seconds[name]):4.0f} ms, {memory[name] / 1e6:5.1f} MB"
    print(f"{name:18s} {cost} of weights and kept tensors")
assert larger < 1.05 < memory["DoRA, obvious code"] / memory["LoRA"]


class Loss(nn.Module):
    """A language model whose output is its loss on one batch."""

    def __init__(self, model, batch):
        super().__init__()
        self.model, self.batch = model, train.on_device_of(model, batch)

    def forward(self, _):
        return self.model(**self.batch).loss


whole = {
    name: kept(Loss(fresh(config), batches(0)), None)
    for name, config in (("LoRA", LoRAConfig(8, 16)), ("DoRA", DoRAConfig(8, 16)))
}
weight_bytes = sum(p.nbytes for p in base.model.parameters())
in_tiny = (weight_bytes + whole["DoRA"]) / (weight_bytes + whole["LoRA"])
print(f"stack of linear layers: DoRA takes {slower:.2f} times LoRA's time")
print(f"stack of linear layers: DoRA takes {larger:.3f} times LoRA's memory")
print(f"tiny:                   DoRA takes {in_tiny:.3f} times LoRA's memory")
assert in_tiny > larger

# %% [markdown]
# In the stack, each layer's output is the next one's input and is kept anyway, so DoRA needs {=f"{larger - 1:.1%}"=} more memory than LoRA, and the obvious code {=f"{memory['DoRA, obvious code'] / memory['LoRA'] - 1:.0%}"=} more, because it
# keeps matrices of the size of $W$. In `tiny` DoRA needs {=f"{in_tiny - 1:.0%}"=} more. There the outputs of the attention and of the MLP are added to the sum of the blocks, and queries and keys are rotated: nothing but DoRA
# keeps those outputs. On a GPU every layer keeps the output before its gain instead: from the output itself a gain near zero could not be undone, and to learn which gains are near zero the host would have to wait for the device. [Chapter 17](17_side_by_side.md) measures the peak of a whole training step instead, with the optimizer's states and everything that lives for a moment only.
#
# ## What goes wrong in practice
#
# - **The wrong axis.** The norm belongs to the *row*, over the inputs. The paper calls it column-wise, because [its $W$ is transposed](https://github.com/nbasyl/DoRA/issues/1), and several
#   implementations took that literally ([dora-from-scratch](https://github.com/rasbt/dora-from-scratch),
#   [LyCORIS 216](https://github.com/KohakuBlueleaf/LyCORIS/issues/216)). On a square weight nothing fails:

# %%
W = rng.standard_normal((6, 6))
new = dora.init(rng, W.astype(np.float32), 2, 4)
turned = dora.DoRA(
    new.A, rng.standard_normal((6, 2)), new.scaling, np.linalg.norm(W, axis=1)
)
right = dora.merge(W, turned)
V = lora.merge(W, turned.lora)
wrong = np.linalg.norm(W, axis=0) * V / np.linalg.norm(V, axis=0)
error = np.linalg.norm(right - wrong) / np.linalg.norm(right)
print(f"same shape, another weight: {error:.0%} off")
assert np.allclose(np.linalg.norm(right, axis=1), turned.magnitude)

# %% [markdown]
# - **The norm of $W$ alone** instead of $W + s\,BA$ ([ComfyUI 15458](https://github.com/Comfy-Org/ComfyUI/pull/15458)): right at the start, and further off
#   with every step.
# - **A magnitude of shape (out,) broadcast along the wrong side** gives no error on square weights
#   ([ComfyUI 13011](https://github.com/Comfy-Org/ComfyUI/pull/13011)). The laws of DoRA draw weights that are not square, except where this mistake itself is tested.
# - **A scaled bias.** Code that multiplies the output of the base layer multiplies its bias as well.
# - **A zero row** divides zero by zero. Pruned models have such rows.
# - **Two adapters on one layer**, merged in turn, where the second took its norm from the already merged weight ([peft 3608](https://github.com/huggingface/peft/issues/3608)).
#
# ## Exercises
#
# 1. Every row of the merged weight has the length $|m_i|$, whatever $A$ and $B$ are, unless $V_i$ is zero. Show it on random numbers, and break it by dividing by $\|W_i\|$.

# %% tags=["solution"]
W, A, B = (rng.standard_normal(shape) for shape in ((4, 7), (2, 7), (4, 2)))
adapter = dora.DoRA(A, B, 0.5, np.array([1.0, -2.0, 3.0, 0.5]))
lengths = np.linalg.norm(dora.merge(W, adapter), axis=1)
broken = np.linalg.norm(dora._merge(W, adapter, np.linalg.norm(W, axis=1)), axis=1)
print("lengths:", lengths.round(6), " divided by the norm of W:", broken.round(2))
assert np.allclose(lengths, abs(adapter.magnitude))
assert not np.allclose(broken, abs(adapter.magnitude))

# %% [markdown]
# 2. If the norm were not a constant, the gradient of a row would lose its component along the row. Why? Check it: the true gradient of $V_i$ is
#    orthogonal to $V_i$.

# %% tags=["solution"]
V = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
m, G = torch.rand(4, 1, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
(G * m * V / V.norm(dim=1, keepdim=True)).sum().backward()
along = (V.grad * V).sum(dim=1).detach()
print("component along the row:", along.numpy().round(12))
# m V / |V| does not change when V grows, so its slope in that direction is zero.
assert along.abs().max() < 1e-12

# %% [markdown]
# 3. LLaMA-7B has 32 layers of width 4,096 with an MLP of 11,008. How many parameters does DoRA add to LoRA on q, k, v, up and down?

# %% tags=["solution"]
extra = 32 * (3 * 4096 + 11008 + 4096)
print(
    f"{extra:,}, of {32 * (3 * 4096**2 + 2 * 4096 * 11008):,} weights in those layers"
)
assert extra == 876_544

# %% [markdown]
# ## References
#
# DoRA is by Liu and others [@liu2024]. Training length and direction apart is older: weight normalization [@salimans2016] does it for all weights.
