# %% [markdown]
# # Why not train everything?
#
# Fine-tuning takes a model that can write and teaches it to write *your* way. The direct
# method is to go on training: all weights, the same loop, new text. This works, but training
# needs many times the memory of inference: a model that runs easily on one GPU can seldom be
# trained on it. This chapter counts why. The chapters that follow make the counted things smaller.

# %%
import torch

from minipeft.lab import memory, plots
from minipeft.lab.chapter import start
from minipeft.lab.memory.cards import CARDS

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
# | **optimizer states** | two per *trained* parameter: running means of the gradient and of its square | from one step to the next |
# | **activations** | grows with batch × sequence length × layers | from the forward pass to the backward pass |
#
# The backward pass is the reason for the last row. Let $L$ be the loss. For a linear layer $y = x W^T$ the backward
# pass computes
#
# $$ \frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial y}\Big)^{\!T} x, \qquad
# \frac{\partial L}{\partial x} = \frac{\partial L}{\partial y}\, W, $$
#
# and the first of these needs the layer's input $x$ again. If $W$ is frozen, its gradient is not computed, and the
# layer need not keep $x$. (An adapter beside the layer that reads $x$ keeps it after all.)
#
# @source minipeft.reference.linear.forward
#
# @source minipeft.reference.linear.backward
#
# @source minipeft.reference.linear.check_fits
#
# ## Counting on a model that is here
#
# `tiny` is this book's own model: the architecture of Llama with 0.92 million
# parameters, trained on five novels of Jane Austen. It is several thousand times smaller than the models that people
# fine-tune. It trains on a laptop, and everything that is counted here can be counted on it. First the parameters, by name.

# %%
tiny = chapter.load()
architecture = memory.of_model(tiny.model)
counted = sum(p.numel() for p in tiny.model.parameters())
print(
    f"{architecture.layers} layers, width {architecture.width}, {architecture.vocabulary} tokens"
)
print(f"parameters counted: {counted:,}; by the formula: {architecture.parameters:,}")
assert counted == architecture.parameters
assert chapter.model != "tiny" or round(counted / 1e6, 2) == 0.92
for name, (out_features, in_features) in architecture.linears.items():
    print(f"  {name:10s} {out_features:4d} x {in_features:4d}")

# %% [markdown]
# Now the activations. A pair of hooks in torch reports every tensor that is saved for the backward pass. The sum over
# distinct tensors, without the weights themselves, is a measurement of the fourth row of the table.

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
chapter.claim(
    "the formula is within 1 % of the measurement",
    abs(measured / predicted - 1) < 0.01,
    control="the bytes that autograd keeps",
)

# %% [markdown]
# The formula counts every tensor that a block keeps: norms, queries, keys, values, the gate. Its docstring lists them
# all.
#
# @source minipeft.lab.memory.activations.activation_memory
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
# Now the sizes of Llama 2 7B, a batch of four sequences of 512 tokens, and four ways to train it. The adapters are LoRA
# of rank 64 on every linear layer of the blocks, in 32 bits. Every count of this model in the book uses this setting, unless it says
# otherwise.

# %%
llama = memory.LLAMA_7B
for name, size in vars(llama).items():
    print(f"{name:15s} {size!s:>6s}")
adapter = memory.COUNTED_ADAPTER
nested = memory.quantized_bits(4, 64, 256) / 8
ways = memory.ways_to_train()
print("GB                      weights  gradients  optimizer  activations")
for name, way in ways.items():
    parts = (way.weights, way.gradients, way.optimizer, way.activations)
    shown = [
        f"{part / 1e9:{n}.1f}" for part, n in zip(parts, (7, 9, 9, 11), strict=True)
    ]
    print(f"{name:22s}  {'  '.join(shown)}")
for name, way in ways.items():
    label = f"Llama 2 7B, 4 x 512 tokens, {name}: memory in all"
    chapter.quantity(label, way.total / 1e9, "GB", 1)
thin = memory.adapter_parameters(llama, adapter) / llama.parameters
print(f"LoRA of rank {adapter.r} trains {thin:.1%} of the parameters")

# %% [markdown]
# Does that fit? "24 GB" on the box of a graphics card means 24 **GiB**, that is $24 \cdot 2^{30}$ bytes or 25.8 GB. What a
# program can use of them differs from card to card, since some keep a part for error correction. These are the sizes that
# `nvidia-smi` reports (a [list](https://thundergolfer.com/blog/nvidia-gpu-memory-capacity) of those in data centres is online):

# %%
SOLD = ("24 GB", "80 GB")
held = {name: size for name, size in CARDS.items() if name.endswith(SOLD)}
for name, size in held.items():
    fits = [way for way, need in ways.items() if need.total < size]
    print(f"{name:24s} {size / 1e9:5.2f} GB: {', '.join(fits)}")
small = [size for name, size in held.items() if "24 GB" in name]
lora, qlora = (ways[name].total for name in [*ways][2:])
assert qlora < min(small) < max(small) < lora
assert lora < max(held.values()) < ways["everything, 16 bits"].total
long = memory.training_memory(
    llama, (4, 4096), adapter, memory.Precision(nested, 4, activations=2)
)
print(f"QLoRA with 4,096 tokens a sequence: {long.total / 1e9:.1f} GB")
assert long.total > max(small)  # what fits at 512 tokens fails at 4,096

