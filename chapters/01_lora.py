# %% [markdown]
# # LoRA: train a thin product
#
# A weight matrix of a large model has millions of entries. What fine-tuning *changes* about it can be
# described with far fewer: two thin matrices whose product is added to the frozen weight. That is LoRA
# [@hu2021], and this chapter takes it from the formula to a model that has learned to sneer.

# %%
import copy

import numpy as np
import torch
from matplotlib.patches import Rectangle

from minipeft.lab import data, models, plots, text, train
from minipeft.lab.chapter import start
from minipeft.reference import linear, lora
from minipeft.torch.inject import inject, merge, trainable_parameters, unmerge
from minipeft.torch.lora import LoRAConfig, LoRALinear

chapter = start("01_lora", steps=50, model="tiny")

# %% [markdown]
# ## The problem
#
# Training every weight keeps a gradient and two optimizer states for every weight ([chapter 0](00_why.md) counts them). If most weights could stay
# frozen, most of that would vanish. But *which* few to train? Picking some layers works badly. LoRA trains all of
# them, each in a small way.
#
# ## The formula
#
# Freeze $W$, of shape (out, in). Train $A$ of shape $(r, \text{in})$ and $B$ of shape $(\text{out}, r)$, with a rank $r$ much smaller
# than either side, and compute
#
# $$ y = x W^T + s\,(x A^T) B^T, \qquad s = \frac{\alpha}{r}. $$
#
# The update of the weight is $\Delta W = s\,B A$: a matrix as large as $W$ that is never stored. $A$ starts random and $B$ at zero, so that
# training begins exactly at the base model. The scaling $s$ keeps the size of the update comparable when
# $r$ changes.
#
# When training is done, $W + \Delta W$ is an ordinary weight. The adapter can be *merged*, and costs nothing any more.

# %% tags=["fold"]
figure, ax = plots.axes(size=(6.4, 2.5))
ax.set(xlim=(0, 13), ylim=(0, 5), aspect="equal")
ax.axis("off")
grey, blue, green = plots.FAINT, plots.PALETTE[0], plots.PALETTE[1]
for x, y, w, h, color, label in [
    (0.5, 0.5, 4, 4, grey, "$W$\nfrozen"),
    (6.0, 0.5, 0.7, 4, blue, "$B$"),
    (7.2, 3.8, 4, 0.7, green, "$A$"),
]:
    ax.add_patch(Rectangle((x, y), w, h, color=color))
    ax.text(
        x + w / 2,
        y + h / 2,
        label,
        ha="center",
        va="center",
        color="white" if color != grey else plots.INK,
    )
ax.text(5.2, 2.5, "+ s", ha="center", va="center", fontsize=13, color=plots.INK)
for x, y, label in [
    (2.5, 0.1, "in"),
    (0.25, 2.5, "out"),
    (6.35, 0.1, "r"),
    (9.2, 3.4, "in"),
    (11.5, 4.15, "r"),
]:
    ax.text(x, y, label, ha="center", va="center", fontsize=9, color=plots.INK)
chapter.show(
    figure,
    "shapes",
    alt="A large grey square W, frozen, plus s times a tall thin matrix B and a wide flat matrix A: the two trained parts are slivers beside the square.",
)

# %% [markdown]
# ## The code
#
# The reference is the formula. `scaling` also knows the variant of rsLoRA, which divides by $\sqrt r$ and has a chapter of
# its own.
#
# @source minipeft.reference.lora.LoRA
#
# @source minipeft.reference.lora.scaling
#
# @source minipeft.reference.lora.init
# @source minipeft.torch.lora.init
#
# @source minipeft.reference.lora.forward
# @source minipeft.torch.lora.LoRALinear
#
# The backward pass by hand shows what is saved: the gradients of $A$ and $B$ need $x$ and the $r$ numbers $x A^T$, and
# nothing needs a matrix of the shape of $W$ but $W$ itself.
#
# @source minipeft.reference.lora.backward
#
# @source minipeft.reference.lora.delta
#
# @source minipeft.reference.lora.merge
#
# ??? note "The two checks"
#     @source minipeft.reference.lora.check_rank
#
#     @source minipeft.reference.lora.check_fits
#
# ## The proof
#
# "Merging is exact" is a claim about real numbers, and computers have none. But the reference is made of
# `+`, `*` and `@` alone, so it also runs on fractions, where nothing is ever rounded:

# %%
from fractions import Fraction

rng = np.random.default_rng(0)


