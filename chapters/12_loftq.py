# %% [markdown]
# # LoftQ: quantize with the adapter in mind
#
# QLoRA quantizes the base and starts its adapter at zero, so training begins at a model that quantization has made worse. In four bits the loss is small. In two bits it is large, and training has to
# make it good before it can gain anything. LoftQ [@li2023] repairs part of it *before* training: it looks for a quantized base and an adapter whose sum is near the weight.

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
from minipeft.torch.linear import weight_of
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.targets import layers

chapter = start("12_loftq", steps=24, model="tiny")
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
    label = f"MiniLM, query matrix of layer 3, {name}: norm of the error / norm"
    chapter.quantity(label, 100 * lost(W, values), "%", 1)
assert lost(W, NF2) > 4 * lost(W, NF4)

# %% [markdown]
# ## The formula
#
# Look for both at once: $\min_{Q, A, B} \lVert W - Q - s\,BA \rVert_F$, with $Q$ restricted to matrices that the codes can represent, and $BA$ to rank $r$.
# There is no formula for the answer. But with $Q$ fixed, the best $BA$ is known, and with $BA$ fixed, rounding to the codes, written $\mathrm{quant}$, gives a good $Q$. So alternate, beginning with $s\,BA = 0$:
#
# $$ Q_t = \mathrm{quant}(W - s\,B_{t-1} A_{t-1}), \qquad s\,B_t A_t = \mathrm{SVD}_r(W - Q_t). $$
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
# In torch the SVD is the randomized one. It finds a little less than the best adapter of rank $r$, and the next law holds for it as well. How much less?

# %%
for name in ("NF4", "NF2"):
    R_W = W - blockwise.dequantize(blockwise.quantize(W, BOOKS[name]))
    S = np.linalg.svd(R_W, compute_uv=False)
    exact = loftq.error(W, *loftq.init(W, 16, 32, BOOKS[name], steps=1))
    found = loftq_torch.init(
        torch.from_numpy(W), 16, 32, getattr(codebook, name), steps=1
    )
    excess = float(loftq_torch.error(torch.from_numpy(W), *found)) / exact - 1
    print(
        f"{name}: 16 of 384 directions hold {np.square(S[:16]).sum() / np.square(S).sum():.1%} of the squared error; randomized, the error after a step is {excess:.2%} larger"
    )
    assert 0 <= excess < 0.02

# %% [markdown]
# ## The proof
#
# *One step is never worse than plain quantization.* The SVD is the best approximation of rank $r$ [@eckart1936], and zero is one of those it could have returned. A randomized SVD returns
# $P P^T (W - Q)$ with orthonormal $P$: a projection, which can only shorten what it is taken from.
#
# *More steps are never worse*, but only because `init` keeps the best. In the alternation alone the error can rise. Its second half, the SVD, is the best adapter for the given $Q$. Its first half is not the best $Q$ for the
# given adapter: it rounds to the codes of each block's own absmax, and a block whose absmax has grown is rounded to coarser steps. That may lose more than the SVD has won. A search finds such cases within a few draws:


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
# *Any scaling gives the same error*, because the adapter divides by it. And if that division is left out? Write $R = W - Q = \sum_i \sigma_i u_i v_i^T$, with the singular values $\sigma_i$ and the singular vectors $u_i$ and $v_i$. An adapter that
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
# The same matrix, three codebooks, {=STEPS=} steps, rank 16. Strong lines show the best so far. A faint line shows the alternation as it runs; it is seen only where it rises again, above the last points of NF2.

# %%
STEPS, FIVE = 8, 5
curves = {name: raw_errors(W, 16, values, 64, STEPS) for name, values in BOOKS.items()}
kept = {name: np.minimum.accumulate(c) for name, c in curves.items()}
zero = {name: lost(W, values) * np.linalg.norm(W) for name, values in BOOKS.items()}
for name in BOOKS:
    print(
        f"{name}: plain {zero[name]:.3f}, after 1 step {kept[name][0]:.3f}, after {FIVE} {kept[name][FIVE - 1]:.3f}"
    )
    assert all(after <= before for before, after in pairwise(kept[name]))
    won = -np.diff([zero[name], *kept[name]])
    assert won.argmax() == 0  # no later step wins as much

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
    alt=f"Error of LoftQ relative to plain quantization over {STEPS} steps for NF4, NF3 and NF2: a large first drop for each, then a slower descent.",
    caption=f"The first step removes {100 - 100 * kept['NF4'][0] / zero['NF4']:.0f} % of NF4's error and {100 - 100 * kept['NF2'][0] / zero['NF2']:.0f} % of NF2's; the next {FIVE - 1} remove {100 * (kept['NF4'][0] - kept['NF4'][FIVE - 1]) / zero['NF4']:.0f} % and {100 * (kept['NF2'][0] - kept['NF2'][FIVE - 1]) / zero['NF2']:.0f} % more.",
)

