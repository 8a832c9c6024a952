# %% [markdown]
# # rsLoRA: what the rank may not change
#
# LoRA divides its update by the rank: $s = \alpha / r$. The aim is that one can change $r$ and keep the learning rate. The author of rsLoRA [@kalajdzievski2023] says that this power of $r$ is wrong: with
# $\alpha/r$ the update becomes small as $r$ grows, so that large ranks learn no better than small ones; it should be $\alpha/\sqrt r$. This chapter derives when that is so, and measures
# that the answer depends on the optimizer.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import plots, train
from minipeft.lab.chapter import start
from minipeft.reference import lora
from minipeft.torch.inject import inject
from minipeft.torch.lora import LoRAConfig

chapter = start("07_rslora", steps=25, model="tiny")

# %% [markdown]
# ## The problem
#
# Let $y = x W^T + s\,(x A^T) B^T$, with $A$ random and $B = 0$, and let $G$ be the gradient of the loss with respect to $y$. The first step of gradient descent with learning rate $\eta$ gives
#
# $$ B_1 = -\eta\, s\, G^T (x A^T), \qquad \text{so the adapter now adds} \qquad s\,(x A^T) B_1^T = -\eta\, s^2\; x\,(A^T\! A)\,x^T G . $$
#
# The size of the entries of $A$ does not depend on $r$, so $A^T A$, a sum of $r$ random terms, grows like $r$. The table says how two quantities grow with $r$: as $r^{-1}$, they halve when the rank doubles; as $r^0$, they do
# not change.
#
# | | $s = \alpha/r$ | $s = \alpha/\sqrt r$ |
# |---|---|---|
# | what the adapter adds, $\propto s^2 r$ | $r^{-1}$ | $r^{0}$ |
# | gradient of $B$, $\propto s\,\lVert x A^T\rVert \propto s \sqrt r$ | $r^{-1/2}$ | $r^{0}$ |
#
# Kalajdzievski proves more, for the whole course of training by gradient descent and on average over the random $A$: what an adapter adds, and the gradient that it passes back to its input, keep their size as the rank grows if and only if $s \propto 1/\sqrt r$ [@kalajdzievski2023, theorem 3.2].
#
# ## The formula, and the code
#
# @source minipeft.reference.lora.scaling
# @source minipeft.torch.lora.scaling
#
# Nothing else differs from LoRA.
#
# ## The proof
#
# The exponents of the first step are derived above. The arithmetic is checked on ranks whose root is exact. The laws of LoRA about merging and gradients are tested with any scaling, so they hold here too.

# %%
for r in (4, 16, 64, 256):
    plain, stable = lora.scaling(16, r), lora.scaling(16, r, rank_stabilized=True)
    print(f"r = {r:3d}: alpha/r = {plain:7.4f}, alpha/sqrt(r) = {stable:.4f}")
    assert stable / plain == r**0.5

# %% [markdown]
# ## The experiment
#
# One layer with 768 inputs and 512 outputs is trained to give the outputs of another, whose weight differs by a random matrix. We take ten steps of gradient descent with the reference's own
# `backward`, for ranks from 4 to 512, and note two sizes: how far the adapter has moved the output in the direction opposite to its first gradient, and the norm of the first gradient of $B$. If both axes are
# logarithmic, a power of $r$ is a straight line, and its slope is the exponent.

# %%
RANKS = [4, 8, 16, 32, 64, 128, 256, 512]
rng = np.random.default_rng(0)
x = rng.standard_normal((32, 768)).astype(np.float32)
W = (rng.standard_normal((512, 768)) / 768**0.5).astype(np.float32)
change = (rng.standard_normal((512, 768)) / 768**0.5).astype(np.float32)
target = x @ (W + 0.3 * change).T


def descend(grads, state, lr):
    """A step of gradient descent."""
    return [-lr * g for g in grads]