def fractions(*shape):
    """Random fractions: arithmetic on them has no rounding."""
    values = [
        Fraction(int(n), int(d))
        for n, d in zip(
            rng.integers(-9, 10, shape).flat,
            rng.integers(1, 9, shape).flat,
            strict=True,
        )
    ]
    return np.array(values, dtype=object).reshape(shape)


x, W, A, B = fractions(3, 5), fractions(4, 5), fractions(2, 5), fractions(4, 2)
adapter = lora.LoRA(A, B, Fraction(16, 6))
adapted = lora.forward(x, W, adapter)
merged = linear.forward(x, lora.merge(W, adapter))
print("adapted[0]:", *adapted[0])
print("merged[0]: ", *merged[0])
assert (adapted == merged).all()

# %% [markdown]
# Equal, with `==`. The tests do this for hundreds of drawn layers; they also prove the gradients that way, since the loss is linear in $A$ alone
# and in $B$ alone, and so a difference quotient is not an approximation. In floats, small integers with a power-of-two scaling make
# every partial sum exact in any order: there NumPy, torch and CUDA must agree bit for bit, and do.
#
# ## The experiment
#
# `tiny`, the model of this book, has read five novels of Jane Austen. It shall now learn to write like Ambrose Bierce, whose
# *Devil's Dictionary* has {=len(pairs["train"])=} definitions to learn from and {=len(pairs["validation"])=} more to be
# judged on. Three runs see the same batches in the same order:
#
# 1. **full fine-tuning** of every weight;
# 2. **LoRA** of rank 8 on every linear layer;
# 3. **LoRA on a model that has learned nothing**, to see what the frozen weights contribute.

