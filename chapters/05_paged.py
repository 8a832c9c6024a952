# %% [markdown]
# # Paged optimizers: surviving the one long batch
#
# A training run may fit for 4,000 steps and run out of memory in the next, because that batch has a long sequence. The activations
# grow with the length, and are needed until the backward pass is done. The optimizer's state is needed only afterwards, when
# the activations are gone. Paged optimizers [@dettmers2023] use this: while the activations need the room, a part of the state is moved to the host.

# %%
from dataclasses import replace

import numpy as np
import torch

from minipeft.lab import plots
from minipeft.lab.chapter import start
from minipeft.lab.memory import (
    COUNTED_ADAPTER,
    LLAMA_7B,
    activation_memory,
    adapter_parameters,
    quantized_bits,
)
from minipeft.reference import adamw, paged
from minipeft.torch.adamw import AdamW
from minipeft.torch.paged import PagedAdamW, Paging

chapter = start("05_paged", steps=40, model=None)

# %% [markdown]
# ## The problem
#
# Take QLoRA on a model of 7 billion parameters, with adapters of rank 64 in 32 bits, as in [chapter 0](00_why.md). Base, adapters and state take the same memory in each step. The activations do not:

# %%
ADAPTER = COUNTED_ADAPTER
trained = adapter_parameters(LLAMA_7B, ADAPTER)
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
# In many data sets most sequences are short and a few are long. A batch that is small enough for the longest sequence leaves memory unused in all other steps. A batch that fits the
# others fails at the longest.
#
# ## The mechanism
#
# Cut the state into **pages**. Keep all of them in the host's memory, and some of them, at most as many as the **budget**, on the device.
#
# - To use a page is to **touch** it. If it is not on the device, that is a **fault**: the page is copied in, and the device waits.
# - If the budget is used up, another page must leave first: the **least recently used**.
# - A page that was changed, a **dirty** page, is **written back** before it leaves. A clean one is simply dropped.
# - A page that will be needed soon can be copied in ahead of time, or **prefetched**. Then the device does not wait.
#
# Operating systems have done this with the memory of programs since the 1960s. On a GPU, CUDA's managed memory does it in hardware and driver; there a page moves, and no copy stays behind. Our version is a table in Python.
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
# The step of the optimizer is a loop over pages around [AdamW](04_adamw.md). The update of a weight needs only the state in that weight's page, so nothing changes:
#
# @source minipeft.reference.paged.step
# @source minipeft.torch.paged.PagedAdamW
#
# On a GPU the host's pages lie in pinned memory, from which the device can copy by itself. They travel on two streams of their own, one for each direction: while one page is in use, the
# next is under way, and the last one goes back. On a CPU a copy is a copy.
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
# One law: **paging changes no number.** For any budget from one page up, and any order in which pages are touched, evicted and
# prefetched and the budget is changed, weights and states have the bits of plain AdamW. The test draws sequences of these operations at random. After each operation it compares
# weights and states with those of an optimizer without pages, and the counters with a second count. The same holds in torch, as this cell shows:

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
# Now a run with the sizes of 7 billion parameters: {=chapter.steps=} steps on sequences of random length, on a card that has room for every step but the longest. The model is not here; its memory
# is counted by [chapter 0's](00_why.md) formula. The state is here, a thousand times smaller, with the real page table, and every byte of it is counted as a thousand.

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
PCIE = 31.5e9  # bytes a second, in one direction


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
ax.text(0.4, CAPACITY / 1e9 + 0.3, "the card", color=plots.PALETTE[1], weight="bold")
ax.plot(first, unpaged[first] / 1e9, "X", color=plots.PALETTE[1], markersize=10)
ax.set(xlim=(0, chapter.steps - 1), ylim=(0, unpaged.max() / 1e9 * 1.3))
ax.legend(loc="upper center", ncols=2)
chapter.show(
    figure,
    "spike",
    alt="Memory over the steps as three stacked areas: a constant one, the optimizer state, and activations that change from step to step. In one step the activations are the largest. There the band of the optimizer state is thinner, and the stack ends at the line of the card; a dotted line without paging crosses it.",
    caption=f"In step {first} the activations need {needed[first] / 1e9:.1f} GB. With paging, part of the optimizer state leaves the card in that step, and the run goes on; without it, the run ends {(unpaged[first] - CAPACITY) / 1e9:.2f} GB short.",
)

