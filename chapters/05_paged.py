# %% [markdown]
# # Paged optimizers: surviving the one long batch
#
# A training run that fits for 4,000 steps and dies in the next has usually met a long sequence. Memory for activations grows with
# the batch; for a moment there is too little, and a moment is enough. All that time the optimizer's state lay on the device, untouched: it is needed only
# when the gradients are ready, when the activations are already gone. Paged optimizers [@dettmers2023] let it step aside.

# %%
from dataclasses import replace

import numpy as np
import torch

from minipeft.lab import plots
from minipeft.lab.chapter import start
from minipeft.lab.memory import (
    LLAMA_7B,
    Adapter,
    activation_memory,
    lora_parameters,
    quantized_bits,
)
from minipeft.reference import adamw, paged
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging

chapter = start("05_paged", steps=40, model="tiny")

# %% [markdown]
# ## The problem
#
# Take QLoRA on a model of 7 billion parameters. The base is small and constant, the state of the adapters too. The activations are not:

# %%
ADAPTER = Adapter(r=64)
trained = lora_parameters(LLAMA_7B, ADAPTER)
rest = LLAMA_7B.parameters - LLAMA_7B.linear_parameters
BASE = LLAMA_7B.linear_parameters * quantized_bits(4, 64, 256) / 8 + 2 * rest
STATE = 8 * trained
FIXED = BASE + (4 + 4) * trained  # adapters and their gradients, in float32


def activations(tokens):
    """Bytes that one sequence keeps for the backward pass, at 16 bits."""
    return activation_memory(LLAMA_7B, (1, tokens), ADAPTER, 2)


print(
    f"base {BASE / 1e9:.2f} GB, adapters and gradients {(FIXED - BASE) / 1e9:.2f} GB, m and v {STATE / 1e9:.2f} GB"
)
for tokens in (256, 512, 1024, 2048):
    print(f"activations of {tokens:4d} tokens: {activations(tokens) / 1e9:5.2f} GB")

# %% [markdown]
# Most sequences of a chat data set are short, a few are long. A run sized for the longest wastes the card on all the others; a run sized for the
# others dies at the longest.
#
# ## The mechanism
#
# Cut the state into **pages**. Keep all of them in the host's memory, and some of them, at most as many as the **budget**, on the device.
#
# - To use a page is to **touch** it. If it is on the device, good. If not, that is a **fault**: it must be copied in, and the device waits.
# - If the budget is used up, another page must leave first: the **least recently used**.
# - A page that was changed, a **dirty** page, is **written back** before it leaves. A clean one is simply dropped.
# - Whoever knows what comes next can **prefetch** it, and nobody waits.
#
# Operating systems have done this with programs since the 1960s. On a GPU, CUDA's managed memory does it in hardware and driver. Our version is a table that can be read.
#
# ## The code
#
# @source minipeft.reference.paged.Paged
#
# @source minipeft.reference.paged.touch
#
# @source minipeft.reference.paged.evict
#
# @source minipeft.reference.paged.prefetch
#
# @source minipeft.reference.paged.resize
#
# The step of the optimizer is a loop over pages around [AdamW](04_adamw.md). The update of a weight needs only that weight's state, so nothing changes:
#
# @source minipeft.reference.paged.step
# @source minipeft.torch.paged.PagedAdamW
#
# On a GPU the host's pages lie in pinned memory, from which the device can copy by itself, and travel on a stream of their own: while one page is in use, the
# next is under way. On a CPU a copy is a copy.
#
# @source minipeft.torch.paged.PageTable
#
# Cutting, joining, counting:
#
# @source minipeft.reference.paged.init
#
# @source minipeft.reference.paged.gather
#
# @source minipeft.reference.paged.nbytes
#
# @source minipeft.reference.paged.Traffic
#
# A small example: three pages, room for two. Watch the order.

# %%
p = paged.init([adamw.init(np.zeros(768, np.float32))], page_size=256, budget=2)
for page in (0, 1, 0, 2, 1):
    before, p = p, paged.touch(p, page)
    event = "hit  " if p.traffic == before.traffic else "fault"
    print(f"touch {page}: {event} on the device, oldest first: {[*p.device]}")
print(p.traffic)
assert (p.traffic.faults, p.traffic.evictions) == (4, 2)

# %% [markdown]
# Page 0 came first, but page 1 left first: 0 had been used since.
#
# ## The proof
#
# One law: **paging never touches the arithmetic.** Whatever the budget, from one page up, and in whatever order pages are touched, evicted,
# prefetched and the budget changed, weights and states have the bits of plain AdamW. The test is a state machine: hypothesis makes up sequences of these operations, and after each one compares
# everything with an optimizer that knows no pages, and the counters with a list kept by hand. In torch the same holds, and is shown here:

# %%
SHAPES = [(300, 40), (4096,), (7,)]
optimizers = {}
for name, make in {
    "plain": AdamW,
    "paged": lambda params, **k: PagedAdamW(params, **k, paging=Paging(512, 3)),
}.items():
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    optimizer = optimizers[name] = make(params, bits=8)
    for _ in range(6):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
