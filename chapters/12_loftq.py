# %% [markdown]
# # LoftQ: quantize with the adapter in mind
#
# QLoRA quantizes the base and starts its adapter at zero, so training begins at a damaged
# model. In four bits the damage is small. In two bits nothing is left that an adapter
# could steer. LoftQ [@li2023] lets the adapter repair the damage *before* training: it looks for a quantized base
# and an adapter whose sum is the weight.

# %%
import copy
from itertools import islice, pairwise

import numpy as np
import torch

from minipeft.lab import data, models, plots, text, train
from minipeft.lab.chapter import start
from minipeft.reference import blockwise, loftq, lora
from minipeft.reference.codebook import NF2, NF4, normal_float
from minipeft.torch import codebook
from minipeft.torch import loftq as loftq_torch
from minipeft.torch.inject import inject
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear

chapter = start("12_loftq", steps=30, model="tiny")
NF3 = normal_float(3)
BOOKS = {"NF4": NF4, "NF3": NF3, "NF2": NF2}
COLORS = dict(zip(BOOKS, plots.PALETTE, strict=False))

# %% [markdown]
# ## The problem
#
# What is lost when a weight is rounded to fewer and fewer bits? Here is one matrix of MiniLM.

# %%
models.fetch("minilm")
weights = models.minilm_weights()
W = weights["encoder.layer.3.attention.self.query.weight"]


def lost(W, values):
    """||W - what comes back|| / ||W||."""
    back = blockwise.dequantize(blockwise.quantize(W, values))
    return float(np.linalg.norm(W - back) / np.linalg.norm(W))


for name, values in BOOKS.items():
    print(f"{name}: {lost(W, values):5.1%} of the norm is lost")
assert lost(W, NF2) > 4 * lost(W, NF4)

# %% [markdown]
# ## The formula
#
# Look for both at once: $\min_{Q, A, B} \lVert W - Q - s\,BA \rVert_F$, with $Q$ restricted to what the codes can say and $BA$ to rank $r$.
# There is no formula for the answer, but each half is easy when the other is fixed. So alternate, beginning with $s\,BA = 0$:
#
# $$ Q_t = q(W - s\,B_{t-1} A_{t-1}), \qquad s\,B_t A_t = \mathrm{SVD}_r(W - Q_t). $$
#
# The adapter of the second half divides by $s$ under the root, exactly as in [PiSSA](11_pissa.md). So training, which multiplies by
# $s$, gets the product that was meant.
#
# ## The code
#
# @source minipeft.reference.loftq.init
# @source minipeft.torch.loftq.init
#
# @source minipeft.reference.loftq.alternate
# @source minipeft.torch.loftq.alternate
#
# @source minipeft.reference.loftq.error
# @source minipeft.torch.loftq.error
#
# In torch the SVD is the randomized one. The residual of a quantizer is almost noise, its spectrum almost flat, and $r$ nearly exact
# directions are worth as much as $r$ exact ones; what matters is the next law, and it holds for any projection.
#
# ## The proof
#
# *One step is never worse than plain quantization.* The SVD is the best approximation of rank $r$ [@eckart1936], and zero is one of those it could have returned. A randomized SVD returns
# $P P^T (W - Q)$ with orthonormal $P$: a projection, which can only shorten what it is taken from.
#
# *More steps are never worse*, but only because `init` keeps the best. The alternation alone does **not** go downhill. Its second half
# is the best answer to the first. Its first half is no best answer to anything: rounding to the codes of a block's own absmax is not a
# projection, and a block whose absmax has grown may lose more than the SVD has won. A search finds such cases within a few draws:


# %%
def raw_errors(W, r, values, blocksize, steps):
    """The error after each step of the alternation, nothing kept."""
    pairs = islice(loftq.alternate(W, r, 2 * r, values, blocksize), steps)
    return [loftq.error(W, *pair) for pair in pairs]


found = 0
for seed in range(40):
    small = np.random.default_rng(seed).standard_normal((6, 16)).astype(np.float32)
    errors = raw_errors(small, 2, NF2, 16, 6)
    if any(after > before * 1.01 for before, after in pairwise(errors)):
        found += 1
        example = seed, errors
