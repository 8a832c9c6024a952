# %% [markdown]
# # QLoRA: four bits at rest, sixteen at work
#
# All parts are on the table: [NF4](02_nf4.md) for the base, [double quantization](03_double_quant.md) for its scales,
# [LoRA](01_lora.md) for what is trained, [paging](05_paged.md) for the spikes. QLoRA [@dettmers2023] puts them together, and a model that needed a rack
# fits on one card. Putting them together takes one line of code. The questions begin after training, when the adapter should go back into a base that
# has only sixteen values to say what it learned.

# %%
import copy

import numpy as np
import torch

from minipeft.lab import data, models, plots, text, train
from minipeft.lab.chapter import start
from minipeft.lab.memory import (
    LLAMA_7B,
    Adapter,
    Precision,
    quantized_bits,
    training_memory,
)
from minipeft.reference import blockwise, double_quant, lora, qlora
from minipeft.torch import qlora as qlora_torch
from minipeft.torch.inject import (
    adapted,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    merge,
    unload,
)
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import quantize_linears

chapter = start("06_qlora", steps=24, model="tiny")

# %% [markdown]
# ## The problem
#
# LoRA made gradients and optimizer state small. The frozen base is what is left:

# %%
TOKENS = (1, 512)
half, adapter = {"gradients": 4, "activations": 2}, Adapter(r=64)
MEMORY = {
    "everything, 16 bits": training_memory(
        LLAMA_7B, TOKENS, None, Precision(2, 2, 8, 2)
    ),
    "LoRA, 16 bits": training_memory(LLAMA_7B, TOKENS, adapter, Precision(2, **half)),
    "LoRA, NF4": training_memory(LLAMA_7B, TOKENS, adapter, Precision(4.5 / 8, **half)),
    "QLoRA": training_memory(
        LLAMA_7B, TOKENS, adapter, Precision(quantized_bits(4, 64, 256) / 8, **half)
    ),
}
for name, memory in MEMORY.items():
    print(
        f"{name:20s} weights {memory.weights / 1e9:5.1f} GB, in all {memory.total / 1e9:5.1f} GB"
    )
assert MEMORY["QLoRA"].total < MEMORY["LoRA, 16 bits"].total / 1.5

# %% tags=["fold"]
chapter.show(
    plots.memory_bars(MEMORY, "7 billion parameters, one sequence of 512 tokens"),
    "memory",
    alt="Stacked bars of the memory of a 7-billion-parameter model. Training everything needs several times the rest; with LoRA the weights are nearly the whole bar, and QLoRA cuts them to a third.",
)

# %% [markdown]
# ## The formula
#
# $$ y = x\, \hat W^T + b + s\,(x A^T) B^T, \qquad \hat W = \operatorname{dequantize}(q). $$
#
# Nothing is computed in four bits. When a layer is used, its weight is decoded to 16 bits, multiplied, and forgotten. The gradient of $x$ needs $\hat W$ once more,
# and it is decoded once more: keeping it would keep the whole base in 16 bits. The base gets no gradient, $A$ and $B$ do.
#
# ## The code
#
# @source minipeft.reference.qlora.forward
# @source minipeft.torch.qlora.QuantizedLinear
#
# @source minipeft.reference.qlora.backward
# @source minipeft.torch.qlora._Frozen
#
# In torch, any adapter can sit on a `QuantizedLinear`. A model is prepared by replacing its linear layers:
#
# @source minipeft.torch.qlora.quantize_linears
#
# Both kinds of scales:
#
# @source minipeft.reference.qlora.dequantize
#
# ## The proof
#
# - **It is LoRA on $\hat W$,** in every bit of output and gradients.
# - **Gradients go to $x$, $A$ and $B$ only.** On small integers they equal exact differences of the loss. After training, every byte of the base is as before.
# - **Merging into $\hat W$ is exact,** bit for bit where all sums are exact, and up to counted roundings elsewhere.

# %%
rng = np.random.default_rng(0)
EVEN = np.arange(-8, 8, dtype=np.float32) / 8  # a codebook whose values are exact
q = blockwise.Blockwise(
    blockwise.pack(rng.integers(0, 16, 5 * 12).astype(np.uint8), 4),
    np.full(15, 16, np.float32),
    EVEN,
    4,
    (5, 12),
)
x, A, B = (
    rng.integers(-8, 9, shape).astype(np.float32)
    for shape in ((3, 12), (2, 12), (5, 2))
)
update = lora.LoRA(A, B, 0.5)
merged = qlora.merge(q, update)
assert np.array_equal(qlora.forward(x, q, update), x @ merged.T)
print("merged into the dequantized weight: the same output, bit for bit")

# %% [markdown]
# ## The experiment: does the base suffer?
#
# `tiny` learns the *Devil's Dictionary* three times: on its float32 base, on NF4, and on NF4 with double quantization.

# %%
base = models.load(chapter.model, chapter.device)
pairs = {
    split: [(entry.prompt, entry.answer) for entry in data.devils_dictionary(split)]
    for split in ("train", "validation")
}
batches = text.examples(base.tokenizer, pairs["train"], (6, 64), seed=0)
held_out = text.example_batches(base.tokenizer, pairs["validation"], (25, 64))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LoRAConfig(r=8, alpha=16)


