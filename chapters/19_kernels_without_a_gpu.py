# %% [markdown]
# # Testing a kernel with no GPU
#
# The CUDA kernels of this book were written on machines that have no GPU, and its tests run on such machines. That finds more mistakes than one may think, because many do not depend on the hardware: an index is off by one, a barrier is missing, an
# argument has the wrong width, a sum is rounded twice. A program on a CPU can find each of these, and some of them more reliably than a run on a GPU. This chapter plants such mistakes in a small kernel and finds them, in five ways. Then it says what none of the five can find.

# %%
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from minipeft import kernels
from minipeft.errors import InputError
from minipeft.kernels import compiler
from minipeft.lab import fibers, plots
from minipeft.lab.chapter import start
from minipeft.lab.files import write_atomic

chapter = start("19_kernels_without_a_gpu", steps=1, model=None)
FOLDER = Path(tempfile.mkdtemp(prefix="kernels-"))
NO_GXX, NO_NVRTC = fibers.missing(), compiler.missing()
if NO_GXX:
    print(f"What runs kernels on this CPU is left out: {NO_GXX}")
if NO_NVRTC:
    print(f"What compiles for a GPU is left out: {NO_NVRTC}")

# %% [markdown]
# ## The problem
#
# Here is the kernel that we test: 64 threads quantize a block of 64 weights to the even 4-bit grid from -7 to 7. Threads share memory, wait for each other at three barriers, reduce
# pairwise to a maximum, write two codes into one byte, and must stop where the tensor ends.

# %%
KERNEL = """
__global__ void quantize(const float* W, unsigned char* packed, float* absmax, int n) {
  __shared__ float largest[64];
  __shared__ unsigned char code[64];
  const int t = threadIdx.x, i = blockIdx.x * 64 + t;
  const float w = i < n ? W[i] : 0.0f;
  largest[t] = fabsf(w);
  __syncthreads();
  for (int half = 32; half > 0; half /= 2) {
    if (t < half) largest[t] = fmaxf(largest[t], largest[t + half]);
    __syncthreads();
  }
  const float a = largest[0];
  code[t] = a > 0 ? int(rintf(w / a * 7)) + 8 : 8;
  __syncthreads();
  if (t % 2 == 0 && i < n) packed[i / 2] = code[t] << 4 | code[t + 1];
  if (t == 0) absmax[blockIdx.x] = a;
}
"""