plain, other = (o.param_groups[0]["params"] for o in optimizers.values())
assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
traffic = optimizers["paged"].table.traffic
print("six steps, 8-bit states, 3 pages on the device: every bit as without paging")
print(f"pages waited for: {traffic.faults}, fetched ahead: {traffic.prefetches}")

# %% [markdown]
# ## The experiment: a spike
#
# Now the run of 7 billion parameters, {=chapter.steps=} steps on sequences of random length, on a card that holds everything except the longest. So that it runs on a laptop, every byte of
# state stands for a thousand; the table and its counters are the real ones.

# %%
SCALE = 1000
PAGE = 1024  # values: 8 kB here, 8 MB there
rng = np.random.default_rng(3)
lengths = np.clip(np.exp(rng.normal(5.6, 0.55, chapter.steps)), 64, 1200).astype(int)
SPIKE = chapter.steps * 5 // 8
lengths[SPIKE] = 1800
needed = np.array([activations(int(n)) for n in lengths])
unpaged = FIXED + STATE + needed
CAPACITY = unpaged.max() - 0.6 * STATE
assert (unpaged > CAPACITY).sum() == 1
print(
    f"card: {CAPACITY / 1e9:.1f} GB; longest sequence {lengths.max()} tokens, median {int(np.median(lengths))}"
)