# %%
base = models.load(chapter.model, chapter.device)
tokenizer = base.tokenizer
size = (8, 80)
pairs = {
    split: [(entry.prompt, entry.answer) for entry in data.devils_dictionary(split)]
    for split in ("train", "validation")
}
batches = text.examples(tokenizer, pairs["train"], size, seed=0)
held_out = text.example_batches(tokenizer, pairs["validation"], (25, 80))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(model, lr):
    """Train what is trainable; return the history."""
    torch.manual_seed(0)
    config = train.TrainConfig(
        chapter.steps,
        lr=lr,
        warmup=chapter.steps // 10,
        validate_every=max(1, chapter.steps // 5),
    )
    return train.train(model, batches, config, held_out)


start_loss = train.loss(base.model, held_out)
full = copy.deepcopy(base.model)
adapted = copy.deepcopy(base.model)
unlearned = models.random_like(base.model)
for model in (adapted, unlearned):
    inject(model, LoRAConfig(r=8, alpha=16), LINEARS)
histories = {
    "full fine-tuning": run(full, 1e-3),
    "LoRA, r = 8": run(adapted, 4e-3),
    "LoRA on random weights": run(unlearned, 4e-3),
}
print(f"before: {start_loss:.3f} nats per token")
for name, history in histories.items():
    print(
        f"{name:23s} {history.validation[-1][1]:.3f} after {chapter.steps} steps, {1000 * history.seconds / chapter.steps:.0f} ms a step"
    )

# %%
figure = plots.loss_curves(histories)
ax = figure.axes[0]
ax.axhline(start_loss, color=plots.INK, linewidth=0.8, linestyle="--")
ax.text(chapter.steps, start_loss, "before", ha="right", va="bottom", color=plots.INK)
chapter.show(
    figure,
    "loss",
    alt="Loss curves. LoRA and full fine-tuning on the trained model start together and stay close; LoRA on random weights starts far above and does not come near.",
)

# %%
count = {
    "full fine-tuning": sum(p.numel() for p in full.parameters()),
    "LoRA, r = 8": sum(p.numel() for p in trainable_parameters(adapted)),
}
gain = {name: start_loss - histories[name].validation[-1][1] for name in count}
share = gain["LoRA, r = 8"] / gain["full fine-tuning"]
for name, n in count.items():
    print(f"{name:17s} trains {n:9,} parameters, gains {gain[name]:.3f} nats")
assert count["LoRA, r = 8"] < count["full fine-tuning"] / 8
assert histories["LoRA on random weights"].validation[-1][1] > start_loss

# %% [markdown]
# LoRA trains {=f"{100 * count['LoRA, r = 8'] / count['full fine-tuning']:.1f}"=} % of the parameters (on a model this small: the
# share falls as the width grows) and reaches {=f"{100 * share:.0f}"=} % of the gain of full fine-tuning. On random weights it learns which tokens are common and little more. So a
# low-rank update is not a small model that learns the task: it *steers* what the frozen weights already know.
#
# And the definitions? The prompts are words that no run was trained on.

# %%
for seed, (prompt, _) in enumerate(pairs["validation"][5:50:9]):
    sampling = text.Sampling(tokens=36, temperature=0.7, top_k=20, seed=seed)
    print(prompt)
    for name, model in (("before", base.model), ("after ", adapted)):
        answer = text.generate(model, tokenizer, prompt, sampling)
        print(f"  {name}:", " ".join(answer.split()))

# %% [markdown]
# A model of a million parameters does not make sense, but it has changed its manner.
#
# ## Merging the trained layer
#
# The trained adapter becomes part of the weight, and back. Keeping the weight that was there costs memory and makes the way
# back exact: not close, the same bits.

# %%
layer = next(m for m in adapted.modules() if isinstance(m, LoRALinear))
weight = layer.base.weight.clone()
tokens = held_out[0]["input_ids"].to(base.device)
with torch.no_grad():
    separate = adapted(tokens).logits
    merge(adapted)
    joined = adapted(tokens).logits
    changed = (layer.merged_weight != weight).float().mean().item()
    unmerge(adapted)
    again = adapted(tokens).logits
print(f"merging changed {changed:.0%} of the first layer's weights")
print(
    f"largest difference of a logit: {(separate - joined).abs().max():.1e}, logits up to {separate.abs().max():.1f}"
)
assert torch.equal(layer.base.weight, weight)
assert torch.equal(again, separate)
print("unmerged: every weight and every logit as before, bit for bit")

# %% [markdown]
# ## What goes wrong in practice
#
# - **The scaling.** `scale = alpha` instead of `alpha / r` is $r$ times too much
#   ([mlx-vlm 841](https://github.com/Blaizzy/mlx-vlm/issues/841)). Libraries whose default is `alpha = r` have a scaling of exactly 1, and a merge
#   that forgets it passes their tests ([peft 2489](https://github.com/huggingface/peft/pull/2489)). No test of this project uses 0 or 1.
# - **Which is A?** Three conventions are in use: $A$ as (r, in), as (in, r), and with the roles exchanged. Only a layer that is not square tells them apart, so
#   no test here has a square one.
# - **Merge and unmerge by addition and subtraction** loses bits, in bfloat16 many. After 1,000 cycles a weight has drifted visibly; the chapter on merging
#   measures it. Keep the weight.
# - **An adapter that was silently not applied**, because a name did not match. Here a target that matches nothing is an error:

# %%
from minipeft.errors import InputError

try:
    inject(copy.deepcopy(base.model), LoRAConfig(r=8, alpha=16), ["query_proj"])
except InputError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# 1. GPT-3 has 96 layers of width 12,288. How many parameters has LoRA of rank 8 on the query and value projections? The paper says 37.7 million.

# %% tags=["solution"]
parameters = 96 * 2 * 8 * (12288 + 12288)
print(f"{parameters / 1e6:.1f} million")
assert round(parameters / 1e6, 1) == 37.7

# %% [markdown]
# 2. $B$ starts at zero. What would happen if $A$ did too? Compute both gradients with the reference.

# %% tags=["solution"]
x, W, G = (rng.standard_normal(shape) for shape in ((3, 5), (4, 5), (3, 4)))
zeros = lora.LoRA(np.zeros((2, 5)), np.zeros((4, 2)), 2.0)
usual = lora.LoRA(rng.standard_normal((2, 5)), np.zeros((4, 2)), 2.0)
for name, start_at in (("both zero", zeros), ("B zero", usual)):
    gradients = lora.backward(G, x, W, start_at)
    print(
        f"{name:9s}: |gradient of A| {np.abs(gradients.A).sum():.2f}, |gradient of B| {np.abs(gradients.B).sum():.2f}"
    )
assert not lora.backward(G, x, W, zeros).B.any()  # it could never begin

# %% [markdown]
# 3. The update has rank at most $r$. Show that the trained update of the first layer has rank 8, from its singular values.

# %% tags=["solution"]
update = layer.delta().detach().cpu().double().numpy()
values = np.linalg.svd(update, compute_uv=False)
print("singular values:", " ".join(f"{v:.3g}" for v in values[:10]))
assert np.linalg.matrix_rank(update, tol=values[0] * 1e-5) <= 8

# %% [markdown]
# ## References
#
# LoRA is by Hu and others [@hu2021]; that its scaling should be $\alpha/\sqrt r$ for large ranks is shown by Kalajdzievski [@kalajdzievski2023]. How much LoRA learns
# and how much it forgets was measured by Biderman and others [@biderman2024].
