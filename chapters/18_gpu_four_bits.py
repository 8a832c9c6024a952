# %% [markdown]
# # What 4 bits cost on a GPU
#
# Four bits a weight save memory. Do they also save *time*? That depends on how many tokens are multiplied at
# once: for one token the bound is 3.6 times lower than that of 16 bits, for hundreds of tokens it is higher. This chapter derives these bounds: how the bytes lie, how a GPU fetches them, how many each of our kernels moves, and what bound follows from that on any device. All speeds here are such bounds, and none is a measurement.

# %%
import re
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from minipeft import kernels
from minipeft.cupy import executor
from minipeft.lab import machine_code, plots
from minipeft.lab.chapter import start
from minipeft.lab.gpu import gpu_report, slots
from minipeft.lab.gpu.device import CupyDevice
from minipeft.lab.gpu.launches import OPERATIONS
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
# While an A100 fetches one weight of two bytes, its tensor cores could do {=2 * ridge:.0f=} operations. Multiplying one token with that weight needs two. So a GPU that generates text for one user waits for memory
# {=f"{1 - 1 / ridge:.1%}"=} of the time at least, and a weight of half a byte instead of two shortens the wait. With a thousand tokens for each weight it calculates all the time and does not wait for memory.
#
# ## The formula
#
# Let a kernel move $b$ bytes and do $p$ operations on a device that moves $\beta$ bytes and does $\pi$ operations a second. It cannot be faster than either:
#
# $$ t \ge \max\left(\frac{b}{\beta}, \frac{p}{\pi}\right), \qquad\text{or}\qquad \frac{p}{t} \le \min(\pi, \beta I) \quad\text{with } I = \frac{p}{b}. $$
#
# Drawn against the *intensity* $I$, operations a byte, the second form is a sloping line under a flat one: the roofline [@williams2009]. Below the ridge $\pi/\beta$ memory is the bound, above it arithmetic.
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

rows, columns = W.shape
matrix = {"n": N, "in_features": columns, "out_features": rows, "r": RANK}


def operations(*names, tokens=1, r=RANK):
    """Count as the report of a GPU does, and the head of each kernel's file."""
    sizes = matrix | {"tokens": tokens, "r": r}
    return sum(OPERATIONS[name](sizes) for name in names)


# (bytes, operations) of one launch. Vectors and thin matrices are left out: they are small
# beside the weight, and stay in the caches.
TRAFFIC = {
    "quantize": (half + codes + scales, operations("quantize")),
    "dequantize": (codes + scales + half, operations("dequantize")),
    "dequantize_nested": (nested_bytes + half, operations("dequantize_nested")),
    "product, 1 row": (codes + scales, operations("product", r=0)),
    "product, 4 rows": (codes + scales, operations("product", tokens=4, r=0)),
    "adamw": (7 * whole, operations("adamw")),
    "adamw_8bit": (3 * whole + 2 * state, operations("adamw_8bit")),
    "shrink and expand": (lora, operations("shrink", "expand")),
    "row_norm": (half, operations("row_norm")),
}
print("kernel               bytes a weight   operations a weight   operations a byte")
for name, (moved, done) in TRAFFIC.items():
    print(f"{name:18s}   {moved / N:14.4f}   {done / N:19.2f}   {done / moved:17.2f}")
per_weight = {name: moved / N for name, (moved, _) in TRAFFIC.items()}
assert per_weight["dequantize"] == 4 / 8 + 4 / 64 + 2
assert per_weight["adamw_8bit"] == 12 + 4 + 16 / 256
separate = nested_scales + scales  # a kernel of its own writes the scales as float32
separate += codes + scales + half  # and the next one reads them