W = rng.standard_normal(trained // SCALE).astype(np.float32)
GRADS = [rng.standard_normal(W.size).astype(np.float32) for _ in range(8)]
page_bytes = 8 * PAGE * SCALE


def room(taken):
    """Pages that fit beside everything else; at least one."""
    return max(1, int((CAPACITY - FIXED - taken) // page_bytes))


p = paged.init([adamw.init(W)], PAGE, room(0))
weight, log = W, []
for k in range(chapter.steps):
    began = p.traffic
    p = paged.resize(p, room(needed[k]))  # forward and backward need their activations
    resident = len(p.device) * page_bytes
    assert FIXED + needed[k] + resident <= CAPACITY
    p = paged.resize(p, room(0))  # they are gone: the optimizer's turn
    weight, p = paged.step(p, 0, weight, GRADS[k % 8], adamw.AdamW())
    moved = p.traffic.bytes_in + p.traffic.bytes_out - began.bytes_in - began.bytes_out
    log.append((resident, moved * SCALE, p.traffic.faults - began.faults))
resident, moved, faults = map(np.array, zip(*log, strict=True))

alone, state = W, adamw.init(W)
for k in range(chapter.steps):
    alone, state = adamw.step(alone, GRADS[k % 8], state, adamw.AdamW())
assert np.array_equal(alone, weight)
first = int(np.flatnonzero(unpaged > CAPACITY)[0])
print(
    f"unpaged: out of memory in step {first}, {(unpaged[first] - CAPACITY) / 1e9:.2f} GB short"
)
print("paged: finished; weights equal those of an unlimited card, bit for bit")
print(
    f"moved in step {first}: {moved[first] / 1e9:.2f} GB; in all other steps after the first: {moved[1:first].sum() + moved[first + 1 :].sum():.0f} bytes"
)

# %% tags=["fold"]
figure, ax = plots.axes(x="step", y="GB on the device", size=(6.4, 3.6))
at = np.arange(chapter.steps)
layers = [np.full(chapter.steps, FIXED), resident, needed]
names = ["base, adapters, gradients", "optimizer state on the device", "activations"]
ax.stackplot(
    at,
    np.array(layers) / 1e9,
    step="mid",
    labels=names,
    colors=[plots.FAINT, plots.PALETTE[0], plots.PALETTE[4]],
)
ax.step(
    at,
    unpaged / 1e9,
    where="mid",
    color=plots.INK,
    linewidth=1.0,
    linestyle=":",
    label="without paging",
)
ax.axhline(CAPACITY / 1e9, color=plots.PALETTE[1], linewidth=2)
ax.text(0, CAPACITY / 1e9 + 0.15, "the card", color=plots.PALETTE[1], weight="bold")
ax.plot(first, unpaged[first] / 1e9, "X", color=plots.PALETTE[1], markersize=10)
ax.set(xlim=(0, chapter.steps - 1), ylim=(0, unpaged.max() / 1e9 * 1.3))
ax.legend(loc="upper center", ncols=2)
chapter.show(
    figure,
    "spike",
    alt="Memory over the steps as stacked areas. In one step the activations rise far above the others; the band of the optimizer state becomes thinner in that step and everything stays below the line of the card, while the dotted line without paging crosses it.",
)

# %% [markdown]
# In step {=first=} the activations need {=f"{needed[first] / 1e9:.1f}"=} GB, and the blue band gives way: pages leave, and come back when the step of the optimizer needs them.
# Without paging the run ends there, {=f"{(unpaged[first] - CAPACITY) / 1e9:.2f}"=} GB short. The price is {=f"{moved[first] / 1e9:.1f}"=} GB of traffic in one step, at 25 GB/s over the bus
# {=f"{moved[first] / 25e9:.2f}"=} seconds, and, once the first step has fetched the state, *nothing at all* in the others. This is what paged optimizers are for: rare spikes.
#
# ## The experiment: not for less
#
# If even the usual step has too little room, pages travel in every step. How much does a smaller budget cost?

# %%
PAGES = 16
per_step = {}
for budget in range(1, PAGES + 2):
    q = paged.init([adamw.init(np.zeros(256 * PAGES, np.float32))], 256, budget)
    for _ in range(3):
        start_traffic = q.traffic
        for page in range(PAGES):
            q = paged.touch(q, page)
    per_step[budget] = q.traffic.faults - start_traffic.faults
fewest = {
    budget: max(0, PAGES - budget + 1) if budget < PAGES else 0 for budget in per_step
}
print("faults in a step, by budget:", per_step)
assert set(per_step.values()) == {0, PAGES}

# %% tags=["fold"]
figure, ax = plots.axes(
    x=f"budget, of {PAGES} pages", y="faults in each step", size=(6.4, 3.0)
)
ax.step([*per_step], [*per_step.values()], where="mid", color=plots.PALETTE[0])
ax.plot([*fewest], [*fewest.values()], "--", color=plots.PALETTE[1])
ax.text(8, PAGES + 0.6, "least recently used", color=plots.PALETTE[0], weight="bold")
ax.text(1.5, 5.2, "keep what you have", color=plots.PALETTE[1], weight="bold")
ax.set(ylim=(-0.8, PAGES + 2.2))
chapter.show(
    figure,
    "lru",
    alt="Faults in each step against the budget. The rule of the least recently used page faults on all sixteen pages until the last one fits, then on none; a rule that keeps pages falls in a straight line.",
)

# %% [markdown]
# With one page too few, *every* page faults. An optimizer walks through its state in the same order each step, so the page it will need next is always the one it used
# longest ago, and that is the one that has just left. A rule that simply keeps what it has would do better on this walk; drivers use LRU since
# most programs are not like this. And prefetching helps the waiting, not the traffic.
#
# ## What goes wrong in practice
#
# - **It is not paged at all.** bitsandbytes pages tensors of at least 100,000 values; smaller ones, such as those of many adapters, stay on the device. On a CPU its paged
#   optimizers warn, and are the plain ones. Neither changes a result.
# - **No paging without hardware support.** Where the driver reports no concurrent managed access, as on Windows and under WSL, managed memory lies on the device as a whole whenever a kernel runs, so what does not fit cannot be paged there. Our CuPy version refuses such a device; the torch version copies its pages itself, and works.
# - **The price is the bus.** The QLoRA paper reports the same speed as without paging, at batch size 16 on a 65-billion-parameter model, and gives no measurements for runs that page all the time. The experiment above says why to measure.
# - **Resuming.** A state dict taken while pages are dirty on the device must contain *them*, not the host's stale copies. Ours writes back first; a law saves with one size of page and loads with another.
#   Lost states after resuming have been [reported](https://github.com/axolotl-ai-cloud/axolotl/issues/864).
# - **Copies that overtake.** Our torch version copies on its own stream: the copy out waits for the computation, the computation for the copy in, and memory is not reused before both have finished. Forget
#   one of the three and the result is wrong once in a thousand runs. On CUDA this code is exercised by the tests marked `gpu` only.
#
# ## Exercises
#
# 1. *Eight bits first.* In the run above, store the state in 8 bits and do not page. Does the card hold?

# %% tags=["solution"]
eight_bits = FIXED + (2 + 8 / 256) * trained + needed
print(
    f"largest demand {eight_bits.max() / 1e9:.2f} GB, card {CAPACITY / 1e9:.2f} GB: {'holds' if eight_bits.max() <= CAPACITY else 'out of memory'}"
)
assert eight_bits.max() < CAPACITY < unpaged.max()

# %% [markdown]
# 2. *Backwards.* Walk through the pages forwards in one step and backwards in the next. How many faults remain?

# %% tags=["solution"]
q = paged.init([adamw.init(np.zeros(256 * PAGES, np.float32))], 256, 12)
for step in range(4):
    start_traffic = q.traffic
    for page in range(PAGES)[:: 1 if step % 2 == 0 else -1]:
        q = paged.touch(q, page)
backwards = q.traffic.faults - start_traffic.faults
print(f"budget 12 of {PAGES}: {backwards} faults a step instead of {per_step[12]}")
assert backwards == PAGES - 12

# %% [markdown]
# 3. *Clean and dirty.* Fill the device by touching, then by stepping, and evict everything. How many bytes go back to the host in each case?

# %% tags=["solution"]
touched = paged.touch(paged.init([adamw.init(W)], PAGE, 4), 0)
_, stepped = paged.step(replace(touched, budget=4), 0, W, W, adamw.AdamW())
for name, q in {"touched": touched, "stepped": stepped}.items():
    out = q.traffic.bytes_out
    for page in [*q.device]:
        q = paged.evict(q, page)
    print(f"{name}: {q.traffic.bytes_out - out} bytes written back")
assert paged.evict(touched, 0).traffic.bytes_out == 0

# %% [markdown]
# ## References
#
# Paged optimizers are section 3 of QLoRA [@dettmers2023].
