# %% [markdown]
# # One model on several GPUs
#
# A model of 70 billion parameters in four bits is larger than a card of 24 GB. Two such cards hold it if each keeps half. This chapter says what is cut up and what is not, checks the two facts on which that rests, and predicts what a card needs, for 1 to 8 of them. Nothing here ran on a GPU.

# %%
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from minipeft.lab import plots
from minipeft.lab.chapter import start
from minipeft.lab.memory import (
    Adapter,
    Architecture,
    Precision,
    Step,
    adapter_parameters,
    peak,
    quantized_bits,
)
from minipeft.lab.memory.cards import CARDS
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.sharding import ByteLinear, shardable

chapter = start("23_several_gpus", steps=1, model=None)

# %% [markdown]
# ## The problem
#
# There are two ways to use $N$ cards. In **DDP** each card holds the whole model and takes its share of the batch; in each backward pass the cards average their gradients. That is faster, and it saves no memory. In **FSDP** [@zhao2023] each card also keeps only its $N$-th part of every tensor. Before a block computes, the cards send each
# other its parts; afterwards they drop them again.

# %%
LLAMA_70B = Architecture(
    layers=80,
    width=8192,
    feedforward=28672,
    heads=64,
    key_value_heads=8,
    vocabulary=32000,
    head=128,
    tied=False,
)
BITS = quantized_bits(4, 64, 256)
CARD = CARDS["RTX 3090, sold as 24 GB"]
linears = LLAMA_70B.linear_parameters
rest = LLAMA_70B.parameters - linears
weights = linears * BITS / 8 + 2 * rest
print(
    f"{LLAMA_70B.parameters / 1e9:.1f} billion parameters, {linears / LLAMA_70B.parameters:.1%} of them in linear layers"
)
chapter.quantity("Llama 70B, NF4 with nested scales: weights", weights / 1e9, "GB", 1)
assert CARD < weights < 2 * CARD

# %% [markdown]
# ## The formula
#
# Let $w$ be the bytes of the frozen weights, $a$ those of the adapters with their gradients and optimizer states, $c$ those of one block's weights, $e$ those of the embeddings and the output layer, and $t$ what a card keeps of its own tokens (activations, logits, one decoded weight). Then a card needs
#
# $$ m_\text{DDP} = w + a + t, $$
#
# $$ m_\text{FSDP} = \frac{w + a}{N} + 2c + e + t. $$
#
# There are two blocks at once because the next one is fetched while one computes. The embeddings and the output layer belong to no block: FSDP2 keeps them whole on every card from the forward pass to the end of the backward pass. What is gathered is a copy: the card keeps its own $N$-th part beside it. The activations $t$ are not divided: each card has a batch of its own. Buffers for sending are not counted; by default torch's DDP keeps one as large as the gradients.
#
# What travels in a step, for each card, with checkpointing off: under DDP the gradients of the adapters, $2(N-1)/N$ times their bytes. Under FSDP the weights as well, those of the blocks once for the forward pass and once for the backward pass, and the embeddings and the output layer once, since they stay:
#
# $$ b_\text{FSDP} = \frac{N-1}{N}\,(2w - e + g), $$
#
# with $g$ the bytes of the adapters' gradients, which are sent once. The adapters' own weights travel with $w$, twice. They are as large as $g$, and the formula leaves them out. Full fine-tuning would send gradients as large as the weights; here $g$ is small, and $w$ has 4 bits.
#
# ## The code
#
# FSDP2 cuts up *parameters* and leaves *buffers* whole on every card. A 4-bit layer keeps its codes and scales in buffers, so they become frozen parameters. Their dtype must be an integer: a policy of mixed precision casts all that is floating-point, and would round the scales.
#
# @source minipeft.torch.sharding.ByteLinear
#
# @source minipeft.torch.sharding.shard
#
# @source minipeft.torch.sharding.replicate
#
# A checkpoint is written in parts, each process its own, and read whole or in other parts:
#
# @source minipeft.torch.sharding.save
#
# @source minipeft.torch.sharding.resume
#
# A run on two cards, as a program that `torchrun --nproc-per-node 2 run.py` starts:
#
# ```python
# distributed.init_process_group()
# model = shardable(quantize_linears(model))
# shard(inject(model, LoRAConfig(r=16, alpha=32), "all-linear"))
# optimizer = torch.optim.AdamW(trainable_parameters(model))
# step = resume(folder, model, optimizer) if folder.exists() else 0
# ```
#
# ## The proof
#
# **The gradient of the batch is the mean of the cards' gradients.** Each card takes every $N$-th row and computes the mean gradient of its own rows; then the cards average these means. If all cards have as many rows, this is the mean over all rows, which one card would compute. On fractions nothing is rounded, and the two are equal:

# %%
rng = np.random.default_rng(0)
ROWS, RANKS = 8, 4
per_row = np.array(
    [[Fraction(int(n), 7) for n in rng.integers(-40, 41, 5)] for _ in range(ROWS)]
)
one_card = per_row.sum(axis=0) / ROWS
cards = [RANKS * per_row[rank::RANKS].sum(axis=0) / ROWS for rank in range(RANKS)]
assert (sum(cards) / RANKS == one_card).all()
print("the mean over four cards is the gradient of one card, exactly")

# %% [markdown]
# In floats only the order of the sum differs. The tests run two processes under `torchrun`, for LoRA and QLoRA, FSDP and DDP: each row's loss is the same bits, and gradients differ by at most $2\gamma_{n+2} \sum_i |g_i|$, the rounding of a sum of $n$ rows in two orders.
#
# **Codes and scales survive being cut up.** As bytes they are cut anywhere, also inside a float, and joined again:

# %%
torch.manual_seed(0)
layer = QuantizedLinear.from_linear(nn.Linear(64, 48), nested_blocksize=256)
held = shardable(nn.Sequential(layer))[0]
assert type(held) is ByteLinear
for name, parameter in held.named_parameters():
    if name.endswith("_bytes"):
        for number in (2, 3, 7):
            joined = torch.cat(torch.chunk(parameter.detach(), number))
            assert torch.equal(joined, parameter)
x = torch.randn(3, 64)
assert torch.equal(held(x), layer(x))
scale = layer.nested_absmax
rounded = scale.bfloat16().float()
lost = ((rounded - scale).abs() / scale).max().item()
print(f"as bytes: the same bits; cast to bfloat16, a scale would be off by {lost:.2%}")
chapter.claim(
    "a layer whose codes and scales are bytes stays exact when the model is cast to 16 bits",
    torch.equal(
        held.bfloat16().dequantize(torch.float32), layer.dequantize(torch.float32)
    ),
    control=f"a scale that is cast, which changes by {lost:.2%}",
)
assert lost > 0

# %% [markdown]
# ## The experiment: 70 billion parameters on cards of 24 GB
#
# One sequence of 512 tokens a card, checkpointing: only the input of each block is kept, and one block at a time is computed again. LoRA of rank 16 on all linear layers, in 32 bits with Adam. The count is that of `minipeft memory`, which contains one decoded weight, with two things added: the gathered blocks, and the whole embeddings and output layer. The fullest moment is counted. On one card, or under DDP, it comes when the first block is computed again, as then all gradients are there. Under FSDP it comes at the last block: no gradient is there yet, and the inputs of all blocks, which are not divided, are. Nothing was measured. The cards are RTX 3090, sold as 24 GB, which hold 24 GiB, or {=CARD / 1e9:.1f=} GB.

# %%
TOKENS, RANK = (1, 512), Adapter(r=16)
CHECKPOINTED = Step(checkpointing=True, transient=0)


def fullest(bits, tokens=TOKENS, cards=1):
    """Return the fullest moment of the passes, with a card's part of the gradients."""
    use = Precision(weights=bits / 8, gradients=4 / cards, activations=2)
    return peak(LLAMA_70B, tokens, RANK, use, CHECKPOINTED)