# %% [markdown]
# The comment that opens each kernel file derives these counts for any dtype, code and block size. Three of them:
#
# - **Dequantizing writes {=2 / (per_weight["dequantize"] - 2):.1f=} times as much as it reads**: {=per_weight["dequantize"] - 2:.4f=} bytes in, 2 out. Codes of two bits instead of four would save {=0.25 / per_weight["dequantize"]:.0%=} of its bytes.
# - **Double quantization, fused.** Decoding the scales inside the kernel moves {=per_weight["dequantize_nested"]:.3f=} bytes a weight; decoding them first into an array of their own, {=separate / N:.3f=}.
# - **AdamW with states of eight bits** moves {=per_weight["adamw_8bit"]:.2f=} bytes instead of {=per_weight["adamw"]:.0f=}, for about twice the operations. It saves memory, and it moves fewer bytes too.

# %% tags=["fold"]
figure, ax = plots.axes(
    x="operations a byte", y="operations a second, at most", size=(6.4, 4.2)
)
intensity = np.geomspace(0.2, 100, 400)
for color, (name, device) in zip(plots.PALETTE, DEVICES.items(), strict=False):
    roof = np.minimum(device.float32, device.bandwidth * intensity)
    ax.plot(intensity, roof, color=color)
    ax.text(
        90,
        device.float32 * 1.1,
        name,
        color=color,
        weight="bold",
        ha="right",
        va="bottom",
    )
at_intensity = {}
for name, (moved, done) in TRAFFIC.items():
    at_intensity.setdefault(round(done / moved, 2), []).append(name)
left = 0.0
for at, names in sorted(at_intensity.items()):
    crowded, left = at < 1.2 * left, at
    top = max(min(d.float32, d.bandwidth * at) for d in DEVICES.values())
    ax.plot([at, at], [2e8, top], color=plots.INK, linewidth=0.7)
    ax.text(
        at,
        2.5e8,
        ", ".join(names),
        rotation=90,
        color=plots.INK,
        ha="left" if crowded else "right",
        va="bottom",
        fontsize=8,
    )
ax.set(xscale="log", yscale="log", ylim=(2e8, 2.4e14), xlim=(0.3, 100))
ax.set_yticks(
    [1e9, 1e10, 1e11, 1e12, 1e13, 1e14],
    ["1 G", "10 G", "100 G", "1 T", "10 T", "100 T"],
)
ax.set_xticks([1, 10, 100], ["1", "10", "100"])
ax.minorticks_off()
chapter.show(
    figure,
    "roofline",
    alt="Rooflines of a T4, an RTX 4090 and an A100 against operations a byte, and thin vertical lines where our kernels lie. All but row_norm and the product of four rows stand under the slopes of all three devices.",
    caption=f"An A100 is bounded by memory below {A100.float32 / A100.bandwidth:.0f} operations a byte. {sum(done / moved < A100.float32 / A100.bandwidth for moved, done in TRAFFIC.values())} of our {len(TRAFFIC)} launches need fewer.",
)

# %% [markdown]
# Each thin line is a kernel. The height at which it meets the roof of a device is the largest number of its operations that the device can do in a second. {=sum(done / moved < A100.float32 / A100.bandwidth for moved, done in TRAFFIC.values())=} of {=len(TRAFFIC)=} stand under the slope of the A100: counted like this, their time is the time of their bytes. So a good kernel moves no
# byte twice, and reads and writes neighbouring bytes together. But the count is a lenient one: it takes a shift or a conversion for half of a fused multiply-add, and leaves out addresses and look-ups. What the instructions cost stands in their machine code, [below](#what-the-instructions-cost).
#
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
    alt="A matrix of 4 rows and 96 columns, coloured by block: block 0 fills the first 64 columns of row 0, block 1 the other 32 and the first 32 of row 1, and so on, six blocks in all.",
    caption="Blocks of 64 do not end where rows of 96 end: 4 rows hold 6 blocks and 6 scales.",
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
    "ours: lane i takes the i-th 16 bytes": (16 * lane, 16),
    "lane i takes the i-th byte": (lane, 1),
    "lane i takes 16 bytes of its own row": (2048 * lane, 16),
    "lane i takes a byte of its own block": (32 * lane, 1),
    "each scale in front of its codes": (20 * lane + 4, 4),
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
    alt="Five ways to read packed codes, as rows of boxes, one for each sector of 32 bytes, filled as far as its bytes are wanted. Neighbouring 16-byte loads fill 16 boxes; single bytes fill one; reading one's own row half-fills 32; one byte of one's own block fills a thirty-second of 32 boxes; scales between the codes leave 20 boxes a fifth full.",
    caption=f"Of the bytes that a warp fetches it wants {shares['ours: lane i takes the i-th 16 bytes'].mean():.0%} if neighbours load neighbouring bytes, {shares['lane i takes 16 bytes of its own row'].mean():.0%} if each loads from its own row, and {shares['lane i takes a byte of its own block'].mean():.0%} if each loads a byte of its own block.",
)