def quantized(nested_blocksize):
    """A copy of the base in four bits."""
    return quantize_linears(
        copy.deepcopy(base.model), nested_blocksize=nested_blocksize
    )


BASES = {
    "float32": lambda: copy.deepcopy(base.model),
    "NF4": lambda: quantized(None),
    "NF4, double": lambda: quantized(256),
}
trained, before, after = {}, {}, {}
for name, make in BASES.items():
    model = make()
    before[name] = train.loss(model, held_out)
    torch.manual_seed(0)
    inject(model, CONFIG, LINEARS)
    setting = train.TrainConfig(chapter.steps, lr=5e-3, warmup=3)
    after[name] = train.train(model, batches, setting, held_out).validation[-1][1]
    trained[name] = model
    print(
        f"{name:12s} validation loss {before[name]:.4f} before, {after[name]:.4f} after"
    )
damage = before["NF4"] - before["float32"]
remaining = after["NF4"] - after["float32"]
assert all(after[name] < before[name] - 0.1 for name in BASES)
assert remaining < damage

# %% [markdown]
# Quantization costs {=f"{damage:.4f}"=} nats before training and {=f"{remaining:.4f}"=} after it, while training gains {=f"{before['NF4'] - after['NF4']:.2f}"=}. This is
# the claim of the paper in miniature: the adapter is trained *on the quantized base* and learns around its errors. In these few steps {=f"{100 * (1 - remaining / damage):.0f}"=} % of the damage is repaired on the way, and the second
# level of quantization costs {=f"{abs(after['NF4, double'] - after['NF4']):.4f}"=} nats more. One seed and a small model; the paper compares models of up to 65 billion parameters.
#
# ## Three places to merge into
#
# @source minipeft.reference.qlora.merge
# @source minipeft.torch.qlora.merge
#
# @source minipeft.reference.qlora.requantize
#
# The adapter was trained beside $\hat W$. Where should it go?
#
# 1. Into the **dequantized** weight, $\hat W + s\,BA$. Exactly the function that was trained, but in 16 or 32 bits: the savings are gone.
# 2. **Requantized** to four bits. Small again, and rounded again.
# 3. Into the **original** weight, $W + s\,BA$. No rounding at all, but the adapter meets a base it has never seen.


# %%
def requantized(model):
    """Every adapted layer as four bits."""
    model = copy.deepcopy(model)
    for name, layer in adapted(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            attribute,
            qlora_torch.merge(layer, "requantized"),
        )
    return model


def on_original(model):
    """The trained adapters on the weights before quantization, merged."""
    fresh = inject(copy.deepcopy(base.model), CONFIG, LINEARS)
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    return unload(merge(fresh))


source = trained["NF4, double"]
MERGES = {
    "not merged": source,
    "dequantized": unload(merge(copy.deepcopy(source))),
    "original": on_original(source),
    "requantized": requantized(source),
}
losses = {name: train.loss(model, held_out) for name, model in MERGES.items()}
for name, value in losses.items():
    print(f"{name:12s} validation loss {value:.4f}")
assert abs(losses["dequantized"] - losses["not merged"]) < 1e-3
kept = (before["NF4, double"] - losses["requantized"]) / (
    before["NF4, double"] - losses["not merged"]
)
print(f"requantizing keeps {kept:.0%} of what training gained")
assert losses["requantized"] > losses["dequantized"]

# %% [markdown]
# The dequantized merge is the trained model. The original weights are {=f"{abs(losses['original'] - losses['not merged']):.4f}"=} nats away from it, {='better' if losses['original'] < losses['not merged'] else 'worse'=} here: NF4 is close to them, so the stranger
# is nearly an old friend. The requantized model loses {=f"{losses['requantized'] - losses['not merged']:.4f}"=} nats. Why not more, and when is it more?
#
# ## The experiment: how small updates vanish
#
# Take one matrix of MiniLM in NF4, add an update of rank 8 and of a chosen size, quantize again, and look at what has *really* been added. Does it
# point in the direction of the update?

# %%
models.fetch("minilm")
W = models.minilm_weights()["encoder.layer.3.attention.self.query.weight"]
q = blockwise.quantize(W)
what = blockwise.dequantize(q)
A, B = (
    rng.standard_normal((8, 384)).astype(np.float32),
    rng.standard_normal((384, 8)).astype(np.float32),
)
unit = np.linalg.norm(W) / np.linalg.norm(B @ A)


def cosine(a, b):
    """Of the angle between two matrices."""
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


SIZES = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
cosines, moved = [], []
for size in SIZES:
    update = lora.LoRA(A, B, float(size * unit))
    again = qlora.requantize(q, update)
    effect = blockwise.dequantize(again) - what
    cosines.append(cosine(effect, lora.delta(update)) if effect.any() else 0.0)
    moved.append(
        np.mean(
            blockwise.unpack(again.packed, 4, W.size)
            != blockwise.unpack(q.packed, 4, W.size)
        )
    )
    print(
        f"update {size:5.3f} of the norm of W: {moved[-1]:6.1%} of the codes move, cosine {cosines[-1]:.2f}"
    )