found = fullest(BITS)
trained = adapter_parameters(LLAMA_70B, RANK)
adapters = found.weights - weights + found.gradients + found.optimizer
assert abs(adapters - trained * (4 + 4 + 8)) < 1e-6 * adapters
block = linears / LLAMA_70B.layers * BITS / 8
decoded = 2 * max(m * k for m, k in LLAMA_70B.linears.values())
assert found.transient > decoded
own = {
    "activations": found.activations,
    "one decoded weight": decoded,
    f"what the {found.moment} needs besides": found.logits + found.transient - decoded,
}
for name, value in own.items():
    print(f"{name:36s} {value / 1e9:5.2f} GB")
print(f"{'two gathered blocks':36s} {2 * block / 1e9:5.2f} GB")
print(f"{'adapters, gradients, Adam':36s} {adapters / 1e9:5.2f} GB, divided by N")


def sharded(cards, bits=BITS, tokens=TOKENS):
    """Return the bytes that a card needs under FSDP."""
    at = fullest(bits, tokens, cards)
    held = linears * bits / 8 + 2 * rest + trained * (4 + 8)
    # The embeddings and the output layer belong to no block: FSDP2 keeps them whole
    # from the forward pass to the end of the backward pass, beside the card's part.
    gathered = 2 * linears / LLAMA_70B.layers * bits / 8 + 2 * rest
    copies = gathered if cards > 1 else 0
    passing = at.gradients + at.activations + at.logits + at.transient
    return held / cards + copies + passing


def replicated():
    """Return them under DDP, on any number of cards."""
    return weights + adapters + sum(own.values())


assert found.moment == "first block"
assert fullest(BITS, cards=2).moment == "last block"
half = 2 * LLAMA_70B.parameters
needs = {cards: sharded(cards) for cards in (1, 2, 4, 8)}
print(f"\na card holds {CARD / 1e9:.1f} GB; cards   FSDP, 4 bits   DDP, 4 bits")
for cards, needed in needs.items():
    fits = "fits" if needed < CARD else "does not fit"
    print(
        f"{cards:28d}   {needed / 1e9:9.1f} GB   {replicated() / 1e9:8.1f} GB   {fits}"
    )
chapter.quantity(
    "Llama 70B, QLoRA r = 16, 1 x 512 tokens a card, FSDP over two cards: a card needs",
    needs[2] / 1e9,
    "GB",
    1,
)
chapter.claim(
    "QLoRA of 70 billion parameters fits two cards of 24 GB by this count, and one card it does not",
    needs[2] < CARD < needs[1],
    control="DDP on the same two cards, and 16 bits under FSDP",
)
assert replicated() > CARD
assert sharded(2, 16) > CARD

# %% tags=["fold"]
figure, ax = plots.axes(x="cards", y="GB a card", size=(6.4, 3.6))
N = np.arange(1, 9)
lines = {
    "DDP, 4 bits": [replicated() / 1e9 for _ in N],
    "FSDP, 4 bits": [sharded(c) / 1e9 for c in N],
    "FSDP, 16 bits": [sharded(c, 16) / 1e9 for c in N],
}
for color, (name, values), at in zip(
    plots.PALETTE,
    lines.items(),
    ((6.0, 42.5), (4.2, 15.5), (3.3, 50)),
    strict=False,
):
    ax.plot(N, values, "o-", color=color)
    ax.text(*at, name, color=color, weight="bold", va="bottom")
ax.axhline(CARD / 1e9, color=plots.INK, linestyle="--", linewidth=1)
ax.text(2.5, CARD / 1e9 + 1, "RTX 3090, sold as 24 GB", color=plots.INK)
ax.set(ylim=(0, 80), xlim=(0.8, 8.2))
first_in_16 = next(c for c in N if sharded(c, 16) < CARD)
chapter.show(
    figure,
    "cards",
    alt=f"Gigabytes a card against the number of cards. DDP in 4 bits is a flat line at {replicated() / 1e9:.1f}. FSDP in 4 bits falls from there below a dashed line at {CARD / 1e9:.1f} with two cards. FSDP in 16 bits falls from above the figure and comes below the dashed line with {first_in_16} cards.",
    caption=f"Sharded over two cards, {LLAMA_70B.parameters / 1e9:.0f} billion parameters in 4 bits need {needs[2] / 1e9:.1f} GB on each. DDP needs {replicated() / 1e9:.1f} GB on each of any number, and 16 bits fit from {first_in_16} cards on.",
)