# %% tags=["fold"]
figure = plots.memory_bars(ways)
ax = figure.axes[0]
ax.axvspan(min(small) / 1e9, max(small) / 1e9, color=plots.INK, alpha=0.8, linewidth=0)
ax.text(27, -0.62, "cards sold as 24 GB", color=plots.INK, va="center")
chapter.show(
    figure,
    "memory",
    alt=f"Four stacked bars: weights, gradients, optimizer and activations of a model of {llama.parameters / 1e9:.1f} billion parameters. The two bars of training everything end at {ways['everything, 32 bits'].total / 1e9:.0f} and {ways['everything, 16 bits'].total / 1e9:.0f} GB, most of it gradients and optimizer. The bar of LoRA has weights and activations, with thin slices for the other two, and ends right of a dark vertical band at {min(small) / 1e9:.1f} to {max(small) / 1e9:.1f} GB; the bar of QLoRA has shorter weights and ends left of the band.",
    caption=f"Of four ways to train {llama.parameters / 1e9:.1f} billion parameters, only QLoRA ({qlora / 1e9:.1f} GB) fits a card sold as 24 GB. LoRA on 16 bits needs {lora / 1e9:.1f} GB, training everything {ways['everything, 16 bits'].total / 1e9:.0f} GB or more.",
)

# %% [markdown]
# Read the bars from the top. In 32 bits the gradients are as large as the weights, and Adam's two states twice as
# large. Sixteen bits save only {=f"{1 - ways['everything, 16 bits'].total / ways['everything, 32 bits'].total:.0%}"=} of the
# sum: weights and gradients shrink to half and activations to {=f"{ways['everything, 16 bits'].activations / ways['everything, 32 bits'].activations:.0%}"=}, but Adam's states stay in 32 bits, and so does a second copy of the weights, the
# *master copy*, to which the small steps are added. With an adapter, the rest becomes smaller too:
#
# - **LoRA** trains {=f"{memory.adapter_parameters(llama, adapter) / 1e6:.0f}"=} million numbers instead of
#   {=f"{llama.parameters / 1e9:.2f}"=} billion. Their gradients and states take
#   {=f"{(ways['LoRA on 16 bits'].gradients + ways['LoRA on 16 bits'].optimizer) / 1e9:.1f}"=} GB. Weights and activations are what remains.
# - **QLoRA** keeps the frozen weights of the blocks' linear layers in {=f"{8 * nested:.3f}"=} bits each instead of 16.
#
# Of QLoRA's {=f"{qlora / 1e9:.1f}"=} GB, {=f"{ways['QLoRA: LoRA on 4 bits'].activations / qlora:.0%}"=} are activations. A method of their own
# makes those smaller: keep only some of them and compute the others again in the backward pass (gradient checkpointing).
#
# These sums are not the peak, which [another chapter](24_costs.md) counts: what lives only inside one operation comes on top, but gradients grow
# while activations shrink. They also leave out what the allocator loses between its blocks, and the few hundred megabytes that the driver takes.
#
# ## The published number
#
# QLoRA's paper says in its introduction that fine-tuning a model of 65 billion parameters in 16 bits takes "more than 780 GB". It
# does not say how this is counted. Twelve bytes per parameter give the number exactly: 2 for the weight, 2 for the gradient, 8 for Adam, without
# a master copy and without activations.

# %%
print(f"65e9 parameters x 12 bytes = {65e9 * 12 / 1e9:.0f} GB")
assert 65e9 * (2 + 2 + 8) == 780e9

# %% [markdown]
# ## What goes wrong in practice
#
# - **"LoRA trains {=100 * thin:.1f=} % of the parameters, so it needs {=100 * thin:.1f=} % of the memory."** It needs about that share of two of the
#   four rows, gradients and optimizer states. In all it needs {=f"{lora / ways['everything, 16 bits'].total:.0%}"=} of what training everything in 16 bits needs.
# - **Activations forgotten.** They grow with the batch and the sequence; the other rows do not. The QLoRA run that fits a 24 GB card at 512 tokens needs
#   {=f"{long.total / 1e9:.0f}"=} GB at 4,096.
# - **Gigabytes in two units.** A card of "24 GB" holds 24 GiB at most, which are {=f"{24 * 2**30 / 1e9:.1f}"=} GB. This book counts in powers of ten: 1 GB is $10^9$ bytes.
#
# ## Exercises
#
# 1. From what sequence length on do the activations of LoRA on 16 bits outweigh the weights, at batch 1?

# %% tags=["solution"]
weights = ways["LoRA on 16 bits"].weights
crossing = next(
    n
    for n in range(64, 65536, 64)
    if memory.activation_memory(llama, (1, n), adapter, bytes_per_value=2) > weights
)
print(f"from about {crossing} tokens on")
assert 1000 < crossing < 20000

# %% [markdown]
# 2. Eight-bit optimizer states take 2 bytes a parameter instead of 8. How much does that save when everything is
#    trained, and how much under LoRA?

# %% tags=["solution"]
for name, trained in (
    ("everything", llama.parameters),
    (f"LoRA, r = {adapter.r}", memory.adapter_parameters(llama, adapter)),
):
    print(f"{name:13s} saves {trained * 6 / 1e9:.2f} GB")
assert llama.parameters * 6 > 40e9

# %% [markdown]
# ## References
#
# Adam's two states are from Kingma and Ba [@kingma2014]. The 780 GB are from QLoRA [@dettmers2023], and training a
# low-rank update is from LoRA [@hu2021].