assert cosines[2] < 0.3 < 0.9 < cosines[5]
sizes = [
    float(layer.delta().detach().norm() / layer.W.norm())
    for layer in adapted(source).values()
]
print(f"updates trained above: {min(sizes):.2f} to {max(sizes):.2f} of the norm of W")

# %% tags=["fold"]
figure, ax = plots.axes(
    x="norm of the update / norm of the weight",
    y="cosine with the intended update",
    size=(6.4, 3.4),
)
ax.axvspan(min(sizes), max(sizes), color=plots.FAINT, alpha=0.7, linewidth=0)
ax.plot(SIZES, cosines, "o-", color=plots.PALETTE[0])
ax.text(
    min(sizes) * 0.9,
    0.97,
    "the updates\ntrained above",
    color=plots.INK,
    va="top",
    ha="right",
)
ax.set(xscale="log", ylim=(-0.03, 1.05), xlim=(SIZES[0], 1))
ax.set_xticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
ax.minorticks_off()
chapter.show(
    figure,
    "vanish",
    alt="Cosine between the update that was intended and the change that four bits let through, against the size of the update: near zero for updates of a hundredth of the weight, rising steeply around a tenth, near one for updates as large as the weight. A band marks the sizes of the updates trained above, on the steep part.",
)

# %% [markdown]
# A code moves when the update reaches a boundary between two codes. One that is a hundredth of the weight moves {=f"{moved[2]:.1%}"=} of the codes, and what comes out
# has a cosine of {=f"{cosines[2]:.2f}"=} with what was meant: mostly noise. At a tenth it is {=f"{cosines[4]:.2f}"=}, at three tenths {=f"{cosines[5]:.2f}"=}. The short training above, at a
# high rate, made updates of {=f"{np.median(sizes):.2f}"=} of the norm in the median, which is why so much of it survived. A gentler one would have vanished. So keep the adapter apart, or merge into 16 bits.
#
# ## What goes wrong in practice
#
# - **Merged is not unmerged.** Merging an adapter into a 4-bit layer of peft means requantizing. Reports that the merged model answers differently are many
#   ([peft 2321](https://github.com/huggingface/peft/issues/2321), [2105](https://github.com/huggingface/peft/issues/2105)); the three targets are three different models.
# - **Unmerging does not restore.** Subtract the update from a requantized weight, quantize again, and the base has drifted; after eleven such cycles its error is
#   several times that of the quantization. The second exercise measures it. Our layers keep the base, and never write to it.
# - **A forward pass that destroys the weight.** On some processors, bitsandbytes' 4-bit layer repacks its weight at the first call in `eval()` mode. What is dequantized
#   or merged after that is noise. Here a law compares every byte of the base before and after.
# - **The wrong dtype for the scales.** `model.to(bfloat16)` must not touch scales and codebook: they are no weights. A decoder for 16 bits that met float32 state gave
#   [garbage](https://github.com/axolotl-ai-cloud/axolotl/pull/3799).
# - **A forgotten bias.** peft's 4-bit layers merge `lora_bias` without the scaling ([peft 3741](https://github.com/huggingface/peft/issues/3741)); with the default $\alpha = r$ nobody sees it.
#
# ## Exercises
#
# 1. *An update that vanishes entirely.* Make one that changes no code at all, though it is not zero.

# %% tags=["solution"]
small = lora.LoRA(A, B, float(1e-5 * unit))
again = qlora.requantize(q, small)
assert lora.delta(small).any()
assert np.array_equal(again.packed, q.packed)
print("not one of", W.size, "codes moved")

# %% [markdown]
# 2. *Merge and unmerge.* Merge an update of a tenth of the norm into four bits, subtract it again in four bits, eleven times. How far is the base from where it began, in units of the error
#    that quantization made at first?

# %% tags=["solution"]
update, undo = lora.LoRA(A, B, float(0.1 * unit)), lora.LoRA(A, B, float(-0.1 * unit))
drifting, first_error, drift = q, np.linalg.norm(what - W), []
for _ in range(11):
    drifting = qlora.requantize(qlora.requantize(drifting, update), undo)
    drift.append(np.linalg.norm(blockwise.dequantize(drifting) - what) / first_error)
print("drift / first error, after each cycle:", np.round(drift, 2))
assert drift[-1] > drift[0] > 0.3

# %% [markdown]
# 3. *Nested or not?* Requantize the same update with double quantization. Does the second level change what survives?

# %% tags=["solution"]
n = double_quant.quantize(W)
effect = qlora.dequantize(qlora.requantize(n, update)) - qlora.dequantize(n)
print(f"cosine {cosine(effect, lora.delta(update)):.3f} nested, {cosines[4]:.3f} plain")
assert abs(cosine(effect, lora.delta(update)) - cosines[4]) < 0.05

# %% [markdown]
# ## References
#
# QLoRA is by Dettmers, Pagnoni, Holtzman and Zettlemoyer [@dettmers2023]. What to do when four bits are too few for the base is the subject of [LoftQ](12_loftq.md).