# %% [markdown]
# The first step is the SVD of what plain quantization lost, and no later step wins as much. Five steps (the paper compares 1, 5 and 10) leave {=f"{100 * kept['NF4'][4] / zero['NF4']:.0f}"=} % of the error of NF4
# and {=f"{100 * kept['NF2'][4] / zero['NF2']:.0f}"=} % of that of NF2.
#
# ## The experiment: two bits
#
# Now a whole model. Every linear layer of `tiny` goes to NF2, blocks of 64, with adapters of rank 16. What is the loss *before any training*, on
# prose in the manner that it was trained on (*Persuasion*, the one of Austen's six novels that it has not read) and on the task (Bierce)?

# %%
base = chapter.load()
tokenizer = base.tokenizer
batches, held_out = (
    chapter.task.training(tokenizer, rows=6),
    chapter.task.held_out(tokenizer),
)
novel = text.encode(tokenizer, [data.austen(data.HELD_OUT)[:20_000]])
austen = text.consecutive(novel, (16, 128), text.opening(tokenizer))
places = chapter.places(base.model)
R = 16


def qlora(values):
    """Quantize every linear layer and inject a LoRA that starts at zero."""
    model = copy.deepcopy(base.model)
    for name, layer in layers(model, places.linears).items():
        model.set_submodule(name, QuantizedLinear.from_linear(layer, values))
    return inject(model, LoRAConfig(r=R, alpha=2 * R), places.linears)


def with_loftq(values, steps=5, plan=None):
    """Start base and adapter together."""
    config = LoftQConfig(R, 2 * R, values, steps=steps, codebooks=plan or {})
    return inject(copy.deepcopy(base.model), config, places.linears)


LINEAR = {
    name: weight_of(layer).detach()
    for name, layer in layers(base.model, places.linears).items()
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
    name: (train.loss(model, austen), train.loss(model, held_out))
    for name, model in candidates.items()
}
print("before training        Austen   Bierce")
for name, values in loss.items():
    print(f"{name:20s}   {values[0]:6.3f}   {values[1]:6.3f}")
chapter.quantity(chapter.before, loss["32 bits"][1], "nats per token")
for name in ("NF4", "NF2"):
    chapter.claim(
        f"LoftQ in {name} starts nearer to the model in 32 bits",
        loss[f"LoftQ, {name}"][0] < loss[f"QLoRA, {name}"][0],
        control=f"QLoRA in {name}, whose adapter starts at zero",
    )

# %% [markdown]
# Four bits cost {=f"{loss['QLoRA, NF4'][0] - loss['32 bits'][0]:.3f}"=} nats on Austen, two bits {=f"{loss['QLoRA, NF2'][0] - loss['32 bits'][0]:.3f}"=}. LoftQ wins back
# {=f"{100 * (loss['QLoRA, NF2'][0] - loss['LoftQ, NF2'][0]) / (loss['QLoRA, NF2'][0] - loss['32 bits'][0]):.0f}"=} % of what two bits lost. Its start is computed from the weights alone, without any text.
#
# The last row mixes. With an average of three bits per weight to spend, {=len(mixed)=} of {=len(LINEAR)=} layers get four and the others two. The paper gives four to the
# first layers of the model; here they go to the layers where two more bits remove most error for each value.
#
# @source minipeft.reference.loftq.plan
# @source minipeft.torch.loftq.plan
#
# Then training, with the same batches for all, and three rates for each start. An adapter that already contains part of the repair may need a smaller rate.