print(
    f"{found} of 40 random 6 x 16 matrices have a step that raises the error by over 1 %"
)
print(f"seed {example[0]}:", " ".join(f"{e:.3f}" for e in example[1]))
assert found > 0

# %% [markdown]
# *Any scaling gives the same error*, because the adapter makes up for it. And what if it does not? Write $R = W - Q = \sum_i \sigma_i u_i v_i^T$. An adapter that
# ignores $s$ contributes $s$ times the largest terms, so that $\sigma_i$ becomes $(1 - s)\,\sigma_i$. Of what one step could win in the squared norm, the share
# $1 - (1 - s)^2$ is left: {=100 * (1 - (1 - 1 / 4) ** 2):.0f=} % for $s = 1/4$, nothing at all for $s = 2$, and beyond it a loss.

# %%
plain = lost(W, NF4) * np.linalg.norm(W)
q, initial = loftq.init(W, 16, 16, steps=1)
print(f"plain NF4          {plain:.5f}")
for s in (0.25, 1.0, 2.0, 4.0):
    honoured = loftq.error(W, *loftq.init(W, 16, 16 * s, steps=1))
    forgotten = loftq.error(W, q, lora.LoRA(initial.A, initial.B, s))
    print(f"s = {s:<4}  honoured {honoured:.5f}   forgotten {forgotten:.5f}")
    assert honoured < plain
assert abs(loftq.error(W, q, lora.LoRA(initial.A, initial.B, 2.0)) / plain - 1) < 1e-4

# %% [markdown]
# ## The experiment: the descent
#
# The same matrix, three codebooks, ten steps, rank 16. Faint: the alternation as it runs; strong: the best so far.

# %%
STEPS = 8
curves = {name: raw_errors(W, 16, values, 64, STEPS) for name, values in BOOKS.items()}
kept = {name: np.minimum.accumulate(c) for name, c in curves.items()}
zero = {name: lost(W, values) * np.linalg.norm(W) for name, values in BOOKS.items()}
for name in BOOKS:
    print(
        f"{name}: plain {zero[name]:.3f}, after 1 step {kept[name][0]:.3f}, after 5 {kept[name][4]:.3f}"
    )
    assert all(after <= before for before, after in pairwise(kept[name]))

# %% tags=["fold"]
figure, ax = plots.axes(
    x="steps", y="error, relative to plain quantization", size=(6.4, 3.2)
)
for name in BOOKS:
    share = np.array([zero[name], *kept[name]]) / zero[name]
    ax.plot(
        np.arange(1, STEPS + 1),
        np.array(curves[name]) / zero[name],
        color=COLORS[name],
        alpha=0.4,
    )
    ax.plot(np.arange(STEPS + 1), share, "o-", color=COLORS[name], markersize=4)
    aside = {"NF3": 0.004, "NF4": -0.004}.get(name, 0.0)
    ax.text(
        STEPS + 0.2,
        share[-1] + aside,
        name,
        color=COLORS[name],
        va="center",
        weight="bold",
    )
ax.set(xlim=(-0.2, STEPS + 1.2))
chapter.show(
    figure,
    "descent",
    alt="Error of LoftQ relative to plain quantization over eight steps for NF4, NF3 and NF2: a large first drop for each, then a slower descent.",
)

# %% [markdown]
# The first step is the SVD of what plain quantization lost, and wins the most. Five steps, the paper's choice, take the error of NF4 to
# {=f"{100 * kept['NF4'][4] / zero['NF4']:.0f}"=} % and that of NF2 to {=f"{100 * kept['NF2'][4] / zero['NF2']:.0f}"=} %.
#
# ## The experiment: two bits
#
# Now a whole model. Every linear layer of `tiny` goes to NF2, blocks of 64, with adapters of rank 16. What is the loss *before any training*, on
# text that it knows (Austen) and on the task (Bierce)?