# %% [markdown]
# In step {=first=} the activations need {=f"{needed[first] / 1e9:.1f}"=} GB. Pages of the state leave, and come back when the optimizer's step needs them: the blue band is thinner there.
# Without paging the run ends in this step, {=f"{(unpaged[first] - CAPACITY) / 1e9:.2f}"=} GB short. The cost is {=f"{moved[first] / 1e9:.1f}"=} GB of traffic in this step. A PCIe 4.0 bus of 16 lanes carries at most {=PCIE / 1e9:.1f=} GB/s in one direction [@nvidia2020]. The pages leave first and come back later, so that takes
# {=f"{moved[first] / PCIE:.2f}"=} seconds at least. In the other steps after the first nothing is moved. Paged optimizers are made for such rare spikes.
#
# ## The experiment: too little room in every step
#
# If the usual step has too little room as well, pages are moved in every step. How many faults does a smaller budget cause? As a control, the same walk with the best rule there is. Belady's
# rule evicts the page that will be needed last [@belady1966]. On a walk in a circle that is the page that was used most recently.

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


def faults_of_best_rule(budget, rounds):
    """Mean faults in a round if the most recently used page leaves."""
    device, last, faults = set(range(min(budget, PAGES))), None, 0
    for page in [*range(PAGES)] * rounds:
        if page not in device:
            faults += 1
            device.remove(last)
            device.add(page)
        last = page
    return faults / rounds


fewest = {budget: faults_of_best_rule(budget, 150) for budget in per_step}
print("least recently used:", per_step)
print("best possible:", {budget: round(n, 1) for budget, n in fewest.items()})
assert set(per_step.values()) == {0, PAGES}
straight = [PAGES * max(0, PAGES - budget) / (PAGES - 1) for budget in fewest]
assert np.abs(np.subtract([*fewest.values()], straight)).max() < 0.1

# %% tags=["fold"]
figure, ax = plots.axes(
    x=f"budget, of {PAGES} pages", y="faults in each step", size=(6.4, 3.0)
)
ax.plot([*per_step], [*per_step.values()], "o", color=plots.PALETTE[0], markersize=8)
ax.plot([*fewest], [*fewest.values()], "o", color=plots.PALETTE[1], markersize=4)
ax.text(5, PAGES + 0.9, "least recently used", color=plots.PALETTE[0], weight="bold")
ax.text(2, 5.2, "best possible", color=plots.PALETTE[1], weight="bold")
ax.set(ylim=(-0.8, PAGES + 2.4), xticks=[1, 4, 8, 12, 16], yticks=range(0, 17, 4))
chapter.show(
    figure,
    "lru",
    alt=f"Faults in each step against the budget, from {min(per_step)} to {max(per_step)} pages. The points of the rule least recently used are at {PAGES} for every budget up to {PAGES - 1}, and at zero from {PAGES} on. The points of the best possible rule fall on a straight line from {PAGES} to zero.",
    caption=f"With one page too few, the rule of the least recently used page faults on all {PAGES} pages in each step. The best possible rule would fault {fewest[PAGES - 1]:.1f} times.",
)

# %% [markdown]
# With one page too few, *every* page faults. An optimizer walks through its state in the same order in each step, so the page it will need next is always the one it used
# longest ago, and that is the one that has just left. For programs in general, which tend to use again what they used last, the rule is a good one; for this walk it is the worst. Prefetching makes the
# waiting shorter, but the traffic remains.
#
# ## What goes wrong in practice
#
# - **Small tensors are not paged.** bitsandbytes pages tensors of at least 100,000 values; smaller ones, such as those of many adapters, stay on the device. On a CPU its paged
#   optimizers give a warning and do not page. Neither changes a result.
# - **No paging without hardware support.** Where the driver reports no concurrent managed access, as on Windows and under WSL, all managed memory is on the device whenever a kernel runs, so what does not fit cannot be paged there. Our CuPy version refuses such a device; the torch version copies its pages itself, and works.
# - **Traffic in every step.** The QLoRA paper reports the same speed as without paging, at batch size 16 on a 65-billion-parameter model, and gives no measurements for runs that page all the time. The experiment above shows that such a run may move the whole state in each step.
# - **Resuming.** A state dict taken while pages are dirty on the device must contain *them*, not the host's stale copies. Ours writes back first; a law saves with one size of page and loads with another.
#   With the paged AdamW of bitsandbytes, resuming has [ended with an error](https://github.com/axolotl-ai-cloud/axolotl/issues/864).
# - **Copies in the wrong order.** Our torch version copies on streams of its own. The copy out waits for the computation, a copy in for the last copy out of its page, the computation for the copy in, and memory is not reused before all of them have finished. If
#   one of these four is missing, the result is wrong now and then. A test runs this code on pretended streams; only tests marked `gpu` run it on those of a device; these ran on a GPU, an H200, and passed.
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
# 3. *Clean and dirty.* Touch one page, then take a step, and evict everything after each of the two. How many bytes do these evictions copy to the host?

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
# Paged optimizers are in section 3 of QLoRA [@dettmers2023]. The rule that is best possible is Belady's [@belady1966].