def reference(W):
    """The same in NumPy: bytes and scales."""
    blocks = np.pad(W, (0, -W.size % 64)).reshape(-1, 64)
    a = np.abs(blocks).max(1)
    codes = np.rint(blocks / np.where(a, a, 1)[:, None] * np.float32(7)) + 8
    pairs = codes.astype(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1])[: (W.size + 1) // 2], a


W = np.random.default_rng(0).standard_normal(7 * 64 - 3).astype(np.float32)
packed, absmax = reference(W)
print(f"{W.size} weights, {packed.size} bytes, {absmax.size} scales")

# %% [markdown]
# ## The first check: compile it for what you do not have
#
# NVRTC compiles for a GPU on a machine that has none. That shows whether the source is valid CUDA, for an old generation and for a new one, and what it will use there. **Registers** decide how many threads fit, and too few of them
# means **spilling**: values wait in memory instead. The [last chapter](18_gpu_four_bits.md) reads such numbers; here they are a test. A file holds them for each kernel, and a change that makes one worse must change the file too.


# %%
def compile_for(target, text, names=(), options=()):
    """Return what NVRTC makes of CUDA C++, what it says, and the names in it."""
    given = (f"--gpu-architecture={target}", f"-I{compiler.headers()}", *options)
    return compiler.compile_text(text, "kernel.cu", names, given)


if not NO_NVRTC:
    for architecture in (75, 80, 90, 100):
        began = time.perf_counter()
        log = compile_for(
            f"sm_{architecture}", KERNEL, ["quantize"], ["--ptxas-options=-v"]
        ).log
        milliseconds = 1e3 * (time.perf_counter() - began)
        used = re.search(r"Used (\d+) registers.*?(\d+) bytes smem", log)
        spilled = re.search(r"(\d+) bytes spill stores", log)[1]
        print(
            f"sm_{architecture}: {used[1]} registers, {used[2]} bytes shared, {spilled} spilled; {milliseconds:.0f} ms"
        )
        assert spilled == "0"

# %% [markdown]
# A check that never fails proves nothing. So take this book's real `quantize`, which needs many more registers, and squeeze it into 24:

# %%
if not NO_NVRTC:
    bound = "__launch_bounds__(THREADS)"
    crowded = kernels.source("blockwise").replace(bound, "__maxnreg__(24)")
    names = ["quantize<float>"]
    for text in (kernels.source("blockwise"), crowded):
        log = compile_for("sm_80", text, names, kernels.OPTIONS).log
        warnings = re.findall(
            r"(Registers are spilled).*?, (\d+ bytes spill stores)", log
        )
        print(": ".join(warnings[0]) if warnings else "no warning")
    assert warnings

# %% [markdown]
# ## The second check: any order
#
# Between two barriers the threads of a block run in *any* order. Write $K_\pi(x)$ for what kernel $K$ makes of input $x$ when they run in order $\pi$, and $R$ for the reference. Then the law is
#
# $$ K_\pi(x) = R(x) \qquad \text{for all orders } \pi, $$
#
# with the same bits on both sides. A GPU runs in one order, much the same each time. A program on a CPU can try as many as one likes. All that is needed is a few lines around the *same source*: every CUDA thread becomes a *fiber*, a function that can be left in the middle and resumed. At a barrier
# a fiber leaves; when all have come, all go on, in an order drawn anew. The heart of it, in C++:

# %%
print(fibers.heart())

# %% [markdown]
# This is the model of the tests, which has warps and shuffles too. There it runs every kernel of this library, in half precision as well, behind NVIDIA's own headers.
#
# Now the mistakes, each an edit of the source: three barriers taken out, one put where not all threads come, and some that have nothing to do with threads.

# %%
SYNC = "  __syncthreads();\n"


def nth(old, new, occurrence):
    """Replace one occurrence, counted from 1."""
    parts = KERNEL.split(old)
    assert 0 < occurrence < len(parts)
    return old.join(parts[:occurrence]) + new + old.join(parts[occurrence:])


MISTAKES = {
    "none": KERNEL,
    "no barrier before the maxima": nth(SYNC, "", 1),
    "no barrier between the maxima": nth("  " + SYNC, "", 1),
    "no barrier before packing": nth(SYNC, "", 3),
    "a barrier in a branch": nth(
        "if (t < half) largest[t]", "if (t < half) __syncthreads(), largest[t]", 1
    ),
    "a weight too many": nth("i < n ?", "i <= n ?", 1),
    "half of the block": nth("half = 32", "half = 16", 1),
    "swapped nibbles": nth(
        "code[t] << 4 | code[t + 1]", "code[t] | code[t + 1] << 4", 1
    ),
    "a byte too far": nth("packed[i / 2]", "packed[i / 2 + 1]", 1),
}
assert len(set(MISTAKES.values())) == len(MISTAKES)
programs = {}
if not NO_GXX:
    began = time.perf_counter()
    programs = {f: fibers.build(MISTAKES, f, FOLDER) for f in fibers.FLAVOURS}
    print(
        f"{len(MISTAKES)} kernels, built three times: {time.perf_counter() - began:.1f} s"
    )

# %% [markdown]
# Take out one barrier, run in sixteen orders, and mark every byte that differs from the reference.

# %%
ORDERS = 16
BARRIERS = [name for name in MISTAKES if name.startswith("no barrier")]
wrong = {}
if not NO_GXX:
    for name in ("none", *BARRIERS):
        outputs = [
            programs["values"].run(name, W, seed).packed for seed in range(ORDERS)
        ]
        wrong[name] = np.array(outputs) != packed
        noticed = wrong[name].any(1).sum()
        print(
            f"{name:30s} wrong in {noticed:2d} of {ORDERS} orders, {wrong[name].mean():4.0%} of the bytes"
        )
    assert not wrong["none"].any()
    assert all(wrong[name].any() for name in BARRIERS)

# %% tags=["fold"]
if not NO_GXX:
    figure, ax = plots.axes(x="byte of the result", size=(6.4, 4.4))
    gap = ORDERS + 5
    for row, (color, name) in enumerate(zip(plots.PALETTE, BARRIERS, strict=False)):
        picture = np.zeros((*wrong[name].shape, 4))
        picture[wrong[name]] = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] + [
            1
        ]
        top = row * gap
        ax.imshow(
            picture,
            extent=(0, packed.size, top + ORDERS, top),
            aspect="auto",
            interpolation="none",
        )
        ax.text(0, top - 0.7, name, color=color, weight="bold", va="bottom")
    ax.set(xlim=(0, packed.size), ylim=(3 * gap - 4, -4))
    ax.set_xticks(range(0, packed.size, 32))
    ax.set_yticks([row * gap + ORDERS / 2 for row in range(3)], ["16 orders"] * 3)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")
    chapter.show(
        figure,
        "orders",
        alt=f"Three panels, one for each missing barrier: {ORDERS} orders down, the bytes of the result across, wrong bytes coloured. Without the barrier before the maxima parts of some blocks are coloured, not of the same in all orders; without the one between the maxima most of the panel is; without the one before packing single bytes everywhere.",
        caption=f"Wrong bytes in {ORDERS} orders: "
        + ", ".join(f"{wrong[name].mean():.0%} with {name}" for name in BARRIERS)
        + ".",
    )