# %% [markdown]
# - **Neighbours take neighbouring 16 bytes**: everything fetched is wanted, and one instruction moves 512 bytes. 16 bytes are the most that a lane of these devices can load at once.
# - **A byte each** wastes nothing either, but needs sixteen instructions and sixteen addresses for the same bytes.
# - **Each lane its own row, or its own block**, is how one would write it for a CPU. Half of what is fetched is wanted, or a thirty-second part. The next load of the same lane may find the rest in a cache, if nothing has displaced it.
# - **Each scale in front of its codes** is the layout of many files: in GGUF's `Q4_1`, four bytes for scale and offset, then 16 of codes, for every 32 weights. A CPU reads it well. On a GPU a block begins at every 20th byte, so the codes of only one block in four begin at a multiple of 16, as a load of 16 bytes must, and a load of four finds {=f"{shares['each scale in front of its codes'].mean():.0%}"=} of its sectors useful.
#
# Stores obey the same law, with one more difficulty. A lane that loaded 16 bytes holds 32 codes, which become 64 bytes of float16: four stores. If each lane stores its own, then in each of the four the lanes are 64 bytes apart.

# %%
own, _ = efficiency(64 * lane, 16)
neighbours, _ = efficiency(16 * lane, 16)
print(f"stores: its own values {own:.0%}, neighbouring values {neighbours:.0%}")

# %% [markdown]
# Each store touches half of each of 32 sectors, where neighbouring stores fill 16: four stores either way, but every sector is visited twice. So our kernel exchanges the codes between lanes, after loading and before storing, in *shared memory*: lane $i$ loads the $i$-th 16 bytes, and later stores the $i$-th 16 bytes, of other values.
#
# ## The code
#
# The shape of all unpacking kernels stands in one header.
#
# @source minipeft.kernels.unpack:unpack
# @source minipeft.kernels.unpack:unpack_whole
#
# `dequantize` decodes a scale by reading it. `dequantize_nested` decodes it from eight bits on the way, and differs in nothing else.
#
# @source minipeft.kernels.blockwise:dequantize
#
# @source minipeft.kernels.double_quant:dequantize_nested
#
# For generating text, the weight is not written at all: each warp decodes 256 codes of a row into registers, multiplies, and goes on to the next 256. Up to four rows of $x$ share one decoding.
#
# @source minipeft.kernels.qlora:product_of
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
# A multiprocessor has four schedulers, and each issues one instruction of one warp a cycle: that is a bound, too. So we look in the machine code for the shortest run that does a thread's work, without the slow paths and the ends of tensors, and divide its instructions by the thread's values. Each instruction also goes to a pipe, and a pipe of 16 lanes is busy for two cycles with the 32 lanes of a warp [@nvidia2026].
# The larger of the two numbers of cycles is what the instructions cost. The *cap* is the share of the memory's speed that they leave. An A100 has {=slots.A100.multiprocessors=} multiprocessors at {=slots.A100.clock / 1e9:.2f=} GHz, an H100 has {=slots.H100.multiprocessors=} at {=slots.H100.clock / 1e9:.2f=} GHz.