# %%
base = models.load(chapter.model, chapter.device)
tokenizer = base.tokenizer
pairs = {
    split: [(entry.prompt, entry.answer) for entry in data.devils_dictionary(split)]
    for split in ("train", "validation")
}
batches = text.examples(tokenizer, pairs["train"], (6, 64), seed=0)
held_out = text.example_batches(tokenizer, pairs["validation"], (25, 64))
novel = text.encode(tokenizer, [data.austen("persuasion")[:20_000]])
known = text.consecutive(novel, (16, 128), tokenizer.bos_token_id)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R = 16


def qlora(values):
    """Quantize every linear layer and inject a LoRA that starts at zero."""
    model = copy.deepcopy(base.model)
    for name, layer in list(model.named_modules()):
        if name.split(".")[-1] in LINEARS:
            model.set_submodule(name, QuantizedLinear.from_linear(layer, values))
    return inject(model, LoRAConfig(r=R, alpha=2 * R), LINEARS)


def with_loftq(values, steps=5, plan=None):
    """Start base and adapter together."""
    config = LoftQConfig(R, 2 * R, values, steps=steps, codebooks=plan or {})
    return inject(copy.deepcopy(base.model), config, LINEARS)


LINEAR = {
    name: layer.weight.detach()
    for name, layer in base.model.named_modules()
    if name.split(".")[-1] in LINEARS
}
bits = loftq_torch.plan(LINEAR, 3)
mixed = {name: codebook.NF4 for name, b in bits.items() if b == 4}
torch.manual_seed(0)
candidates = {
    "32 bits": base.model,
    "QLoRA, NF4": qlora(codebook.NF4),
    "LoftQ, NF4": with_loftq(codebook.NF4),
    "QLoRA, NF2": qlora(codebook.NF2),
    "LoftQ, NF2": with_loftq(codebook.NF2),
    "LoftQ, 2 and 4 bits": with_loftq(codebook.NF2, plan=mixed),
}
loss = {
    name: (train.loss(model, known), train.loss(model, held_out))
    for name, model in candidates.items()
}
print("before training        Austen   Bierce")
for name, (austen, bierce) in loss.items():
    print(f"{name:20s}   {austen:6.3f}   {bierce:6.3f}")
assert loss["LoftQ, NF2"][0] < loss["QLoRA, NF2"][0]
assert loss["LoftQ, NF4"][0] < loss["QLoRA, NF4"][0]

# %% [markdown]
# Four bits cost {=f"{loss['QLoRA, NF4'][0] - loss['32 bits'][0]:.3f}"=} nats on Austen, two bits {=f"{loss['QLoRA, NF2'][0] - loss['32 bits'][0]:.3f}"=}. LoftQ gives back
# {=f"{100 * (loss['QLoRA, NF2'][0] - loss['LoftQ, NF2'][0]) / (loss['QLoRA, NF2'][0] - loss['32 bits'][0]):.0f}"=} % of what two bits lost, without having seen a word of text.
#
# The last row mixes. With an average of three bits per weight to spend, {=len(mixed)=} of {=len(LINEAR)=} layers get four and the others two. The paper gives four to the
# first layers of the model; here they go where they take most error off a value.
#
# @source minipeft.reference.loftq.plan
# @source minipeft.torch.loftq.plan
#
# Then training. Same batches, same rate:

# %%
histories = {}
for name in ("QLoRA, NF4", "QLoRA, NF2", "LoftQ, NF2", "LoftQ, 2 and 4 bits"):
    torch.manual_seed(0)
    config = train.TrainConfig(chapter.steps, lr=2e-3, warmup=chapter.steps // 10)
    histories[name] = train.train(candidates[name], batches, config, held_out)
    print(
        f"{name:20s}   {loss[name][1]:.3f} before, {histories[name].validation[-1][1]:.3f} after"
    )
after = {name: h.validation[-1][1] for name, h in histories.items()}
assert after["LoftQ, NF2"] < after["QLoRA, NF2"]

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="training loss (nats per token)", size=(6.4, 3.4))
for color, (name, history) in zip(plots.PALETTE, histories.items(), strict=False):
    curve = plots.smooth(history.losses, 6)
    ax.plot(curve, color=color, label=name)