# %% [markdown]
# Each missing barrier gives another picture. **Between the maxima**, the reduction compares halves that are not ready, and {=f"{wrong['no barrier between the maxima'].mean():.0%}" if wrong else 'most'=} of the bytes are wrong, because a wrong scale divides the weights. **Before packing**, either thread of a pair may run first, and {=f"{wrong['no barrier before packing'].mean():.0%}" if wrong else 'about half'=} of the bytes are wrong. **Before the maxima** only {=f"{wrong['no barrier before the maxima'].mean():.0%}" if wrong else 'a few'=} of the bytes are wrong: what is read too early is what the block before left in
# shared memory, and a scale is wrong only if that is larger than the true maximum, or if the maximum itself came too late. A test of a single block can pass. (The real tests fill shared memory with a pattern before each block, so that a value left over is never plausible.) On a GPU the threads of a warp mostly advance together, so all three mistakes may show rarely, or only on the next generation.
#
# ## The third check: sanitizers
#
# A run in an order that gives the right answer still contains the mistake. Compilers for CPUs have tools that look for the *cause*. **ThreadSanitizer** [@serebryany2009] reports two accesses to one place, one of them a write, that no barrier orders, whatever values came out. **AddressSanitizer** [@serebryany2012] surrounds each
# array with memory that must not be touched. ThreadSanitizer has to be told what a fiber is, and that a barrier orders accesses while a switch between fibers does not.


# %%
def first_lines(said, *patterns):
    """Print the first line that matches each pattern, without addresses."""
    for pattern in patterns:
        if found := re.search(pattern, said):
            line = re.sub(r"0x[0-9a-f]+|==\d+==|\(pid=\d+\)", "…", found[0])
            print("  " + " ".join(line.split()))


def works(flavour):
    """Say whether the sanitizer runs here at all: the right kernel passes."""
    said = programs[flavour].run("none", W).complaints
    if said:
        print(f"the check of {flavour} does not run on this machine: {said[:120]!r}")
    return not said


usable = [flavour for flavour in programs if works(flavour)]
KINDS = {
    "values": r"differs|__syncthreads not reached by every thread",
    "races": "ThreadSanitizer: data race",
    "addresses": r"AddressSanitizer: [\w-]+|runtime error: ",
}
for name, flavour in {
    "no barrier before packing": "races",
    "a weight too many": "addresses",
    "a byte too far": "addresses",
}.items():
    if flavour in usable:
        said = programs[flavour].run(name, W).complaints
        print(f"{name}:")
        first_lines(
            said,
            KINDS[flavour] + ".*",
            r"(Read|Write|READ|WRITE) of size \d+",
            r"kernel\.cu:\d+",
        )
        assert re.search(KINDS[flavour], said)

# %% [markdown]
# The report names the line of the kernel. NVIDIA's own tool for this, `compute-sanitizer`, needs a GPU; where there is one, it is used as well.
#
# ## The fourth check: what the compiler made of it
#
# So far g++ compiled the kernel. NVRTC is another compiler, and may make something else of the same line. Above all it may *fuse*: `a * b + c` becomes one instruction that rounds once instead of twice. More accurate, and other bits. Here is the decoding of a scale from [double quantization](03_double_quant.md), written in two ways, and what
# becomes of it in PTX [@nvidia2025], the assembly language that NVRTC writes.

