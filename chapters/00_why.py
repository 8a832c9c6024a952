# %% [markdown]
# # Why not train everything?
#
# Fine-tuning takes a model that can write and teaches it to write *your* way. The direct
# method is to go on training: all weights, the same loop, new text. It works, and for
# a model that fits a GPU comfortably at inference it usually does not fit at all. This
# chapter counts why. Every later chapter removes one of the things counted here.

# %%
import torch

from minipeft.lab import memory, models, plots
from minipeft.lab.chapter import start

chapter = start("00_why", steps=1, model="tiny")

# %% [markdown]
# ## What a training step keeps
#
# Between its forward pass and the optimizer's step, training with Adam holds four things.
#
# | what | how many numbers | when it is needed |
# |---|---|---|
# | **weights** | one per parameter | always |
# | **gradients** | one per *trained* parameter | from the backward pass to the step |
# | **optimizer states** | two per *trained* parameter: running means of the gradient and of its square | always |
# | **activations** | grows with batch × sequence length × layers | from the forward pass to the backward pass |
#
# The backward pass is the reason for the last row. A linear layer $y = x W^T$ returns
#
# $$ \frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial y}\Big)^{\!T} x, \qquad
# \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\, W, $$
#
# and the first of these needs the layer's input $x$ again. If $W$ is frozen, it does not: the
# gradient passes through, and $x$ may be forgotten.
#
# @source minipeft.reference.linear.forward
#
# @source minipeft.reference.linear.backward
#
# @source minipeft.reference.linear.check_fits
#
# ## Counting on a model that is here
#
# `tiny` is this book's own model: the architecture of Llama with about a million
# parameters, trained on five novels of Jane Austen. Small enough for any laptop, real enough to
# count on. First the parameters, by name.

# %%
tiny = models.load(chapter.model, chapter.device)
architecture = memory.Architecture.of(tiny.model)
counted = sum(p.numel() for p in tiny.model.parameters())
print(
    f"{architecture.layers} layers, width {architecture.width}, {architecture.vocabulary} tokens"
)
print(f"parameters counted: {counted:,}; by the formula: {architecture.parameters:,}")
assert counted == architecture.parameters
for name, (out_features, in_features) in architecture.linears.items():
    print(f"  {name:10s} {out_features:4d} x {in_features:4d}")

# %% [markdown]
# Now the activations. torch tells what it saves for the backward pass to anyone who
# asks, through a pair of hooks. Summed over distinct tensors, without the weights themselves, this
# is the fourth row of the table, measured.

# %%
batch, length = 4, 128


