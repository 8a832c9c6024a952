# %% [markdown]
# # What 4 bits cost on a GPU
#
# Four bits a weight save memory. Do they also save *time*? That depends on how many tokens are multiplied at
# once: for one token the bound is {=gain["A100"]:.1f=} times lower than that of 16 bits, for hundreds of tokens it is higher. This chapter derives these bounds: how the bytes lie, how a GPU fetches them, how many each of our kernels moves, and what bound follows from that on any device. All speeds are such bounds, except in one section near the end, which shows one run on a GPU.

# %%
import re
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from minipeft import kernels
from minipeft.lab import machine_code, plots
from minipeft.lab.chapter import start
from minipeft.lab.gpu import banks, bench, gpu_report, slots
from minipeft.lab.gpu.device import CupyDevice, unmeasured
from minipeft.lab.machine_code import MachineCode
from minipeft.lab.memory import LLAMA_7B, quantized_bits
from minipeft.reference import blockwise, double_quant

chapter = start("18_gpu_four_bits", steps=1, model=None)

# %% [markdown]
# ## The problem
#
# A GPU calculates much faster than it reads. Here are three devices: a T4, which free notebooks offer, an RTX 4090, made for games, and an A100, made for data centres. The numbers are those that their maker publishes
# [@nvidia2018; @nvidia2022; @nvidia2020]: bytes a second from memory, and floating-point operations a second, in float32 by the ordinary units and in float16 by the tensor cores.


# %%
class Device(NamedTuple):
    """Peak rates, as published: bytes and operations a second."""

    bandwidth: float
    float32: float
    tensor: float


DEVICES = {
    "T4": Device(320e9, 8.1e12, 65e12),
    "RTX 4090": Device(1008e9, 82.6e12, 165.2e12),
    "A100": Device(1555e9, 19.5e12, 312e12),
}
print("device     GB/s   Tflop/s   operations a byte: ordinary   tensor cores")
for name, device in DEVICES.items():
    ridge = [rate / device.bandwidth for rate in (device.float32, device.tensor)]
    print(
        f"{name:9s} {device.bandwidth / 1e9:5.0f}   {device.float32 / 1e12:7.1f}   {ridge[0]:27.0f}   {ridge[1]:12.0f}"
    )
A100 = DEVICES["A100"]
ridge = A100.tensor / A100.bandwidth

# %% [markdown]
# While an A100 fetches one weight of two bytes, its tensor cores could do {=2 * ridge:.0f=} operations. Multiplying one token with that weight needs two. So at these rates an A100 that generates text for one user waits for memory
# {=f"{1 - 1 / ridge:.1%}"=} of the time, and a weight of half a byte instead of two shortens the wait. With a thousand tokens for each weight it calculates all the time and does not wait for memory.
#
# ## The formula
#
# A GPU does not calculate by operations but by *instructions*: each of its multiprocessors has four schedulers, and a scheduler issues one instruction of one warp, 32 threads, a cycle. Decoding a weight of four bits is one multiplication, and several instructions. So let a kernel move $b$ bytes and issue $p$ instructions of warps, on a device that moves $\beta$ bytes and issues $\pi$ instructions a second. It cannot be faster than either:
#
# $$ t \ge \max\left(\frac{b}{\beta}, \frac{p}{\pi}\right), \qquad\text{or}\qquad \frac{p}{t} \le \min(\pi, \beta I) \quad\text{with } I = \frac{p}{b}. $$
#
# Drawn against the *intensity* $I$, instructions a byte, the second form is a sloping line under a flat one: the roofline [@williams2009]. Below the ridge $\pi/\beta$ memory is the bound, above it the instructions. They are counted [below](#what-the-instructions-cost), where we read the machine code.
#
# The bytes are no estimate. They are the sizes of the arrays that go in and come out, so they can be counted on arrays. Here is a matrix in both formats.