# %%
UNNEST = """
extern "C" __global__ void unnest(const float* code, const float* scale, float offset,
                                  float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = code[i] * scale[i] + offset;
}
"""
ROUNDED = UNNEST.replace(
    "code[i] * scale[i] + offset", "__fadd_rn(__fmul_rn(code[i], scale[i]), offset)"
)
arithmetic = {}
if not NO_NVRTC:
    for title, text in {"as written": UNNEST, "each step rounded": ROUNDED}.items():
        ptx = compile_for("compute_80", text).image
        arithmetic[title] = re.findall(r"(?:fma|mul|add)\.rn\.f32", ptx.decode())
        print(f"{title:17s} {' '.join(arithmetic[title])}")
    assert [*arithmetic.values()] == [["fma.rn.f32"], ["mul.rn.f32", "add.rn.f32"]]

# What the two give: a product of float32 numbers is exact in float64.
rng = np.random.default_rng(1)
code, scale = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))
offset = np.float32(0.3)
twice = code * scale + offset
once = (code.astype(float) * scale + float(offset)).astype(np.float32)
print(
    f"rounded once and rounded twice: {np.mean(once == twice):.0%} have the same bits"
)
assert 0.5 < np.mean(once == twice) < 0.9

# %% [markdown]
# The runs with g++ cannot show that, because g++ is told not to fuse. This is why the kernels here write `__fmul_rn` and `__fadd_rn` wherever the reference rounds. And it is why the fourth check does not stop at reading: the tests *run* NVRTC's PTX, in an interpreter written in NumPy. Every register is an array with an entry for each thread, every
# address is checked against its buffer, and what is undefined is refused:

# %%
ROOT = Path(__file__).parents[1]


def tests(which, *files):
    """Run some of the repository's tests, and show their lines."""
    if not (ROOT / "tests" / "cuda").is_dir():
        print("left out: the tests are in the repository, and this is not a checkout")
        return
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    paths = [f"tests/cuda/{file}" for file in files]
    ran = subprocess.run(
        [*command, "-k", which, *paths], cwd=ROOT, capture_output=True, text=True
    )
    line = re.compile(
        r"^tests/cuda/(\S+?\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.M
    )
    for name, outcome in line.findall(ran.stdout):
        test, _, case = name.partition("::")[2].partition("[")
        case = re.split(r"-\d+-", case.strip("]"))[-1]  # not the program, its sentence
        print(f"{outcome.lower():8s} {test}{case and ': '}{case}")
    assert ran.returncode == 0, ran.stdout[-2000:]


tests("refused", "test_interpreter.py")

# %% [markdown]
# The interpreter does not look for races: it lets all threads advance together, so it computes what a GPU computes if no race shows.
#
# ## The fifth check: the widths of arguments
#
# No compiler checks the call from Python to a kernel. The host hands over addresses of values; the kernel reads as many bytes as its own parameter types have. If a Python float arrives as eight bytes where four are read, the kernel gets the lower half of the number. PTX says how many bytes the kernel reads:

# %%
PTX_BYTES = {"u64": 8, "u32": 4, "f32": 4, "b64": 8, "b32": 4}


def widths(ptx, name):
    """Return the bytes of each parameter of an entry."""
    head = re.search(rf"\.entry {name}\((.*?)\)", ptx, re.S)[1]
    return [PTX_BYTES[kind] for kind in re.findall(r"\.param \.(\w+)", head)]


if not NO_NVRTC:
    row = kernels.source("blockwise")
    short = row.replace("T* __restrict__ out, i64 n,", "T* __restrict__ out, int n,")
    assert short != row
    instance = kernels.DEQUANTIZE.expression("float16")
    for title, text in {"as it is": row, "with `int n`": short}.items():
        made = compile_for("compute_80", text, [instance], kernels.OPTIONS)
        found = widths(made.image.decode(), made.names[instance])
        agree = found == kernels.DEQUANTIZE.widths()
        print(
            f"{title:13s} kernel reads {found}, host passes {kernels.DEQUANTIZE.widths()}: {'agree' if agree else 'DIFFER'}"
        )
        assert agree == (text == row)