# %%
SWEEPS = {
    "QLoRA, NF4": (3e-3, 1e-2, 3e-2),
    "QLoRA, NF2": (3e-3, 1e-2, 3e-2),
    "LoftQ, NF2": (1e-3, 3e-3, 1e-2),
    "LoftQ, 2 and 4 bits": (1e-3, 3e-3, 1e-2),
}
histories, after = {}, {}
for name, rates in SWEEPS.items():
    tried = {}
    for lr in rates:
        torch.manual_seed(0)
        setting = train.TrainConfig(chapter.steps, lr=lr, warmup=chapter.steps // 10)
        model = copy.deepcopy(candidates[name])
        tried[lr] = train.train(model, batches, setting, held_out, chapter.kept())
    losses = {lr: history.validation[-1][1] for lr, history in tried.items()}
    rate = chapter.best(name, losses)
    histories[name], after[name] = tried[rate], losses[rate]
for name in SWEEPS:
    print(f"{name:20s}   {loss[name][1]:.3f} before, {after[name]:.3f} after")
gain = {name: loss[name][1] - after[name] for name in SWEEPS}
chapter.claim(
    "in two bits LoftQ ends ahead",
    after["LoftQ, NF2"] < after["QLoRA, NF2"],
    control="QLoRA in two bits at its own best rate",
)
chapter.claim(
    "QLoRA trains in two bits as well",
    gain["QLoRA, NF2"] > 0,
    control="the same model before training",
)

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="training loss (nats per token)", size=(6.4, 3.4))
for color, (name, history) in zip(plots.PALETTE, histories.items(), strict=False):
    curve = plots.smooth(history.losses, 6)
    ax.plot(np.arange(1, len(curve) + 1), curve, color=color, label=name)
ax.legend()
ends = {name: plots.smooth(h.losses, 6)[-1] for name, h in histories.items()}
chapter.show(
    figure,
    "two-bits",
    alt=f"Training loss over the steps of four quantized models, each at its best rate. All lines fall. At the last step, from the highest to the lowest: {'; '.join(sorted(ends, key=ends.get, reverse=True))}.",
    caption=f"In two bits QLoRA ends at {after['QLoRA, NF2']:.2f} nats on the held-out definitions and LoftQ at {after['LoftQ, NF2']:.2f}; two and four bits mixed reach {after['LoftQ, 2 and 4 bits']:.2f}, four bits {after['QLoRA, NF4']:.2f}.",
)

# %% [markdown]
# In two bits QLoRA ends at {=f"{after['QLoRA, NF2']:.3f}"=} nats, LoftQ at {=f"{after['LoftQ, NF2']:.3f}"=}, the mixture at {=f"{after['LoftQ, 2 and 4 bits']:.3f}"=}, and plain QLoRA in four bits at
# {=f"{after['QLoRA, NF4']:.3f}"=}. LoftQ begins {=f"{loss['QLoRA, NF2'][1] - loss['LoftQ, NF2'][1]:.2f}"=} nats ahead of QLoRA and ends {=f"{after['QLoRA, NF2'] - after['LoftQ, NF2']:.2f}"=} ahead: training repairs the damage of two bits too, and gains {=f"{gain['QLoRA, NF2']:.2f}"=} nats on it, against {=f"{gain['LoftQ, NF2']:.2f}"=} for LoftQ. Neither
# adapter of rank 16 makes good what two bits lose. The paper reports that QLoRA in two bits did not converge on Llama 2; on `tiny` it did. (One seed, {=chapter.steps=} steps.)
#
# ## What goes wrong in practice
#
# - **The scaling is ignored.** In peft the initializer returns $U\sqrt S$ and $\sqrt S V^T$ whatever $\alpha$ is, and the layer multiplies by $\alpha / r$ afterwards
#   ([peft 1982](https://github.com/huggingface/peft/issues/1982), closed without a repair). With $\alpha = 2r$ one step wins exactly nothing, as derived above.
# - **The error was larger than without LoftQ.** The documentation of peft showed a wrong way to use it, and so did the tests; once the tests took the right way, most of them failed, because the error was larger than without LoftQ
#   ([peft 1532](https://github.com/huggingface/peft/pull/1532)). One line computes $\lVert W - (Q + s\,BA) \rVert$, and here it is a law that LoftQ makes it no larger.
# - **Fake quantization.** If the base that LoftQ searched with is not, byte for byte, the base that is trained, the adapter repairs the errors of another base. The golden vectors of `loftq_init` hold the bytes of the base.
# - **Eight bits of what?** `n_bits=8` was once taken for float8 where the base is int8 ([peft 3088](https://github.com/huggingface/peft/pull/3088)).
# - **`unload` gives the quantized layer.** That is the base now; keep $W$ elsewhere if you need it again.
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
# 3. Why not take the SVD first, as QPiSSA does, and quantize afterwards? Compare the Frobenius errors of both orders after one step. (The smaller error need not train better: in the paper's table 6, quantizing first does.)

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