def saved_bytes(model):
    """Bytes that autograd keeps from one forward pass, weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # kept alive: no reuse
        return tensor

    tokens = torch.randint(
        3, architecture.vocabulary, (batch, length), device=model.device
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return sum(size for size, _ in seen.values())


measured = saved_bytes(tiny.model)
predicted = memory.activation_memory(architecture, (batch, length))
print(f"measured {measured:,} bytes, by the formula {predicted:,} bytes")
assert abs(measured / predicted - 1) < 0.01

# %% [markdown]
# The formula counts every tensor of a block: norms, queries, keys, values, the gate. It is written out where it is
# computed.
#
# @source minipeft.lab.memory.activation_memory
#
# For this small model and this batch of {=batch=} × {=length=} tokens the sum is:

# %%
full = memory.training_memory(architecture, (batch, length))
for part in ("weights", "gradients", "optimizer", "activations"):
    print(f"{part:12s} {getattr(full, part) / 1e6:7.2f} MB")
print(
    f"{'total':12s} {full.total / 1e6:7.2f} MB, {full.total / full.weights:.1f} times the weights"
)

# %% [markdown]
# ## The same count at 7 billion
#
# The sizes of Llama 2 7B, a batch of four sequences of 512 tokens, and four ways to train it. The dashed line is
# what one common GPU has.

# %%
llama = memory.LLAMA_7B
for name, size in vars(llama).items():
    print(f"{name:15s} {size!s:>6s}")
tokens = (4, 512)
half = {"gradients": 2.0, "activations": 2}
adapter = memory.Adapter(r=16)
nf4 = memory.quantized_bits(4, 64) / 8
nested = memory.quantized_bits(4, 64, 256) / 8
ways = {
    "everything, 32 bits": memory.training_memory(llama, tokens),
    "everything, 16 bits": memory.training_memory(
        llama, tokens, None, memory.Precision(2, states=12, **half)
    ),
    "LoRA on 16 bits": memory.training_memory(
        llama, tokens, adapter, memory.Precision(2, **half)
    ),
    "QLoRA: LoRA on 4 bits": memory.training_memory(
        llama, tokens, adapter, memory.Precision(nested, **half)
    ),
}
for name, way in ways.items():
    print(f"{name:22s} {way.total / 1e9:6.1f} GB")
assert ways["QLoRA: LoRA on 4 bits"].total < 24e9 < ways["LoRA on 16 bits"].total
thin = memory.lora_parameters(llama, adapter) / llama.parameters
print(f"LoRA of rank {adapter.r} trains {thin:.1%} of the parameters")
long = memory.training_memory(
    llama, (4, 4096), adapter, memory.Precision(nested, **half)
)
assert long.total > 24e9  # what fits at 512 tokens fails at 4,096

# %% tags=["fold"]
figure = plots.memory_bars(ways)
ax = figure.axes[0]
ax.axvline(24, color=plots.INK, linestyle="--", linewidth=1)
ax.text(25.5, -0.62, "24 GB: one GPU", color=plots.INK, va="center")
chapter.show(
    figure,
    "memory",
    alt="Stacked bars of memory for a 7B model. Training everything takes above 100 GB, mostly optimizer states and gradients; LoRA removes both and leaves weights and activations; QLoRA shrinks the weights and ends below the dashed line at 24 GB.",
)

# %% [markdown]
# Read the bars from the top. In 32 bits the gradients are as large as the weights, and Adam's two states twice as
# large. Sixteen bits save less than one expects, because the states and a master copy of the weights stay in 32.
# Then the picture changes:
#
# - **LoRA** trains {=f"{memory.lora_parameters(llama, adapter) / 1e6:.0f}"=} million numbers instead of
#   {=f"{llama.parameters / 1e9:.2f}"=} billion. Gradients and states all but vanish. Weights and activations remain.
# - **QLoRA** keeps the frozen weights in {=f"{8 * nested:.3f}"=} bits each. The column fits the GPU.
#
# What remains is mostly activations, and they have a remedy of their own that needs no new mathematics: recompute
# them (gradient checkpointing).
#
# ## The published number
#
# QLoRA's paper opens with a figure: fine-tuning a model of 65 billion parameters takes "more than 780 GB". That is twelve bytes per
# parameter: 2 for the weight, 2 for the gradient, 8 for Adam.

# %%
print(f"65e9 parameters x 12 bytes = {65e9 * 12 / 1e9:.0f} GB")
assert 65e9 * (2 + 2 + 8) == 780e9
assert round(24 * 2**30 / 1e9) == 26

# %% [markdown]
# ## What goes wrong in practice
#
# - **"LoRA trains {=100 * thin:.1f=} % of the parameters, so it needs {=100 * thin:.1f=} % of the memory."** It needs {=100 * thin:.1f=} % of *two of the four rows*.
# - **Activations forgotten.** They grow with the batch and the sequence, the other rows do not. A run that fits at 512 tokens fails at
#   4,096, and no adapter changes that.
# - **Counting gigabytes in two units.** 26 GB and 24 GiB are the same. This book counts in powers of ten.
#
# ## Exercises
#
# 1. From what sequence length on do the activations of LoRA outweigh the 16-bit weights, at batch 1?

# %% tags=["solution"]
weights = ways["LoRA on 16 bits"].weights
crossing = next(
    n
    for n in range(64, 65536, 64)
    if memory.activation_memory(llama, (1, n), adapter, 2) > weights
)
print(f"from about {crossing} tokens on")
assert 1000 < crossing < 20000

# %% [markdown]
# 2. Eight-bit optimizer states take 2 bytes a parameter instead of 8. How much does that save when everything is
#    trained, and how much under LoRA?

# %% tags=["solution"]
for name, trained in (
    ("everything", llama.parameters),
    ("LoRA, r = 16", memory.lora_parameters(llama, adapter)),
):
    print(f"{name:13s} saves {trained * 6 / 1e9:.2f} GB")
assert llama.parameters * 6 > 40e9

# %% [markdown]
# ## References
#
# Adam's two states are from Kingma and Ba [@kingma2014]. The 780 GB are from QLoRA [@dettmers2023], the idea of training a
# low-rank update from LoRA [@hu2021].