# %%
rng = np.random.default_rng(0)
W = rng.standard_normal((1024, 1024)).astype(np.float32)
q, nested = blockwise.quantize(W), double_quant.quantize(W)
N, RANK = W.size, 16
half, whole = 2 * N, 4 * N  # bytes of the weights in float16 and in float32
codes = q.packed.nbytes
scales = q.absmax.nbytes
nested_scales = nested.absmax_codes.nbytes + nested.nested_absmax.nbytes
nested_bytes = codes + nested_scales
state = 2 * (N + 4 * N // 256)  # m and v: a byte a value, a scale for 256
lora = 2 * RANK * sum(W.shape)  # A and B, in float16

# Bytes of one launch, weights in 16 bits. Vectors and thin matrices are left out: they are
# small beside the weight, and stay in the caches.
TRAFFIC = {
    "quantize": half + codes + scales,
    "dequantize": codes + scales + half,
    "dequantize_nested": nested_bytes + half,
    "product": codes + scales,
    "adamw": 3 * half + 4 * whole,
    "adamw_8bit": 3 * half + 2 * state,
    "shrink and expand": lora,
    "row_norm": half,
    "row_norm_mixed": half,
}
print("kernel               bytes a weight")
for name, moved in TRAFFIC.items():
    print(f"{name:18s}   {moved / N:14.4f}")
per_weight = {name: moved / N for name, moved in TRAFFIC.items()}
assert per_weight["dequantize"] == 4 / 8 + 4 / 64 + 2
assert per_weight["adamw_8bit"] == 6 + 4 + 16 / 256
separate = nested_scales + scales  # a kernel of its own writes the scales as float32
separate += codes + scales + half  # and the next one reads them

# %% [markdown]
# The comment that opens each kernel file derives these counts for any dtype, code and block size. Three of them:
#
# - **Dequantizing writes {=2 / (per_weight["dequantize"] - 2):.1f=} times as much as it reads**: {=per_weight["dequantize"] - 2:.4f=} bytes in, 2 out. Codes of two bits instead of four would save {=0.25 / per_weight["dequantize"]:.0%=} of its bytes.
# - **Double quantization, fused.** Decoding the scales inside the kernel moves {=per_weight["dequantize_nested"]:.3f=} bytes a weight; decoding them first into an array of their own, {=separate / N:.3f=}.
# - **AdamW with states of eight bits** moves {=per_weight["adamw_8bit"]:.2f=} bytes instead of {=per_weight["adamw"]:.0f=}. It saves memory, and it moves fewer bytes too; whether it is faster, its instructions decide.

# %% [markdown]
# ## The layout
#
# A quantized tensor is two arrays: the codes, two to a byte, and the scales. Blocks of 64 run on across the ends of rows.

# %% tags=["fold"]
rows, columns, block = 4, 96, 64
figure, ax = plots.axes(x="column", y="row", size=(6.4, 1.9))
for number in range(rows * columns // block):
    color = plots.PALETTE[number % 2]
    first, last = number * block, (number + 1) * block
    for row in range(first // columns, (last - 1) // columns + 1):
        left, right = max(first, row * columns), min(last, (row + 1) * columns)
        box, wide = (left - row * columns, row + 0.06), right - left - 0.4
        ax.add_patch(Rectangle(box, wide, 0.88, color=color, alpha=0.4, linewidth=0))
        ax.text(
            (left + right) / 2 - row * columns,
            row + 0.5,
            f"scale {number}",
            color=plots.INK,
            ha="center",
            va="center",
            fontsize=9,
        )
ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=range(0, columns + 1, 16))
ax.set_yticks(np.arange(rows) + 0.5, range(rows))
ax.grid(visible=False)
chapter.show(
    figure,
    "layout",
    alt=f"A matrix of {rows} rows and {columns} columns, coloured by block: block 0 fills the first {block} columns of row 0, block 1 the other {columns - block} and the first {2 * block - columns} of row 1, and so on, {rows * columns // block} blocks in all.",
    caption=f"Blocks of {block} do not end where rows of {columns} end: {rows} rows hold {rows * columns // block} blocks and as many scales.",
)

# %%
small = blockwise.quantize(W[:4, :96])
print("codes ", small.packed.shape, small.packed.dtype, " scales", small.absmax.shape)
print("bytes of the first block:", small.packed[:32].tobytes().hex(" ", 4))
assert small.packed.nbytes == 4 * 96 // 2
assert small.absmax.size == 4 * 96 // 64

# %% [markdown]
# Why two arrays, and not each scale in front of its codes? The next section compares the two.
#
# ## How a warp reads
#
# Threads run in warps of 32. When a warp executes a load, there are 32 addresses, and memory answers in **sectors of 32 bytes**: every sector that holds a wanted byte is fetched whole [@nvidia2026]. The cost of a load is the number of
# its sectors, and its efficiency is how much of them was wanted. That can be calculated.


# %%
def efficiency(first, width):
    """Return the share of fetched bytes that lanes want, and each sector's share.

    Args:
        first: the address of each of 32 lanes, in bytes.
        width: bytes that a lane loads from there on.
    """
    wanted = np.unique(first[:, None] + np.arange(width))
    _, used = np.unique(wanted // 32, return_counts=True)
    return wanted.size / (32 * used.size), used / 32


lane = np.arange(32)
READS = {
    "lane i takes the i-th 16 bytes": (16 * lane, 16),
    "lane i takes the i-th byte": (lane, 1),
    "lane i takes 16 bytes of its own row": (2048 * lane, 16),
    "lane i takes a byte of its own block": (32 * lane, 1),
    "each scale in front of its codes": (20 * (lane // 4) + 4 + 4 * (lane % 4), 4),
}
print("load                                    bytes wanted   sectors   efficiency")
shares = {}
for name, (first, width) in READS.items():
    share, shares[name] = efficiency(first, width)
    print(f"{name:38s}  {32 * width:12d}   {shares[name].size:7d}   {share:10.0%}")

# %% tags=["fold"]
figure, ax = plots.axes(x="sectors fetched by one load of a warp", size=(6.4, 3.9))
for row, (name, used) in enumerate(shares.items()):
    for at, share in enumerate(used):
        box = (at + 0.08, row + 0.38)
        ax.add_patch(Rectangle(box, 0.84, 0.5, color=plots.FAINT, linewidth=0))
        ax.add_patch(
            Rectangle(
                (at + 0.08, row + 0.88 - 0.5 * share),
                0.84,
                0.5 * share,
                color=plots.PALETTE[0],
                linewidth=0,
            )
        )
    ax.text(
        0,
        row + 0.3,
        f"{name}: {used.mean():.0%}",
        color=plots.INK,
        ha="left",
        va="bottom",
        fontsize=9,
    )
ax.set(xlim=(0, 32), ylim=(len(shares), 0), yticks=[], xticks=range(0, 33, 8))
ax.spines["left"].set_visible(False)
ax.grid(visible=False)
chapter.show(
    figure,
    "sectors",
    alt=f"Five ways to read packed codes, as rows of boxes, one for each sector, filled as far as its bytes are wanted. {'; '.join(f'{n}: {u.size} of {lane.size} boxes, {u.mean():.0%} full' for n, u in shares.items())}.",
    caption=f"Of the bytes that a warp fetches it wants {shares['lane i takes the i-th 16 bytes'].mean():.0%} if neighbours load neighbouring bytes, {shares['lane i takes 16 bytes of its own row'].mean():.0%} if each loads from its own row, and {shares['lane i takes a byte of its own block'].mean():.0%} if each loads a byte of its own block.",
)

# %% [markdown]
# - **Neighbours take neighbouring 16 bytes**: everything fetched is wanted, and one instruction moves 512 bytes. 16 bytes are the most that a lane of these devices can load at once.
# - **A byte each** wastes nothing either, but needs sixteen instructions and sixteen addresses for the same bytes.
# - **Each lane its own row, or its own block**, is how one would write it for a CPU. Half of what is fetched is wanted, or a thirty-second part. The next load of the same lane may find the rest in a cache, if nothing has displaced it.
# - **Each scale in front of its codes** is the layout of many files: in GGUF's `Q4_1`, four bytes for scale and offset, then 16 of codes, for every 32 weights. A CPU reads it well. On a GPU a block begins at every 20th byte, so the codes of only one block in four begin at a multiple of 16, as a load of 16 bytes must, and neighbouring lanes with four bytes of codes each want {=f"{shares['each scale in front of its codes'].mean():.0%}"=} of the bytes that are fetched.
#
# Stores obey the same law, with one more difficulty. A lane that loaded 16 bytes holds 32 codes, which become 64 bytes of float16: four stores. If each lane stores its own, then in each of the four the lanes are 64 bytes apart.

# %%
own, _ = efficiency(64 * lane, 16)
neighbours, _ = efficiency(16 * lane, 16)
print(f"stores: its own values {own:.0%}, neighbouring values {neighbours:.0%}")

# %% [markdown]
# Each store touches half of each of 32 sectors, where neighbouring stores fill 16: four stores either way, but every sector is visited twice. In a whole tile of 4-bit codes our kernel avoids this: lane $i$ loads the $i$-th four bytes, whose eight values are one store. In other tiles it exchanges the codes between lanes, after loading and before storing, in *shared memory*: lane $i$ loads the $i$-th 16 bytes, and later stores the $i$-th 16 bytes, of other values.
#
# ## The code
#
# The shape of all unpacking kernels stands in one header.
#
# @source minipeft.kernels.unpack:unpack
# @source minipeft.kernels.unpack:unpack_whole
#
# `dequantize` decodes a scale by reading it. `dequantize_nested` decodes it from eight bits on the way, and computes all else alike.
#
# @source minipeft.kernels.blockwise:dequantize
#
# @source minipeft.kernels.double_quant:dequantize_nested
#
# For generating text, the weight is not written at all: each warp decodes 128 codes of 16 rows into registers, multiplies them on tensor cores, and goes on. Up to 64 rows of $x$ share one decoding. (In float32, which tensor cores do not multiply exactly, ordinary units do it for four rows.)
#
# @source minipeft.kernels.qlora:add_columns
# @source minipeft.kernels.qlora:product_16
#
# The same thing in the reference is two calls, one after the other:
#
# @source minipeft.reference.qlora.forward
#
# ## The machine code
#
# Does the compiler do what the source means? NVRTC, NVIDIA's compiler as a library, needs no GPU, and neither does the disassembler. So we compile for an A100 (`sm_80`) and read the result. First the memory instructions of `dequantize<__half>`, in order:


# %%
UNREAD = machine_code.missing()
if UNREAD:
    print(f"not read here: {UNREAD}")
else:
    code = slots.disassembled("blockwise", "80")["dequantize<__half>"]
    memory = re.compile(r"\b(LDG|STG|LDS|STS|BAR)\.\S+")
    seen = [found[0] for i in code.instructions if (found := memory.search(i))]
    runs = [(name, len(list(same))) for name, same in groupby(seen)]
    print(f"{len(code.instructions)} instructions, of which touch memory or wait:")
    said = " ".join(name if n == 1 else f"{name}(x{n})" for name, n in runs)
    print(fill(said, 84, break_on_hyphens=False))
    assert code.count("LDG", 128) >= 1 <= code.count("STG", 128)

# %% [markdown]
# How to read it: `LDG` loads from global memory and `STG` stores there, `LDS` and `STS` do the same in shared memory, `BAR` is the barrier between the two halves of the kernel. `.128` are the 16-byte accesses. A byte
# from global memory (`LDG.E.U8`) and the two-byte stores belong to the tail of a tensor, where a whole vector would reach too far; the compiler has laid the loop out twice. If a compiler ever fails to merge the eight stores of a vector into one, this is where it shows, and a test counts them.
#
# The other question is how many threads fit. A multiprocessor of an A100 holds 64 warps, and divides 65,536 registers and 164 KB of shared memory among them [@nvidia2020]. What a kernel uses decides how many warps are there to take over while others wait for memory: its **occupancy**.
#
# @source minipeft.lab.machine_code.MachineCode.occupancy


# %%
CHOSEN = [
    (kernels.QUANTIZE, "float32"),
    (kernels.QUANTIZE, "float16"),
    (kernels.DEQUANTIZE, "float16"),
    (kernels.DEQUANTIZE_NESTED, "float16"),
    (kernels.PRODUCT_4BIT, "float16"),
    (kernels.ADAMW, "float32"),
    (kernels.ADAMW_8BIT, "float32"),
    (kernels.ROW_NORM, "float16"),
    (kernels.ROW_NORM_MIXED, "float16"),
]
if not UNREAD:
    print(
        "kernel                      registers  spilled  shared  LDG.128  STG.128  occupancy"
    )
    for kernel, dtype in CHOSEN:
        expression = kernel.expression(dtype)
        code = slots.disassembled(kernel.row, "80")[expression]
        wide = [code.count(name, 128) for name in ("LDG", "STG")]
        print(
            f"{expression:26s}  {code.registers:9d}  {code.local:7d}  {code.shared:6d}  {wide[0]:7d}  {wide[1]:7d}  {code.occupancy():9.0%}"
        )
        assert code.local == 0
        assert code.occupancy() >= 0.25

# %% [markdown]
# No register is spilled to memory anywhere, and each kernel leaves room for at least a quarter of the warps. More is not always better: what counts is how many bytes are on their way at once, and a thread that loads 16 bytes at a time
# needs fewer neighbours to keep the memory busy. These counts are kept in a file for every kernel, dtype and four generations of GPUs, and a test fails when one gets worse. The [next chapter](19_kernels_without_a_gpu.md) is about such tests.
#
# ### What the instructions cost
#
# We look in the machine code for the shortest run that does a thread's work, without the slow paths and the ends of tensors, and divide its instructions by the thread's values. Each instruction also goes to a *pipe*: a pipe of 16 lanes is busy for two cycles with the 32 lanes of a warp. NVIDIA publishes how many results each kind of instruction gives a cycle [@nvidia2026b], and
# which pipe it takes [@nvidia2026c]. Shared memory has {=banks.BANKS=} banks: lanes that read different words of one bank come one after another, and the cycles that they wait are counted too, for typical numbers. The larger of the two numbers of cycles is what the instructions cost. The *cap* is the share of the memory's speed that they leave. An A100 has {=slots.A100.multiprocessors=} multiprocessors at {=slots.A100.clock / 1e9:.2f=} GHz, an H100 has {=slots.H100.multiprocessors=} at {=slots.H100.clock / 1e9:.2f=} GHz and {=slots.H100.bandwidth / 1e9:.0f=} GB/s [@nvidia2022b].


# %%
COUNTED = [kernel for kernel, _ in CHOSEN[1:]]  # each once
GPUS, waited = {"A100": slots.A100, "H100": slots.H100}, banks.waits("adamw_8bit")
caps, intensity = {}, {}
if not UNREAD:
    print("                    instructions a value         cap       bound by")
    print("kernel, bfloat16    sm_80   sm_90  sm_100   A100  H100    on an H100")
    for kernel in COUNTED:
        name, moved = kernel.template, per_weight[kernel.template]
        costs = {a: slots.cost(kernel, "bfloat16", a) for a in slots.ARCHITECTURES}
        reached = {}
        for device, gpu in GPUS.items():
            cost = costs[gpu.architecture]
            reached[device] = min(1, moved / gpu.bandwidth / cost.seconds(1, gpu))
            intensity[name, device] = cost.cycles / machine_code.WARP / moved
        caps[name] = reached
        issued = "  ".join(f"{cost.issue:6.1f}" for cost in costs.values())
        limit = "memory" if reached["H100"] == 1 else costs["90"].limit
        print(
            f"{name:17s}  {issued}   {reached['A100']:4.0%}  {reached['H100']:4.0%}    {limit}"
        )
    memory_bound = set(caps) - {"quantize", "product", "adamw_8bit"}
    repeated = [reached["A100"] for n, reached in caps.items() if n != "quantize"]
    least = min([*repeated, *(caps[name]["H100"] for name in memory_bound)])
    slower = caps["adamw_8bit"]["H100"], caps["product"]["H100"]
    chapter.claim(
        "memory is the bound of each repeated kernel on an A100, and of all but two on an H100",
        least == 1 and 0.65 < slower[0] < slower[1] < 0.9,
        control="the time in which a copy moves the same bytes",
    )

# %% tags=["fold"]
figure, ax = plots.axes(
    x="instructions of a warp a byte",
    y="instructions a second, at most",
    size=(6.4, 4.2),
)
at = np.geomspace(0.02, 2, 400)
for color, (device, gpu) in zip(plots.PALETTE, GPUS.items(), strict=False):
    ax.plot(at, np.minimum(gpu.slots, gpu.bandwidth * at), color=color)
    ax.text(
        1.9,
        gpu.slots * 1.06,
        device,
        color=color,
        weight="bold",
        ha="right",
        va="bottom",
    )
on_h100 = {name: i for (name, device), i in intensity.items() if device == "H100"}
left = 0.0
for name, i in sorted(on_h100.items(), key=lambda pair: pair[1]):
    crowded, left = i < 1.15 * left, i
    top = min(slots.H100.slots, slots.H100.bandwidth * i)
    ax.plot([i, i], [2e10, top], color=plots.INK, linewidth=0.7)
    ax.text(
        i,
        2.2e10,
        name,
        rotation=90,
        color=plots.INK,
        ha="left" if crowded else "right",
        va="bottom",
        fontsize=8,
    )
ax.set(xscale="log", yscale="log", ylim=(2e10, 2e12), xlim=(0.02, 2))
ax.set_yticks([1e11, 1e12], ["100 G", "1 T"])
ax.set_xticks([0.1, 1], ["0.1", "1"])
ax.minorticks_off()
ridge_h100 = slots.H100.slots / slots.H100.bandwidth
below = sum(i < ridge_h100 for i in on_h100.values())
chapter.show(
    figure,
    "roofline",
    alt="Rooflines of an A100 and an H100 against instructions of a warp a byte, and thin vertical lines where our kernels lie on the H100: decoding, AdamW and DoRA's norms under its slope; the product, AdamW of eight bits and quantizing at the right of its ridge.",
    caption=f"An H100 is bounded by memory below {ridge_h100:.2f} instructions of a warp a byte. {below} of our {len(on_h100)} kernels need fewer.",
)

# %% [markdown]
# Each thin line is a kernel on an H100, and the height at which it meets the roof is the largest number of its instructions that can be issued in a second. Under the slope a kernel's time is the time of its bytes: it should move no byte twice, and read and write neighbouring bytes together. Beyond the ridge only fewer instructions help.
#
# **Why the norms and the product use tensor cores.** At rank {=slots.RANK=} the products of DoRA's norms are {=slots.RANK=} instructions a weight by ordinary units, and an H100 has time for {=2 * ridge_h100 * 32:.0f=} while it reads two bytes; loading, widening and squaring come on top. One instruction of the tensor cores does 16 ranks of four weights of a thread.
# In training $W$ has 16 bits and $A$ and $B$ are float32 (`row_norm_mixed`). A float32 number is the sum of three of bfloat16; six of the nine products of two such sums are as exact as a product in float32, and take six instructions.
# The 4-bit product looks up, scales and rounds a weight; widening it to float32 and adding would be two instructions more for one row of $x$, and at least one more for each further row. Tensor cores take the rounded weight as it is, eight rows at a time.
#
# **Why three kernels stay above the ridge.** `quantize` searches among the boundaries for each value, and runs once in the life of a model. An H100 has time for {=per_weight["product"] * ridge_h100 * 32:.1f=} instructions while it reads a weight of 4.5 bits. Finding its place in the table, adding the table's address, looking it up, scaling, and half a rounding are 4.5, and what is left are loads and loops. AdamW with states of eight bits has time for {=per_weight["adamw_8bit"] * ridge_h100 * 32:.0f=} a value, and two searches
# of eight levels, at most four instructions each, are 60; two divisions and a root, rounded as IEEE 754 says, are about 30, and decoding, scaling and the updates are the rest. All of it is needed for the same bits as the reference. In its tables of 256 values lanes also wait for banks, {=waited:.1f=} cycles a value, and the memory pipe stays below the other limits because the midpoints are stored as a tree: in a sorted table all lanes of the first steps read one bank.
#
# ## The proof
#
# Two laws about the addresses of a tile that goes through shared memory, for every width of codes and of results: the loads touch every byte of a tile once and only whole sectors, and so do the stores.

# %%
TILE, THREADS = 8192, 256
for bits in (1, 2, 3, 4):
    packed = TILE // 8 * bits
    addresses = 16 * np.arange(THREADS)
    addresses = addresses[addresses < packed]
    touched = (addresses[:, None] + np.arange(16)).ravel()
    assert np.array_equal(touched, np.arange(packed))
    for warp in range(0, addresses.size, 32):
        assert efficiency(addresses[warp : warp + 32], 16)[0] == 1
for size in (2, 4):  # bytes of a result
    values = 16 // size
    firsts = np.arange(0, TILE, values)  # thread 0, 1, …, 255, 0, 1, …
    touched = (firsts[:, None] + np.arange(values)).ravel()
    assert np.array_equal(touched, np.arange(TILE))
    for warp in range(0, firsts.size, 32):
        assert efficiency(size * firsts[warp : warp + 32], 16)[0] == 1
print("every byte once, every sector whole: 1 to 4 bits in, 2 and 4 bytes out")

# %% [markdown]
# That the *values* are right, bit for bit, is tested on machines without a GPU: see the [next chapter](19_kernels_without_a_gpu.md).
#
# ## The experiment: one token, or a thousand
#
# Now the question of the beginning. One layer of 4096 × 4096, and $T$ tokens at a time. Three ways:
#
# 1. **float16**: read 2 bytes a weight, multiply on tensor cores;
# 2. **dequantize, then multiply**: read the codes, write float16, read it again, multiply on tensor cores;
# 3. **fused**: our `product`. It reads the codes once for 64 tokens, decodes them, and multiplies on tensor cores, eight tokens at a time.
#
# Each has a bound; the third one's decoding is counted in instructions. And for each 16 outputs it reads its tokens anew from the L2 cache: at 64 tokens that is {=2 * 64 / 16:.0f=} bytes a weight, many more than the codes. NVIDIA says how much an A100's L2 delivers in a cycle [@nvidia2020], and nothing of the RTX 4090's, for which these bytes are left out. The instructions are those of the code for an A100, for both devices. (A T4 has no such instruction of the tensor cores; in our kernel its lanes exchange the numbers.) Bounds are no timings. But no kernel is faster than its bound.


# %%
SIDE = 4096
weights = SIDE * SIDE
IN_FOUR = weights * quantized_bits(4, 64) / 8


def at_least(device, moved, done, rate):
    """Return the bound in seconds."""
    return np.maximum(moved / device.bandwidth, done / rate)


def float16(device, tokens):
    """Read the weight, x and y; two operations a weight and token."""
    moved = 2 * weights + 2 * 2 * SIDE * tokens
    return at_least(device, moved, 2 * weights * tokens, device.tensor)


def dequantize_first(device, tokens):
    """Write the weight as float16, then as above."""
    return (IN_FOUR + 2 * weights) / device.bandwidth + float16(device, tokens)


SLOTS = {DEVICES["RTX 4090"]: 4 * 128 * 2.52e9, A100: slots.A100.slots}  # a second
L2 = {DEVICES["RTX 4090"]: np.inf, A100: 5120 * slots.A100.clock}  # bytes a second


def fused(device, tokens):
    """Decode for each 64 tokens; multiply for each eight; read x for each 16 outputs."""
    moved = IN_FOUR * np.ceil(tokens / 64) + 2 * 2 * SIDE * tokens
    done = 2 * weights * 8 * np.ceil(tokens / 8)
    cycles = [0 if UNREAD else slots.product_cycles(t, "80") for t in tokens.tolist()]
    decoding = weights / machine_code.WARP * np.array(cycles) / SLOTS[device]
    bound = at_least(device, moved, done, device.tensor)
    return np.maximum.reduce([bound, decoding, weights * tokens / 8 / L2[device]])


T = np.arange(1, 1025)
WAYS = {
    "float16": float16,
    "dequantize, multiply": dequantize_first,
    "fused": fused,
}
bounds = {
    name: {way: bound(device, T) for way, bound in WAYS.items()}
    for name, device in DEVICES.items()
    if device in SLOTS
}
print(
    "            1 token: fused   dequantize first   fused is best up to   tensor cores"
)
print("            against float16  against float16    this many tokens      busy from")
gain, slower, best_below, busy = {}, {}, {}, {}
for name, of in bounds.items():
    device = DEVICES[name]
    gain[name] = of["float16"][0] / of["fused"][0]
    slower[name] = of["dequantize, multiply"][0] / of["float16"][0]
    others = np.minimum(of["float16"], of["dequantize, multiply"])
    best_below[name] = int(T[of["fused"] > others][0]) - 1
    computing = 2 * weights * T / device.tensor
    busy[name] = int(T[of["float16"] <= computing][0])
    print(
        f"{name:9s}   {gain[name]:11.2f} x      {slower[name]:6.2f} x slower    {best_below[name]:12d}   {busy[name]:18d}"
    )
late = {way: bounds["A100"][way][-1] for way in WAYS}
assert all(3.5 < ratio < 3.6 for ratio in gain.values())
assert all(tokens > 64 for tokens in best_below.values())
assert all(ratio > 2 for ratio in slower.values())

# %% tags=["fold"]
figure, ax = plots.axes(
    x="tokens at a time, on an A100", y="microseconds, at least", size=(6.4, 3.8)
)
for color, seconds in zip(plots.PALETTE, bounds["A100"].values(), strict=False):
    ax.plot(T, 1e6 * seconds, color=color)
of = {way: 1e6 * seconds for way, seconds in bounds["A100"].items()}
for color, (way, label, height) in zip(
    plots.PALETTE,
    (
        ("float16", "float16", 1.2),
        ("dequantize, multiply", "dequantize first", 1.2),
        ("fused", "4 bits, fused", 0.82),
    ),
    strict=False,
):
    ax.text(1.1, height * of[way][0], label, color=color, weight="bold", va="center")
for tokens, side in ((best_below["A100"], "right"), (busy["A100"], "left")):
    ax.axvline(tokens, color=plots.INK, linewidth=0.7)
    ax.text(tokens, 480, f" {tokens} tokens ", color=plots.INK, ha=side)
ax.set(xscale="log", yscale="log", ylim=(4, 700), xlim=(1, 1024))
ax.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
ax.set_yticks([10, 100], ["10", "100"])
ax.minorticks_off()
chapter.show(
    figure,
    "tokens",
    alt="Lower bounds of the time of one layer on an A100 against the number of tokens, on logarithmic axes. The curve of fused 4 bits begins lowest and meets that of float16; the curve of dequantizing first begins highest and approaches float16 at the right. Two vertical lines mark up to where fused is lowest and where the tensor cores are busy.",
    caption=f"For one token, fused 4 bits are bounded at 1/{gain['A100']:.1f} of the time of float16 and dequantizing first at {slower['A100']:.1f} times it. Fused is ahead up to {best_below['A100']} tokens; from {busy['A100']} on, the tensor cores are the bound.",
)

# %% [markdown]
# Three regimes, on both devices:
#
# - **One token**: the bytes give the bound, and 4.5 bits against 16 are a factor of {=gain["A100"]:.2f=}. On a device with faster memory, such as an H100, decoding takes longer than the bytes, as the table of instructions says, and the factor is smaller.
#   And it holds only if the kernel is fused: dequantizing first takes {=slower["A100"]:.1f=} times as long as float16, since the weight is read, written and read again.
# - **Tens of tokens**: on an A100 the gain is {=bounds["A100"]["float16"][15] / bounds["A100"]["fused"][15]:.1f=} at 16 tokens and {=bounds["A100"]["float16"][63] / bounds["A100"]["fused"][63]:.1f=} at 64, where reading the tokens is the bound. Fused is ahead up to {=best_below["A100"]=} by these bounds, on an RTX 4090 up to {=best_below["RTX 4090"]=}. Ours takes 64 at a time; with more, the torch column dequantizes once and calls the library's product.
# - **From {=busy["A100"]=} tokens on**, as in training, an A100 is busy calculating, and the width of the weights no longer matters. Dequantizing is then overhead: {=f"{late['dequantize, multiply'] / late['float16'] - 1:.0%}"=} of the layer at {=T[-1]=} tokens. QLoRA saves memory in training, and pays for it in time.
#
# For a whole model the first regime reads like this. Generating one token means reading every weight of the linear layers once:

# %%
rest = 2 * LLAMA_7B.vocabulary * LLAMA_7B.width  # bytes of the output layer, 16 bits
FORMATS = {
    "float16": 16,
    "NF4": quantized_bits(4, 64),
    "nested": quantized_bits(4, 64, 256),
}
print("7 billion parameters, tokens a second for one user, at most:")
print("device     " + "   ".join(f"{name:>7s}" for name in FORMATS))
for name, device in DEVICES.items():
    rates = [
        device.bandwidth / (LLAMA_7B.linear_parameters * bits / 8 + rest)
        for bits in FORMATS.values()
    ]
    print(f"{name:9s}  " + "   ".join(f"{rate:7.0f}" for rate in rates))
assert rates == sorted(rates)

# %% [markdown]
# ## Measured, where there is a GPU
#
# Everything up to here was calculated. On a machine with a GPU, `--device cuda` runs what `minipeft gpu-report` runs: every kernel is checked against the reference to the byte, then timed by the GPU's own clock with a cold cache, and set beside the bounds above, with the *measured* speed of a copy in the
# place of the published one.

# %%
reason = unmeasured(chapter.device)
if reason:
    print(f"not measured here: {reason}")
else:
    wrong = gpu_report.run(chapter.out, CupyDevice())
    assert not wrong

# %% [markdown]
# `make gpu` runs all that only a device can show, this chapter and the others too, in stages of at most nine minutes, and writes a folder of results. The summary of the committed folder is shown here; the folder's README says how this run was made. Where `ours / theirs` is below 1, ours took less time: in the five rows of single kernels. The three training steps took longer than those of bitsandbytes and peft, with less memory; the host was what took longer. The folder's README has two later measurements of the step of DoRA, and what each kernel reaches of its bound: several reach much less than the calculation above allows.

# %%
print(bench.summary(Path(__file__).with_name("results") / "gpu"))

# %% [markdown]
#
# ## What goes wrong in practice
#
# - **4 bits, and slower.** Until 2026 bitsandbytes had at most a fused kernel for a single row ([884](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/884)), and everything else dequantized first: reports of 4 bits running behind 8 or 16
#   ([518](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/518), [611](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/611)) look like the second curve of the figure. Then came kernels for more rows
#   ([1949](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1949)). Up to how many rows they are used depends on the GPU and on the shape of the weight.
# - **Indices of 32 bits.** A tensor of $2^{30}$ weights is a large embedding. Beyond it, bitsandbytes' quantization computed its indices in `int` and they overflowed ([1784](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1784)). Our kernels count weights in 64 bits.
# - **Fast maths.** `--use_fast_math` replaces division by an approximation and flushes small numbers to zero. bitsandbytes is built with it, so near a boundary its codes may differ. CuPy adds `-ftz=true` to everything that it compiles from source; our launcher
#   compiles by itself for that reason.
# - **Fused is not the same number.** A fused product adds in another order than dequantizing and multiplying; [a difference of 4.9e-4](https://github.com/MakazhanAlpamys/Soup/issues/776) in float16 was reported. It is rounding, and has a bound.
# - **Timings that are too good.** A launch returns before the kernel has run, so a stopwatch on the host times the launch. And a layer of 4096 × 4096 in 4 bits, {=IN_FOUR / 1e6:.1f=} MB, stays in the cache of an A100, which is larger: timed in a loop, it is read from the cache, and the result is faster than the memory can be.
#
# ## Exercises
#
# 1. *Smaller blocks.* Blocks of 32 are more accurate. What do they cost when generating with one token at a time, and what does double quantization give back?

# %% tags=["solution"]
for size in (32, 64, 128):
    plain, doubled = (16 / quantized_bits(4, size, n) for n in (None, 256))
    print(f"blocks of {size:3d}: {plain:.2f} x float16, nested {doubled:.2f} x")
assert 16 / quantized_bits(4, 32, 256) > 16 / quantized_bits(4, 64)

# %% [markdown]
# 2. *Two bytes at a time.* Suppose each lane stored its 32 decoded float16 values one by one. How efficient is one such store, and how many does the warp need?

# %% tags=["solution"]
single, _ = efficiency(64 * lane, 2)
print(f"{single:.1%} of each sector, 32 stores instead of 4")
assert single == 2 / 32

# %% [markdown]
# 3. *A transposed weight.* The backward pass multiplies with $W$, not $W^T$: lanes walk down a column. How do codes, scales and sectors behave if lane $i$ wants the 4-bit code of row $i$ in one column of a matrix with 4096 columns?

# %% tags=["solution"]
down, _ = efficiency(lane * SIDE // 2, 1)
blocks_met = np.unique(lane * SIDE // 64).size
print(f"{down:.1%} of the sectors wanted, and {blocks_met} scales for 32 weights")
assert down == 1 / 32
assert blocks_met == 32

# %% [markdown]
# 4. *Fewer registers.* To how many registers would `product<__half>` have to shrink for an A100 to hold all 64 warps? (The table above says how many it uses now.)

# %% tags=["solution"]
full_house = [r for r in range(16, 256) if MachineCode(r, 64, 0, ()).occupancy() == 1]
most = max(full_house)
print(
    f"{most} registers a thread for all 64 warps; 64 registers give {MachineCode(64, 64, 0, ()).occupancy():.0%}"
)
assert most == 32

# %% [markdown]
# ## References
#
# The roofline is by Williams, Waterman and Patterson [@williams2009]. How memory is accessed, and how large a multiprocessor is, NVIDIA describes in its programming guide [@nvidia2026] and in the papers that came with each
# generation [@nvidia2018; @nvidia2020; @nvidia2022].