def adam(grads, state, lr):
    """A step of Adam."""
    state["t"] = state.get("t", 0) + 1
    steps = []
    for i, g in enumerate(grads):
        m, v = state.get(i, (0 * g, 0 * g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        state[i] = m, v
        m_hat, v_hat = m / (1 - 0.9 ** state["t"]), v / (1 - 0.999 ** state["t"])
        steps.append(-lr * m_hat / (np.sqrt(v_hat) + 1e-12))
    return steps


def measure(r, rank_stabilized, rule, lr, steps=10):
    """How far the output moves against its first gradient, and B's gradient there."""
    adapter = lora.init(np.random.default_rng(r), 768, 512, r, 4.0, rank_stabilized)
    wanted = (target - x @ W.T) / len(x)
    first, state = lora.backward(-wanted, x, W, adapter).B, {}
    for _ in range(steps):
        grad_y = (lora.forward(x, W, adapter) - target) / len(x)
        grads = lora.backward(grad_y, x, W, adapter)
        step_A, step_B = rule((grads.A, grads.B), state, lr)
        adapter = lora.LoRA(adapter.A + step_A, adapter.B + step_B, adapter.scaling)
    added = lora.forward(x, 0 * W, adapter)
    moved = float((added * wanted).sum() / np.linalg.norm(wanted))
    return moved, float(np.linalg.norm(first))


def slope(values):
    """The exponent: a line fitted on logarithmic axes."""
    return float(np.polyfit(np.log(RANKS), np.log(values), 1)[0])


found, slopes = {}, {}
for rule, lr in ((descend, 1e-3), (adam, 1e-4)):
    for name, stable in (("alpha/r", False), ("alpha/sqrt(r)", True)):
        measured = [measure(r, stable, rule, lr) for r in RANKS]
        key = (rule.__name__, name)
        found[key] = list(zip(*measured, strict=True))
        slopes[key] = [slope(values) for values in found[key]]
        print(
            f"{rule.__name__:8s} {name:14s} output ~ r^{slopes[key][0]:+.2f}, gradient of B ~ r^{slopes[key][1]:+.2f}"
        )
plain, stable = slopes["descend", "alpha/r"], slopes["descend", "alpha/sqrt(r)"]
assert abs(plain[0] + 1) < 0.1
assert abs(plain[1] + 0.5) < 0.1
assert max(map(abs, stable)) < 0.1

# %% tags=["fold"]
figure, ax = plots.axes(
    "Ten steps of gradient descent", "rank", "size, divided by that at rank 4"
)
for style, (_, name) in zip(
    ("-", "--"), [("", "alpha/r"), ("", "alpha/sqrt(r)")], strict=True
):
    for color, values, what, k in zip(
        plots.PALETTE,
        found["descend", name],
        ("output", "gradient of B"),
        (0, 1),
        strict=False,
    ):
        label = f"{what}, {name}: slope {slopes['descend', name][k]:+.2f}"
        relative = np.array(values) / values[0]
        ax.plot(
            RANKS, relative, style, marker="o", markersize=4, color=color, label=label
        )
ax.set(xscale="log", yscale="log")
ax.set_xticks(RANKS, [str(r) for r in RANKS])
ax.minorticks_off()
ax.legend(fontsize=9, frameon=False, labelcolor=plots.INK, handlelength=3)
chapter.show(
    figure,
    "slopes",
    alt=f"Four lines over the rank, from {min(RANKS)} to {max(RANKS)}, on logarithmic axes. With alpha/r the solid line of the output has a slope of {plain[0]:+.2f} and that of the gradient {plain[1]:+.2f}; with alpha over the root of r both dashed lines are flat, with slopes of {stable[0]:+.2f} and {stable[1]:+.2f}.",
    caption=f"Gradient descent with α/r moves the output {found['descend', 'alpha/r'][0][0] / found['descend', 'alpha/r'][0][-1]:.0f} times less at rank 512 than at rank 4 (slope {plain[0]:+.2f}). With α/√r the rank makes little difference (slope {stable[0]:+.2f}).",
)

# %% [markdown]
# The fitted exponents are {=f"{plain[0]:+.2f}"=} and {=f"{plain[1]:+.2f}"=} for $\alpha/r$, where the table says −1 and −1/2, and
# {=f"{stable[0]:+.2f}"=} and {=f"{stable[1]:+.2f}"=} for $\alpha/\sqrt r$, where it says 0. At $r = 512$ the
# adapter with $\alpha/r$ has added {=f"{found['descend', 'alpha/r'][0][0] / found['descend', 'alpha/r'][0][-1]:.0f}"=} times less to the output than at $r = 4$.
#
# ### And with Adam?
#
# Fine-tuning usually runs with Adam and not with plain gradient descent, and for Adam the derivation is another one. Adam divides every gradient by its own size, so $s$ drops out of the step: every entry of $B$ moves by about $\eta$, whatever
# the scaling. What the adapter adds is then $s$ times a sum of $r$ terms of one sign, which is in proportion to $s\,r\,\eta$: the same at every rank for $\alpha/r$, and growing like $\sqrt r$ for
# $\alpha/\sqrt r$. The measured slopes of the output are {=f"{slopes['adam', 'alpha/r'][0]:+.2f}"=} for $\alpha/r$ and
# {=f"{slopes['adam', 'alpha/sqrt(r)'][0]:+.2f}"=} for $\alpha/\sqrt r$.

# %%
adam_plain, adam_stable = slopes["adam", "alpha/r"], slopes["adam", "alpha/sqrt(r)"]
assert abs(adam_plain[0]) < 0.15
assert abs(adam_stable[0] - 0.5) < 0.15

# %% [markdown]
# So in the first steps with Adam, $\alpha/r$ is the scaling under which the learning rate need not change with the rank. Schulman reports the same from large models
# [@schulman2025]. The theorem and this observation do not contradict each other. The theorem is about gradient descent, whose steps grow with the gradients; the observation is about Adam,
# which divides the size of the gradients out.
#
# The paper's main runs, of Llama 2, use AdamW at one learning rate. With $\alpha/r$ all ranks from 4 to 2,048 end at about the same loss; with $\alpha/\sqrt r$ the larger ranks end lower. Are their steps only longer? As a control the paper tries other rates for
# $\alpha/r$ at rank 4: the best reaches a perplexity of 1.863, and $\alpha/\sqrt r$ at rank 2,048 one of 1.836. Our control is another: a larger rate at the *larger* rank.
#
# ### On a model
#
# `tiny` learns the *Devil's Dictionary* at ranks 8 and 64 with Adam. The numerators $\alpha$ are chosen so that both scalings are equal at rank 8. One run has $\alpha/r$ and a
# learning rate as many times larger as the scaling of rsLoRA is.

# %%
base = chapter.load()
batches, held_out = (
    chapter.task.training(base.tokenizer),
    chapter.task.held_out(base.tokenizer),
)
places = chapter.places(base.model)
before = chapter.quantity(
    chapter.before, train.loss(base.model, held_out), "nats per token"
)
results, times = {}, 8**0.5
for name, config, lr in [
    ("r = 8", LoRAConfig(r=8, alpha=8), 2e-3),
    ("r = 64, alpha/r", LoRAConfig(r=64, alpha=8), 2e-3),
    ("r = 64, alpha/r, faster", LoRAConfig(r=64, alpha=8), 2e-3 * times),
    ("r = 64, alpha/sqrt(r)", LoRAConfig(64, times, rank_stabilized=True), 2e-3),
]:
    generator = torch.Generator().manual_seed(0)
    model = inject(
        copy.deepcopy(base.model), config, places.linears, generator=generator
    )
    settings = train.TrainConfig(chapter.steps, lr=lr, warmup=3)
    history = train.train(model, batches, settings, held_out, chapter.kept())
    results[name] = history.validation[-1][1]
    print(f"{name:23s} held-out loss {results[name]:.3f}")
by_rank = results["r = 64, alpha/r"] - results["r = 8"]
by_scaling = results["r = 64, alpha/r"] - results["r = 64, alpha/sqrt(r)"]
by_rate = results["r = 64, alpha/r"] - results["r = 64, alpha/r, faster"]
chapter.claim(
    f"with alpha/r and one learning rate, ranks 8 and 64 end {abs(by_rank):.3f} apart",
    abs(by_rank) < by_scaling / 5,
    control="the change that another scaling makes at rank 64",
)
chapter.claim(
    "what the scaling of rsLoRA gains here, a larger learning rate gains as well",
    by_rate >= by_scaling > 0,
    control="alpha/r with the learning rate multiplied by the ratio of the scalings",
)

# %% [markdown]
# With $\alpha/r$, rank 64 ends at {=f"{results['r = 64, alpha/r']:.3f}"=} and rank 8 at {=f"{results['r = 8']:.3f}"=}: eight times the rank changes little, as the derivation for Adam says. With $\alpha/\sqrt r$, whose scaling is
# {=f"{times:.1f}"=} times as large, rank 64 ends at {=f"{results['r = 64, alpha/sqrt(r)']:.3f}"=}. That is better, but it does not show that the scaling is: with $\alpha/r$ and a learning rate that is {=f"{times:.1f}"=} times as large it ends at
# {=f"{results['r = 64, alpha/r, faster']:.3f}"=}. The first rate was too small for this run, and both changes make the steps longer. One seed and {=chapter.steps=} steps do not say which rank is best.
#
# ## What goes wrong in practice
#
# - **The setting is lost in a file.** An adapter trained with $\alpha/\sqrt r$ and loaded with $\alpha/r$ is $\sqrt r$ times too weak. It still runs and still helps a little, so the mistake is easy to
#   miss. It happened in vLLM ([6909](https://github.com/vllm-project/vllm/pull/6909)) and elsewhere; llama.cpp's converter writes $\alpha$ but not which rule belongs to it. [The golden
#   vectors](../verify.md) have a flag for it, with ranks whose root is exact.
# - **Two corrections at once.** A larger learning rate for a larger rank *and* rsLoRA correct twice.
# - **$\alpha$ taken from a LoRA recipe.** $\alpha = 2r$ is a scaling of 2 with LoRA and of $2\sqrt r$ with rsLoRA.
#
# ## Exercises
#
# 1. At which rank do the two scalings agree, for one $\alpha$?

# %% tags=["solution"]
assert lora.scaling(7.0, 1) == lora.scaling(7.0, 1, rank_stabilized=True)
print("only at r = 1")

# %% [markdown]
# 2. An adapter of rank 64 was trained with rsLoRA at $\alpha = 16$. A loader can only compute $\alpha/r$. Which $\alpha$ must it be told?

# %% tags=["solution"]
wanted = lora.scaling(16, 64, rank_stabilized=True)
told = wanted * 64
print(f"alpha = {told:g}")
assert lora.scaling(told, 64) == wanted

# %% [markdown]
# 3. Where does the $r$ in $A^T A$ come from? Measure the slope of $x A^T A x^T$ over the rank, for one row $x$.

# %% tags=["solution"]
sizes = []
for r in RANKS:
    A = lora.init(np.random.default_rng(r), 768, 512, r, 1.0).A
    sizes.append(np.linalg.norm(x[:1] @ A.T @ A @ x[:1].T))
print(f"slope {slope(sizes):+.2f}")
assert abs(slope(sizes) - 1) < 0.1

# %% [markdown]
# ## References
#
# rsLoRA is by Kalajdzievski [@kalajdzievski2023]; LoRA's own scaling is in section 4.1 of its paper [@hu2021]. That with Adam the best learning rate hardly depends on the rank under
# $\alpha/r$ is reported by Schulman [@schulman2025].