# %%
# Bytes a value that move through memory, in bfloat16.
MOVED = (
    (kernels.DEQUANTIZE, 0.5 + 4 / 64 + 2),
    (kernels.DEQUANTIZE_NESTED, 0.5 + 1 / 64 + 4 / (64 * 256) + 2),
    (kernels.ADAMW, 3 * 2 + 4 * 4),
    (kernels.ADAMW_8BIT, 3 * 2 + 4 + 16 / 256),
    (kernels.PRODUCT_4BIT, 0.5 + 4 / 64),
    (kernels.ROW_NORM, 2),
)
caps = {}
if not UNREAD:
    print("                    instructions a value         cap       bound by")
    print("kernel, bfloat16    sm_80   sm_90  sm_100   A100  H100    on an H100")
    for kernel, moved in MOVED:
        costs = {a: slots.cost(kernel, "bfloat16", a) for a in slots.ARCHITECTURES}
        reached = []
        for gpu in (slots.A100, slots.H100):
            taken = costs[gpu.architecture].seconds(1, gpu)
            reached.append(min(1, moved / gpu.bandwidth / taken))
        caps[kernel.template] = reached
        issued = "  ".join(f"{cost.issue:6.1f}" for cost in costs.values())
        limit = "memory" if reached[1] == 1 else costs["90"].limit
        print(
            f"{kernel.template:17s}  {issued}   {reached[0]:4.0%}  {reached[1]:4.0%}    {limit}"
        )
    assert caps["dequantize"] == caps["adamw"] == [1, 1]
    assert max(caps[name][1] for name in ("product", "adamw_8bit", "row_norm")) < 1

# %% [markdown]
# On an H100, decoding and AdamW with states of 32 bits are bounded by memory. The product of one row, AdamW with states of eight bits and DoRA's norms are not: their instructions take longer than their bytes. The norms are counted at rank {=slots.RANK=}, where most of the instructions are the products themselves.
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
# 3. **fused**: our `product`. It reads the codes, and multiplies by ordinary units in float32.
#
# Each has a bound by the formula above; for the third we grant that a weight is read once, whatever $T$. Bounds are no timings. But no kernel is faster than its bound.


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


def fused(device, tokens):
    """Decode with a shift, a mask and a product for each four tokens."""
    moved = IN_FOUR + 2 * 2 * SIDE * tokens
    decoding = 3 * np.ceil(tokens / 4)
    return at_least(device, moved, weights * (2 * tokens + decoding), device.float32)


T = np.arange(1, 1025)
WAYS = {
    "float16": float16,
    "dequantize, multiply": dequantize_first,
    "fused": fused,
}
bounds = {
    name: {way: bound(device, T) for way, bound in WAYS.items()}
    for name, device in DEVICES.items()
}
print(
    "            1 token: fused   dequantize first   fused is best below   tensor cores"
)
print("            against float16  against float16    this many tokens      busy from")
gain, slower, best_below, busy = {}, {}, {}, {}
for name, device in DEVICES.items():
    of = bounds[name]
    gain[name] = of["float16"][0] / of["fused"][0]
    slower[name] = of["dequantize, multiply"][0] / of["float16"][0]
    others = np.minimum(of["float16"], of["dequantize, multiply"])
    best_below[name] = int(T[of["fused"] > others][0])
    computing = 2 * weights * T / device.tensor
    busy[name] = int(T[of["float16"] <= computing][0])
    print(
        f"{name:9s}   {gain[name]:11.2f} x      {slower[name]:6.2f} x slower    {best_below[name]:12d}   {busy[name]:18d}"
    )