# %% [markdown]
# The host's list is not written for the test: it is the table from which the launchers pack their arguments.
#
# ## The proof: mistakes, and which check found them
#
# Are the checks good? Test them as one tests a test: plant a mistake, and see which check reports it [@demillo1978]. Here is every mistake of the small kernel under the three checks that run on this CPU, in four orders each:


# %%
def seen_by(flavour, name, orders=4):
    """Say whether a check reports a mistake, in its own words, in any order."""
    for seed in range(orders):
        outcome = programs[flavour].run(name, W, seed)
        said = outcome.complaints
        if flavour == "values" and not np.array_equal(outcome.packed, packed):
            said += "differs"
        if re.search(KINDS[flavour], said):
            return True
    return False


seen = {}
if not NO_GXX:
    print(f"{'':32s}" + "  ".join(f"{flavour:9s}" for flavour in usable))
    for name in MISTAKES:
        seen[name] = [f for f in usable if seen_by(f, name)]
        marks = (f"{'seen' if f in seen[name] else '–':9s}" for f in usable)
        print(f"{name:32s}" + "  ".join(marks))
    assert not seen["none"]
    if len(usable) == len(fibers.FLAVOURS):
        assert all(seen[name] for name in MISTAKES if name != "none")
        assert all({"values", "races"} <= set(seen[name]) for name in BARRIERS)
        assert "addresses" in seen["a weight too many"]

# %% [markdown]
# No check would do alone. A weight too many may well change *nothing*: the number that happens to lie there is small, and only the guarded memory around the array shows it. Swapped nibbles, on the other hand, break no rule that a sanitizer checks.
#
# The same trial for the kernels of this book takes minutes, so it has a long setting (`--full`), whose result is committed. It plants every mistake of the tests' list and tries all four checks that run the code, with three orders:

# %%
COMMITTED = Path(__file__).with_name("results") / f"{chapter.name}.json"
if chapter.full:
    if not (ROOT / "tests" / "cuda").is_dir():
        raise InputError("--full runs the repository's tests; run it from a checkout")
    command = [sys.executable, "-m", "tests.cuda.mutation_runs"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    result = {
        "command": f"python chapters/{chapter.name}.py --full",
        "versions": {"python": platform.python_version()}
        | {
            library: version(library)
            for library in ("minipeft", "numpy", "torch", "nvidia-cuda-nvrtc")
        },
        "machine": platform.machine(),
    } | json.loads(ran.stdout)
    write_atomic(COMMITTED, (json.dumps(result, indent=1) + "\n").encode())

full = chapter.read_full(COMMITTED)
trials = full["trials"]
CHECKS = ("values", "races", "addresses", "ptx")
head = ["kernel file", "mistake", *CHECKS]
lines = [head, ["---", "---", *[":-:"] * 4]]
for trial in trials:
    marks = ["✓" if check in trial["seen"] else "" for check in CHECKS]
    lines.append([f"`{trial['row']}`", trial["mistake"], *marks])
table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
count = {check: sum(check in t["seen"] for t in trials) for check in CHECKS}
only = {check: sum(t["seen"] == [check] for t in trials) for check in CHECKS}
for check in CHECKS:
    print(
        f"{check:9s} sees {count[check]:2d} of {len(trials)}, {only[check]} of them alone"
    )
print(f"{full['seconds']:.0f} seconds, orders {full['seeds']}: {full['command']}")
assert all(set(trial["must"]) <= set(trial["seen"]) for trial in trials)
assert all(trial["seen"] for trial in trials)
alone = [t for t in trials if len(t["seen"]) == 1]
races = [t for t in trials if "races" in t["seen"]]
blind = [t for t in races if "ptx" not in t["seen"]]
assert [t["seen"] for t in alone] == [["races"]]
assert len(blind) > len(races) / 2

# %% [markdown]
# {=table=}
#
# Every one of the {=len(trials)=} mistakes is found by at least one check. One, "{=alone[0]["mistake"]=}" in `{=alone[0]["row"]=}`, is found by a single one: no order that we tried gave a wrong value, and ThreadSanitizer reported the race all the same. Of the {=len(races)=} races the interpreter of PTX finds {=len(races) - len(blind)=}: it lets all threads advance together, and that is what
# hides a race. Swapped nibbles and wrong scales are found by comparing values alone, in g++'s version and in NVRTC's.
#
# ## The experiment: the real ones, now
#
# The tests that do all this live in `tests/cuda/` and are part of `make test`. A few of them, for the smallest kernel file, while this page was built:

# %%
if not NO_NVRTC:
    tests(
        "paged and (spill or ptx)",
        "test_compile.py",
        "test_arguments.py",
        "test_checks.py",
    )

# %% [markdown]
# ## What these checks cannot show
#
# Plainly: these checks run no kernel on a GPU. One run on an H200 came after them, on 26 November 2026. Every byte that its report compared was the one that these checks had promised, and no golden vector failed; one test of 70 did, of a layer that no pretended device had tried. [Chapter 18](18_gpu_four_bits.md) shows what passed and what failed. What the five checks say about a GPU, and what they do not:
#
# - **Speed.** Nothing here takes the time that it takes there. Counts of registers and of wide loads are hints. The rooflines of the [last chapter](18_gpu_four_bits.md) are upper bounds of the speed.
# - **Approximate maths.** `__expf`, `rsqrtf` and their like are hardware; no CPU has their bits. The kernels here use none, and a test looks for them in the PTX.
# - **Memory ordering between blocks.** Blocks run one after another here, and memory is as orderly as a CPU's. A kernel whose blocks talk to each other through memory could pass everything and fail. The blocks of our kernels share memory only through `atomicMin`.
# - **What comes after PTX.** A second compiler, `ptxas`, turns PTX into machine code. We count its registers and read its output, but do not run it.
# - **Real paging.** [Paged optimizers](05_paged.md) use managed memory. Which page moves when is the driver's affair; here a copy is a copy.
# - **Streams.** Two kernels that overlap, or a copy that overtakes a kernel, do not exist in a program that does one thing at a time.
# - **How tensor cores round.** Our products use them, and their instruction is modelled here: with sums in float64 in the interpreter of PTX, with sums in float32 in g++'s version. How the hardware rounds its sums is not published.
# - **The newest instructions**, such as the asynchronous copies and products of an H100: not used, not modelled.
#
# What has been done, and with what:
#
# | what | compiled | run | on a GPU |
# |:--|:--|:--|:--|
# | every kernel, NVRTC 13.5 | `sm_75`, `sm_80`, `sm_90`, `sm_100` by the tests; `sm_120` on 26 November 2026 | their PTX, instruction by instruction, in a model; their source, on a CPU | on an H200, compiled by NVRTC 13.0 |
# | every kernel, NVRTC 12.9 | `sm_75`, `sm_90`, `sm_120` by `make cuda12`, 26 November 2026 | no | no |
# | registers, spills, machine code | `sm_75` to `sm_100` | counted | no |
# | torch's operators that launch them | with NVRTC 13.5 | on a pretended device, whose kernels are the CPU's | the vectors, on an H200 |
# | the chapters, with `--device cuda` | | on a pretended device that refuses mixed tensors: `make devices` | on an H200; which ones passed is in chapter 18 |
# | CuPy's column, streams, pages | | on stand-ins for arrays and for the driver | the vectors, pages and streams, on an H200 |
# | CUDA graphs | | a test counts where the host would wait; `make gpu` captures and repeats one | on an H200 |
# | any timing | | instruction counts and bounds only | one run, in chapter 18 |
#
# How to find out is one command on a machine that has a GPU: `make gpu` runs the tests, the vectors and the sanitizers on it, tries whether pages save a run there, checks and times every kernel (`minipeft gpu-report`), runs every chapter there, and writes a folder of results; without a GPU it says so.
#
# ## What goes wrong in practice
#
# - **It works on this GPU.** bitsandbytes' quantile estimation lacked a barrier. It was found when the same kernel gave wrong results on AMD's cards ([1061](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1061)). In flashinfer somebody
#   [took barriers out](https://github.com/flashinfer-ai/flashinfer/issues/614) and saw no wrong value; the race checker reported the race all the same.
# - **The compiler hides it.** A benchmark's race was [invisible to the GPU's race checker](https://github.com/ORNL/HeCBench/issues/254), because the optimizer had moved the read to the other side of a later barrier. Another kernel was right with `-O3` and
#   [wrong with debugging on](https://github.com/proteneer/timemachine/issues/344).
# - **A barrier in a branch.** llama.cpp mended a race with a barrier that [only some of the warps reached](https://github.com/ggml-org/llama.cpp/pull/13469): warps then waited for each other at different places, and long contexts came out wrong.
# - **A race with a pattern.** Packing 4-bit codes by `|=` from eight threads into one word kept [one code of eight](https://github.com/Blaizzy/mlx-vlm/pull/967). The symptom was that 4 bits came out *worse* than 2. The tests used the other path.
# - **The right code, the wrong width.** A Python float given to a CUDA parameter of type `float` is [read as garbage](https://github.com/cupy/cupy/issues/8485), an index in an `int` [overflows](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1784), and only in the largest tensors.
# - **Between blocks.** An output zeroed by *some* blocks while others already add to it ([sglang 29749](https://github.com/sgl-project/sglang/pull/29749)). A barrier orders one block only. This is on the list of what would slip through here, unless the shuffled order of blocks happens to show it.
#
# ## Exercises
#
# 1. *The last five steps.* Old kernels left out the barriers once only 32 threads were at work, because a warp advances together. It no longer must. Skip the barrier for `half < 32` and run the checks.

# %% tags=["solution"]
old = nth(
    "    " + "__syncthreads();\n  }", "    if (half >= 32) __syncthreads();\n  }", 1
)
if not NO_GXX:
    program = fibers.build({"old": old}, "values", FOLDER)
    outputs = np.array([program.run("old", W, seed).packed for seed in range(4)])
    print(f"{np.mean(outputs != packed):.0%} of the bytes are wrong")
    assert np.any(outputs != packed)

# %% [markdown]
# 2. *What the data do not reach.* Remove the question `a > 0` from the kernel. Which of our checks reports this, with the weights above? With which weights does one report it?

# %% tags=["solution"]
careless = nth("a > 0 ? int(rintf(w / a * 7)) + 8 : 8", "int(rintf(w / a * 7)) + 8", 1)
zeros = W.copy()
zeros[64:128] = 0
for flavour in usable:
    program = fibers.build({"careless": careless}, flavour, FOLDER)
    for title, weights in {"these weights": W, "a block of zeros": zeros}.items():
        outcome = program.run("careless", weights)
        right = np.array_equal(outcome.packed, reference(weights)[0])
        unseen = right and not outcome.complaints
        print(f"{flavour}, {title}: {'nothing' if unseen else 'seen'}")
        first_lines(outcome.complaints, "runtime error: .*")
        assert unseen == (flavour != "addresses" or weights is W)

# %% [markdown]
# Zero by zero is NaN, and NaN as an integer is undefined: this CPU happens to make a number of it whose lowest byte is right. A check tests only the code that the data reach. That is why the tests draw zero blocks, ties, subnormal numbers and ragged ends on purpose.
#
# 3. *Half a number.* What does a kernel read if it expects `float` and is handed the eight bytes of Python's 2.0? And of 0.1?

# %% tags=["solution"]
for number in (2.0, 0.1):
    lower = np.array([number]).view(np.float32)[0]
    print(f"{number} becomes {lower}")
assert np.array([2.0]).view(np.float32)[0] == 0

# %% [markdown]
# 4. *Two mistakes.* Swap the nibbles *and* exchange `t + 1` for `t ^ 1`. Is that a third mistake, or none?

# %% tags=["solution"]
both = nth("code[t] << 4 | code[t + 1]", "code[t] | code[t ^ 1] << 4", 1)
if not NO_GXX:
    variants = {"both": both, "swapped": MISTAKES["swapped nibbles"]}
    program = fibers.build(variants, "values", FOLDER)
    outputs = [program.run(name, W).packed for name in variants]
    assert np.array_equal(*outputs)
print("t is even where it packs, so t ^ 1 is t + 1: the same mistake as before")

# %% tags=["hide"]
shutil.rmtree(FOLDER, ignore_errors=True)

# %% [markdown]
# ## References
#
# ThreadSanitizer is by Serebryany and Iskhodzhanov [@serebryany2009], AddressSanitizer by Serebryany and others [@serebryany2012]. Judging tests by planted mistakes goes back to DeMillo, Lipton and Sayward [@demillo1978]. PTX is NVIDIA's [@nvidia2025].
