# %% [markdown]
# # QLoRA: four bits at rest, sixteen at work
#
# QLoRA [@dettmers2023] joins the parts of the last chapters: [NF4](02_nf4.md) for the base, [double quantization](03_double_quant.md) for its scales,
# [LoRA](01_lora.md) for what is trained, [paging](05_paged.md) for the longest batches. Its authors fine-tuned a model of 65 billion parameters on one
# card with 48 GB. This chapter shows the layer, measures what it keeps in memory, and tests a claim that the paper suggests and others repeat: that the adapter repairs what
# quantization has damaged.

# %%

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from minipeft.lab import memory, models, plots, train
from minipeft.lab.chapter import start
from minipeft.reference import blockwise, lora, qlora
from minipeft.reference.codebook import NF2
from minipeft.torch.inject import adapter_state_dict, inject, load_adapter_state_dict
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.qlora import quantize_linears

chapter = start("06_qlora", steps=24, model="tiny")

# %% [markdown]
# ## The problem
#
# LoRA makes gradients and optimizer states small. What remains are the activations and the frozen base. The setting is that of
# [chapter 0](00_why.md): 7 billion parameters, four sequences of 512 tokens, adapters of rank 64. The second bar below stores the base in NF4 without double quantization.

# %%
ways = memory.ways_to_train()
nf4 = memory.Precision(memory.quantized_bits(4, 64) / 8, gradients=4, activations=2)
ways["LoRA on NF4"] = memory.training_memory(
    memory.LLAMA_7B, memory.COUNTED_TOKENS, memory.COUNTED_ADAPTER, nf4
)
order = ("LoRA on 16 bits", "LoRA on NF4", "QLoRA: LoRA on 4 bits")
chosen = {name: ways[name] for name in order}
for name, way in chosen.items():
    label = f"Llama 2 7B, 4 x 512 tokens, {name}"
    chapter.quantity(f"{label}: weights", way.weights / 1e9, "GB", 1)
    chapter.quantity(f"{label}: memory in all", way.total / 1e9, "GB", 1)
half, qlora_way = chosen["LoRA on 16 bits"], chosen["QLoRA: LoRA on 4 bits"]

# %% tags=["fold"]
chapter.show(
    plots.memory_bars(chosen),
    "memory",
    alt=f"Three stacked bars of the memory of a model of {memory.LLAMA_7B.parameters / 1e9:.1f} billion parameters under LoRA. The activations and the thin slices of gradients and optimizer are the same in all three. The weights are {half.weights / half.total:.0%} of the first bar, and {qlora_way.weights / half.weights:.0%} of that length in the last.",
    caption=f"Storing the base in four bits cuts the weights from {half.weights / 1e9:.1f} to {qlora_way.weights / 1e9:.1f} GB, and the sum from {half.total / 1e9:.1f} to {qlora_way.total / 1e9:.1f} GB. Double quantization saves the last {(chosen['LoRA on NF4'].total - qlora_way.total) / 1e9:.1f} GB of that.",
)

# %% [markdown]
# ## The formula
#
# $$ y = x\, \hat W^T + b + s\,(x A^T) B^T, \qquad \hat W_i = q_{c_i}\, \hat a_j . $$
#
# $\hat W$ is the weight that dequantizing returns: the value $q_{c_i}$ of each stored code times the decoded scale $\hat a_j$ of its block ([chapter 3](03_double_quant.md)).
#
# Nothing is computed in four bits. When a layer is used, its weight is decoded to 16 bits, multiplied, and dropped. The gradient of $x$ needs $\hat W$ once more,
# and it is decoded once more. The base gets no gradient; $A$ and $B$ do.
#
# ## The code
#
# @source minipeft.reference.qlora.forward
# @source minipeft.torch.qlora.QuantizedLinear
#
# @source minipeft.reference.qlora.backward
# @source minipeft.torch.qlora._Frozen
#
# In torch, any adapter but LoftQ's, which quantizes the layer itself, can be put on a `QuantizedLinear`. This function replaces the linear layers of a model:
#
# @source minipeft.torch.qlora.quantize_linears
#
# One function decodes both kinds of scales:
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
# Where else the adapter can be merged to, and what that costs, is measured in [the chapter on merging](16_merging.md).
#
# ## The experiment: what is kept until the backward pass
#
# Decoding the weight once more in the backward pass is what saves the memory. A simpler layer calls torch's `linear` on the decoded weight. Then autograd keeps that weight
# for the backward pass, and at the end of the forward pass every layer's is there at the same time. Four layers of width 1,024 in bfloat16, three ways:


# %%
def four_layers(quantized):
    """Four frozen layers, in 16 or in 4 bits."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    layers = layers.to(torch.bfloat16).requires_grad_(False)
    return quantize_linears(layers) if quantized else layers


def simple(layers, x):
    """Each layer through torch's own linear function, which keeps the weight."""
    for layer in layers:
        x = linear(x, layer.weight)
    return x


def weight_bytes(layers, forward):
    """Bytes of the layers at rest, and of weights that autograd keeps besides."""
    own = [*layers.parameters(), *layers.buffers()]
    rest = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    kept = {}

    def pack(tensor):
        if tensor.shape == (1024, 1024) and tensor.data_ptr() not in rest:
            kept[tensor.data_ptr()] = tensor.nbytes, tensor
        return tensor

    x = torch.randn(8, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(layers, x)
    y.sum().backward()
    return sum(rest.values()), sum(size for size, _ in kept.values()), x.grad


def whole(layers, x):
    """The layers as they are."""
    return layers(x)


WEIGHTS = 4 * 1024**2
found, gradients = {}, {}
for name, quantized, forward in (
    ("16 bits", False, whole),
    ("4 bits, decoded once", True, simple),
    ("4 bits, decoded twice", True, whole),
):
    layers = four_layers(quantized)
    rest, kept, gradients[name] = weight_bytes(layers, forward)
    found[name] = (rest + kept) / WEIGHTS
    print(
        f"{name:22s} {rest / WEIGHTS:.3f} bytes a weight at rest, {kept / WEIGHTS:.3f} kept besides"
    )
assert torch.equal(*[*gradients.values()][1:])
assert found["4 bits, decoded twice"] < found["16 bits"] < found["4 bits, decoded once"]

# %% tags=["fold"]
chapter.show(
    plots.bars(found, "bytes a weight, at the end of the forward pass"),
    "kept",
    alt=f"Three horizontal bars: a layer in 16 bits with {found['16 bits']:.2f} bytes a weight, a 4-bit layer whose decoded weight is kept with {found['4 bits, decoded once']:.2f}, and a 4-bit layer that decodes again with {found['4 bits, decoded twice']:.2f}.",
    caption=f"A 4-bit layer that keeps its decoded weight for the backward pass takes {found['4 bits, decoded once']:.2f} bytes a weight, more than a layer in 16 bits. Decoding again in the backward pass leaves {found['4 bits, decoded twice']:.2f}.",
)

# %% [markdown]
# Storing four bits does not save memory during training by itself. Decoding a second time does, and it changes no bit of the gradient. The price is time: each weight is decoded twice in a step.
#
# ## The experiment: does the adapter repair the base?
#
# Quantization makes the model a little worse, and training makes it better again. Does the adapter learn *around the errors* of its base? A falling loss does not show that: it falls on the
# unquantized base as well. The control is an adapter that has never seen the errors. Train one on each of three bases, and then put *each* adapter on *each* base: float32, NF4 with double
# quantization, and NF2, whose two bits damage a lot.

# %%
base = chapter.load()
batches, held_out = (
    chapter.task.training(base.tokenizer),
    chapter.task.held_out(base.tokenizer),
)
places = chapter.places(base.model)
CONFIG = LoRAConfig(r=8, alpha=16)
del base  # from here on each base is read when its turn comes: one at a time
BASES = {
    "float32": lambda: chapter.load().model,
    "NF4": lambda: quantize_linears(chapter.load().model),
    "NF2": lambda: quantize_linears(
        chapter.load().model, codebook=torch.from_numpy(NF2)
    ),
}
before, adapters = {}, {}
for name, make in BASES.items():
    model = make()
    before[name] = train.loss(model, held_out)
    torch.manual_seed(0)
    inject(model, CONFIG, places.linears)
    setting = train.TrainConfig(chapter.steps, lr=8e-3, warmup=3)
    train.train(model, batches, setting, checkpoint=chapter.kept())
    adapters[name] = {k: v.clone() for k, v in adapter_state_dict(model).items()}
    del model
chapter.quantity(chapter.before, before["float32"], "nats per token")
after = {}
print(f"{'base':8s} {'before':>7s}   with the adapter that was trained on")
print(f"{'':16s}   {'   '.join(f'{name:>7s}' for name in BASES)}")
for name, make in BASES.items():
    model = inject(make(), CONFIG, places.linears)
    for trained_on, state in adapters.items():
        load_adapter_state_dict(model, state)
        after[name, trained_on] = train.loss(model, held_out)
    losses = "   ".join(f"{after[name, other]:7.4f}" for other in BASES)
    print(f"{name:8s} {before[name]:7.4f}   {losses}")
    del model
damage = {name: before[name] - before["float32"] for name in BASES}
repair = {name: after[name, "float32"] - after[name, name] for name in BASES}
for name in ("NF4", "NF2"):
    print(
        f"{name}: damage {damage[name]:.4f}, repaired by its own adapter {repair[name]:.4f}"
    )
chapter.claim(
    "an adapter trained on NF2 repairs over a quarter of the damage of NF2",
    repair["NF2"] > damage["NF2"] / 4,
    control="the adapter trained on float32, put on the NF2 base",
)
chapter.claim(
    "of NF4's damage the adapter repairs under a fifth",
    abs(repair["NF4"]) < damage["NF4"] / 5,
    control="the adapter trained on float32, put on the NF4 base",
)
chapter.claim(
    "training gains more than ten times what NF4 costs",
    before["NF4"] - after["NF4", "NF4"] > 10 * damage["NF4"],
    control="both bases before training",
)

# %% [markdown]
# Read the table by rows. On the **NF2** base its own adapter reaches {=f"{after['NF2', 'NF2']:.3f}"=}, one that was trained on float32 only {=f"{after['NF2', 'float32']:.3f}"=}: the difference of
# {=f"{repair['NF2']:.2f}"=} nats is repair, about {=f"{repair['NF2'] / damage['NF2']:.0%}"=} of what two bits had cost. On the **NF4** base the two adapters differ by {=f"{repair['NF4']:.4f}"=} nats, where NF4 had cost
# {=f"{damage['NF4']:.4f}"=}. So at four bits the adapter repairs {=f"{repair['NF4'] / damage['NF4']:.0%}"=} of the damage in this run, and there is not much to repair: training gains {=f"{before['NF4'] - after['NF4', 'NF4']:.2f}"=} nats on NF4, and {=f"{before['float32'] - after['float32', 'float32']:.2f}"=} on float32.
#
# This is one seed, one learning rate and {=chapter.steps=} steps on a small model. The paper reports that on models of 7 to 65 billion parameters 4-bit training matches 16-bit training; it does not measure how much
# of that is repair.
#
# ## What goes wrong in practice
#
# - **Merged is not unmerged.** Merging an adapter into a 4-bit layer of peft means quantizing the sum again. peft warns of it; one user lost 6 points of AUC
#   ([peft 2321](https://github.com/huggingface/peft/issues/2321)). In another library the rounding all but erased a short training
#   ([mlx-tune 15](https://github.com/ARahim3/mlx-tune/issues/15)). [The chapter on merging](16_merging.md) measures how much of an update is left.
# - **A forward pass that destroys the weight.** On some processors, bitsandbytes' 4-bit layer repacks its weight at the first call in `eval()` mode. What is dequantized
#   or merged after that is noise. Here a law compares every byte of the base before and after.
# - **The wrong dtype for the scales.** `model.to(bfloat16)` must not change scales and codebook: they are part of a code, and not weights. The second exercise measures what the cast costs.
# - **The wrong decoder for the result.** axolotl called the NF4 decoder for bfloat16 where weights in float32 were asked for. It wrote values of two bytes where four bytes belong, and the weights were
#   [wrong](https://github.com/axolotl-ai-cloud/axolotl/pull/3799).
# - **A forgotten bias.** peft's 4-bit layers merge `lora_bias` without the scaling ([peft 3741](https://github.com/huggingface/peft/issues/3741)). With the default $\alpha = r$ the scaling is 1, and the fault does not show.
#
# ## Exercises
#
# 1. *The card of the paper.* LLaMA 65B has 80 layers of width 8,192, an MLP of 22,016, and 32,000 tokens. How much memory do its weights take under QLoRA, and with adapters of rank 64 and Adam?

# %% tags=["solution"]
llama_65b = memory.Architecture(80, 8192, 22016, 64, 64, 32000, 128, tied=False)
bits = memory.quantized_bits(4, 64, 256)
rest = llama_65b.parameters - llama_65b.linear_parameters
at_rest = llama_65b.linear_parameters * bits / 8 + 2 * rest
trained = memory.adapter_parameters(llama_65b, memory.COUNTED_ADAPTER)
print(
    f"base {at_rest / 1e9:.1f} GB, adapters, gradients, states {16 * trained / 1e9:.1f} GB"
)
print(f"with adapters in 16 bits: {(at_rest + 12 * trained) / 1e9:.1f} GB of 48")
assert at_rest + 12 * trained < 48e9 < 2 * llama_65b.parameters

# %% [markdown]
# 2. *Scales in sixteen bits.* Round the scales of a real matrix to bfloat16. How far does $\hat W$ move, beside the error that NF4 made already?

# %% tags=["solution"]
models.fetch("minilm")
W = models.minilm_weights()["encoder.layer.3.attention.self.query.weight"]
q = blockwise.quantize(W)
W_hat = blockwise.dequantize(q)
short = torch.from_numpy(q.absmax).bfloat16().float().numpy()
cast = blockwise.dequantize(
    blockwise.Blockwise(q.packed, short, q.codebook, q.blocksize, q.shape)
)
moved, error = (
    np.linalg.norm(d) / np.linalg.norm(W) for d in (cast - W_hat, W_hat - W)
)
print(f"the cast moves it by {moved:.2%} of the norm of W; NF4's error is {error:.1%}")
assert 0 < moved < error / 10
assert (cast != W_hat).mean() > 0.9  # but almost every weight is another one

# %% [markdown]
# 3. *Which weight does the gradient pass through?* Show with the reference that the gradient of $x$ is that of LoRA on $\hat W$ and not of LoRA on $W$.

# %% tags=["solution"]
grad_y, x = (rng.standard_normal((3, 384)).astype(np.float32) for _ in range(2))
A, B = (rng.standard_normal(s).astype(np.float32) for s in ((8, 384), (384, 8)))
update = lora.LoRA(A, B, 0.5)
ours = qlora.backward(grad_y, x, q, update).x
assert np.array_equal(ours, lora.backward(grad_y, x, W_hat, update).x)
off = np.linalg.norm(ours - lora.backward(grad_y, x, W, update).x) / np.linalg.norm(
    ours
)
print(f"the gradient of LoRA on W differs by {off:.1%}")
assert off > 0.001

# %% [markdown]
# ## References
#
# QLoRA is by Dettmers, Pagnoni, Holtzman and Zettlemoyer [@dettmers2023]. How to start an adapter so that it makes up for the errors of a base in two or three bits is the subject of [LoftQ](12_loftq.md).