late = {way: bounds["A100"][way][-1] for way in WAYS}
assert all(3.5 < ratio < 3.6 for ratio in gain.values())
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
for tokens in (best_below["A100"], busy["A100"]):
    ax.axvline(tokens, color=plots.INK, linewidth=0.7)
    ax.text(tokens * 0.93, 480, f"{tokens} tokens", color=plots.INK, ha="right")
ax.set(xscale="log", yscale="log", ylim=(4, 700), xlim=(1, 1024))
ax.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
ax.set_yticks([10, 100], ["10", "100"])
ax.minorticks_off()
chapter.show(
    figure,
    "tokens",
    alt="Lower bounds of the time of one layer on an A100 against the number of tokens, on logarithmic axes. The curve of fused 4 bits begins lowest and crosses that of float16; the curve of dequantizing first begins highest and approaches float16 at the right. Two vertical lines mark where fused crosses float16 and where the tensor cores are busy.",
    caption=f"For one token, fused 4 bits are bounded at 1/{gain['A100']:.1f} of the time of float16 and dequantizing first at {slower['A100']:.1f} times it. Fused falls behind at {best_below['A100']} tokens; from {busy['A100']} on, the tensor cores are the bound.",
)

# %% [markdown]
# Three regimes, on each of the three devices:
#
# - **One token**: the bytes give the bound, and 4.5 bits against 16 are a factor of {=gain["A100"]:.2f=}. A real kernel also issues instructions that the bound leaves out: the comment at the head of `qlora.cu` counts five to decode a weight. On an H100, whose memory is faster, they take longer than the bytes: they leave {=f"{caps['product'][1]:.0%}" if caps else 'less than 100 %'=} of the memory's speed ([above](#what-the-instructions-cost)).
#   And the factor holds only if the kernel is fused: dequantizing first takes {=slower["A100"]:.1f=} times as long as float16, since the weight is read, written and read again.
# - **Tens of tokens**: our fused kernel multiplies by ordinary units. On an A100 it falls behind float16 at {=best_below["A100"]=} tokens, on an RTX 4090, whose ordinary units are faster, at {=best_below["RTX 4090"]=}. A kernel that decodes *into tensor cores* keeps the gain
#   for longer; ours is for decoding.
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
reason = executor.missing() if chapter.device == "cuda" else "no GPU, or --device cpu"
if reason:
    print(f"not measured here: {reason}")
else:
    wrong = gpu_report.run(chapter.out, CupyDevice())
    assert not wrong

# %% [markdown]
# `make gpu` runs all that only a device can show, this chapter and the others too, in stages of at most nine minutes, and writes a folder of results. It stands here once somebody has run it and committed it:

# %%
results = Path("chapters/results/gpu/gpu.md")
if results.is_file():
    print(results.read_text("utf-8"))
else:
    print("Nobody has: no kernel of this book has run on a GPU yet.")

# %% [markdown]
#
# ## What goes wrong in practice
#
# - **4 bits, and slower.** Until 2026 bitsandbytes had a fused kernel for a single row only ([884](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/884)), and everything else dequantized first: reports of 4 bits running behind 8 or 16
#   ([518](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/518), [611](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/611)) look like the second curve of the figure. Then came kernels for up to 64 rows
#   ([1949](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1949)).
# - **Indices of 32 bits.** A tensor of $2^{30}$ weights is a large embedding. Beyond it, bitsandbytes' quantization computed its indices in `int` and they overflowed ([1784](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1784)). The sizes in our launches are 64 bits wide.
# - **Fast maths.** `--use_fast_math` replaces division by an approximation and flushes small numbers to zero. bitsandbytes is built with it, so near a boundary its codes may differ. CuPy adds `-ftz=true` to everything that it compiles from source; our launcher
#   compiles by itself for that reason.
# - **Fused is not the same number.** A fused product adds in another order than dequantizing and multiplying; [differences of 6e-4](https://github.com/MakazhanAlpamys/Soup/issues/776) in float16 were reported. They are rounding, and have a bound.
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