# %% [markdown]
# What is left on each of two cards is {=(CARD - needs[2]) / 1e9:.1f=} GB, for the driver's own memory, for fragments of the allocator and for longer sequences. This is close, and a desktop on the same card may need it.
#
# And the time? Two cards without a fast link talk over PCIe, at {=PCIE / 1e9:.1f=} GB a second [@nvidia2020]:

# %%
PCIE = 31.5e9
gradients = 4 * trained
whole = 2 * rest  # bytes of the embeddings and the output layer, sent once
print("cards   sent for each card in a step   at least")
for cards in (2, 4, 8):
    moved = (cards - 1) / cards * (2 * weights - whole + gradients)
    print(f"{cards:5d}   {moved / 1e9:25.1f} GB   {moved / PCIE:6.2f} s")
two = (2 * weights - whole + gradients) / 2
sixteen = (2 * half - whole + gradients) / 2
print(
    f"16 bits on two cards would send {sixteen / 1e9:.0f} GB, {sixteen / two:.1f} times"
)
assert sixteen > 3 * two

# %% [markdown]
# With checkpointing, the forward pass is computed again within the backward pass, from the weights that this pass gathers anyway. The bytes do not depend on the number of tokens. So a card should take as many tokens in a pass as fit. Adding up gradients over several passes does not save weights: each pass sends them again.
#
# What changes on $N$ cards, then: the batch is $N$ times larger, unless each card gets fewer rows; memory for weights falls as $1/N$, but for the gathered copies, and for activations it does not; the gradient is the same up to rounding; and a checkpoint has $N$ parts, which any other number of cards can read.
#
# ## What goes wrong in practice
#
# - **Buffers are not sharded.** A 4-bit model whose codes are buffers runs under FSDP, and every card holds all of them. Nothing fails but the memory. `shard` refuses such a model.
# - **Codes in a dtype that FSDP1 refuses.** FSDP1 flattens the parameters of a block into one tensor, so all must have one dtype. bitsandbytes can therefore store its codes in a floating-point dtype (`quant_storage`), which has to be that of the rest of the model. FSDP2 takes integers as they are.
# - **The mean of means.** If cards have different numbers of labels, the mean of their mean losses is not the mean over all labels. Sum the losses of a card, divide by the number of labels on all cards, and multiply by $N$, because the cards average their gradients.
# - **Merging a sharded model.** A card has only its part of the weight. Gather first: our `merge` says so and refuses.
# - **Saving on one card.** A state dict that the first process alone asks for never arrives, because the others must send their parts: all processes call `save`.
#
# ## Exercises
#
# 1. *Four cards of 16 GB.* Does the same run fit them?

# %% tags=["solution"]
small = CARDS["T4, sold as 16 GB"]
print(f"{needs[4] / 1e9:.1f} GB of {small / 1e9:.1f}: it fits")
assert needs[4] < small

# %% [markdown]
# 2. *The longest sequence.* How many tokens fit a card when there are two of them?


# %% tags=["solution"]
def room_for(tokens):
    """Return whether one sequence of so many tokens fits one of two cards."""
    return sharded(2, tokens=(1, tokens)) < CARD


longest = max(n for n in range(512, 20_000, 64) if room_for(n))
print(f"about {longest:,} tokens, with nothing left for anything else")
assert longest > 1024

# %% [markdown]
# 3. *Full fine-tuning.* On how many cards sold as 80 GB does full fine-tuning in 16 bits, with 32-bit Adam and a master copy, fit by weights, gradients and states alone?

# %% tags=["solution"]
states = LLAMA_70B.parameters * (2 + 2 + 12)
big = CARDS["A100, sold as 80 GB"]
print(
    f"{states / 1e12:.1f} TB: {int(np.ceil(states / big))} cards of {big / 1e9:.1f} GB"
)
assert int(np.ceil(states / big)) == 13

# %% [markdown]
# ## References
#
# FSDP is described by Zhao and others [@zhao2023], QLoRA by Dettmers and others [@dettmers2023].