ax.legend()
chapter.show(
    figure,
    "two-bits",
    alt="Training loss of four quantized models: QLoRA in two bits starts and stays far above the others, LoftQ in two bits closes most of the gap, two and four bits mixed more of it.",
)

# %% [markdown]
# In two bits QLoRA ends at {=f"{after['QLoRA, NF2']:.3f}"=} nats, LoftQ at {=f"{after['LoftQ, NF2']:.3f}"=}, the mixture at {=f"{after['LoftQ, 2 and 4 bits']:.3f}"=}, and plain QLoRA in four bits at
# {=f"{after['QLoRA, NF4']:.3f}"=}. The start is the same adapter that training then changes: repairing uses up part of it.
#
# ## What goes wrong in practice
#
# - **The scaling is ignored.** In peft the initializer returns $U\sqrt S$ and $\sqrt S V^T$ whatever $\alpha$ is, and the layer multiplies by $\alpha / r$ afterwards
#   ([peft 1982](https://github.com/huggingface/peft/issues/1982), closed without a repair). With $\alpha = 2r$ one step wins exactly nothing, as proved above.
# - **The error was larger than without LoftQ**, in documentation and tests, for a while ([peft 1532](https://github.com/huggingface/peft/pull/1532)): nobody had compared $\lVert W - (Q + s\,BA) \rVert$. It is one line, and here it is a law.
# - **Fake quantization.** If the base of the search is not, byte for byte, the base of the training, the adapter repairs an error that does not occur. The vectors of `loftq_init` hold the bytes.
# - **Eight bits of what?** `n_bits=8` was once taken for float8 where the base is int8 ([peft 3088](https://github.com/huggingface/peft/issues/3088)).
# - **`unload` gives the quantized layer.** That is the base now; whoever wants $W$ again must keep it.
#
# ## Exercises
#
# 1. A weight that the codes hold exactly needs no adapter. Show that LoftQ finds none, in any number of steps.

# %% tags=["solution"]
exact = blockwise.dequantize(blockwise.quantize(W))
q, initial = loftq.init(exact, 8, 16, steps=3)
print(
    "error",
    loftq.error(exact, q, initial),
    " update",
    np.abs(lora.delta(initial)).max(),
)
assert loftq.error(exact, q, initial) == 0

# %% [markdown]
# 2. How large must the rank be before LoftQ in two bits is as near to $W$ as plain NF3? What does that adapter cost, in bits per weight, at 16 bits for each of its entries?

# %% tags=["solution"]
goal = zero["NF3"]
for r in (16, 32, 64, 128, 192):
    error = loftq.error(W, *loftq.init(W, r, 2 * r, NF2, steps=3))
    cost = 16 * r * sum(W.shape) / W.size
    print(
        f"r {r:3d}: error {error:6.3f}, plain NF3 {goal:.3f}; the adapter costs {cost:.2f} bits per weight"
    )
    if error <= goal:
        break
assert error <= goal
assert cost > 1  # a third bit would have been cheaper

# %% [markdown]
# 3. Why not take the SVD first, as QPiSSA does, and quantize afterwards? Compare the Frobenius errors of both orders after one step.

# %% tags=["solution"]
from minipeft.reference import pissa

residual, principal = pissa.init(W, 16, 32)
svd_first = np.linalg.norm(
    W - blockwise.dequantize(blockwise.quantize(residual)) - lora.delta(principal)
)
quantize_first = loftq.error(W, *loftq.init(W, 16, 32, steps=1))
print(
    f"SVD first {svd_first:.3f}, quantize first {quantize_first:.3f}, neither {zero['NF4']:.3f}"
)
assert max(svd_first, quantize_first) < zero["NF4"]

# %% [markdown]
# ## References
#
# LoftQ is by Li and others [@li2023]; QLoRA, its base, by Dettmers and others [@dettmers2023]; QPiSSA, its sibling, by Meng, Wang and Zhang [@meng2024].
