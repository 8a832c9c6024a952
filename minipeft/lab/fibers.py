"""A GPU made of fibers: small CUDA kernels run on a CPU, their threads in any order.

For chapter 19. One block of 64 threads at a time, one signature; the tests have a
larger model of the same kind, for every kernel of this library.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipeft.errors import InputError
from minipeft.shapes import Float, UInt8

# What each way of compiling makes visible: wrong values; accesses that nothing orders;
# addresses outside an array, and what C++ leaves undefined.
FLAVOURS = {
    "values": (),
    "races": ("-fsanitize=thread",),
    "addresses": (
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ),
}
GXX = ("g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-x", "c++", "-")

CUDA = """
#include <cmath>
#define __global__
#define __shared__ static
struct Index { int x; };
extern Index threadIdx, blockIdx;
void __syncthreads();
typedef void (*Kernel)(const float*, unsigned char*, float*, int);
"""

# Every thread is a fiber: a function with a stack of its own, which can be left in the
# middle and resumed. At a barrier a fiber leaves; when all have come, all go on.
MODEL = r"""
void __syncthreads() {
  Fiber& f = fibers[threadIdx.x];
  char* here = &barrier[f.turn++ % 2];
  __tsan_release(here);  // for ThreadSanitizer: what came before a barrier …
  f.state = WAITING;
  leave(f);
  __tsan_acquire(here);  // … happened before all that comes after it
}

static void run_block(std::vector<int>& order, std::mt19937& random) {
  for (Fiber& f : fibers) start(f);
  __tsan_release(&starts);
  while (count(DONE) < T) {
    std::shuffle(order.begin(), order.end(), random);
    for (int t : order)
      if (fibers[t].state == READY) resume(t);
    if (count(DONE) && count(WAITING)) stop("a barrier that not every thread reaches");
    for (Fiber& f : fibers)
      if (f.state == WAITING) f.state = READY;
  }
  __tsan_acquire(&ends);
}
"""

# A switch between fibers orders nothing in ThreadSanitizer's eyes: flag 1.
MACHINERY = r"""
#include <ucontext.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#ifdef RACES
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

constexpr int T = 64;
enum State { READY, WAITING, DONE };
struct Fiber {
  ucontext_t context;
  char stack[32768];
  State state;
  int turn;
  void* tsan;
};
Index threadIdx, blockIdx;
extern Kernel kernels[];
static Kernel kernel;
static Fiber fibers[T];
static ucontext_t scheduler;
static void* scheduler_tsan;
static char starts, ends, barrier[2];
static const float* W;
static unsigned char* packed;
static float* absmax;
static int n;

static void leave(Fiber& f) {
  __tsan_switch_to_fiber(scheduler_tsan, 1);
  swapcontext(&f.context, &scheduler);
}

static void body() {
  __tsan_acquire(&starts);
  kernel(W, packed, absmax, n);
  __tsan_release(&ends);
  fibers[threadIdx.x].state = DONE;
  leave(fibers[threadIdx.x]);
}

static void start(Fiber& f) {
  getcontext(&f.context);
  f.context.uc_stack = {f.stack, 0, sizeof f.stack};
  makecontext(&f.context, body, 0);
  if (!f.tsan) f.tsan = __tsan_create_fiber(0);
  f.state = READY;
  f.turn = 0;
}

static void resume(int t) {
  threadIdx.x = t;
  __tsan_switch_to_fiber(fibers[t].tsan, 1);
  swapcontext(&scheduler, &fibers[t].context);
}

static int count(State state) {
  return std::count_if(fibers, fibers + T, [=](Fiber& f) { return f.state == state; });
}

static void stop(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(3);
}
"""

MAIN = r"""
int main(int, char** arguments) {  // variant, n, seed; the weights come from stdin
  kernel = kernels[std::atoi(arguments[1])];
  n = std::atoi(arguments[2]);
  std::mt19937 random(std::atoi(arguments[3]));
  const int blocks = (n + T - 1) / T, bytes = (n + 1) / 2;
  float* weights = new float[n];  // as long as the tensor: sanitizers see the ends
  if (std::fread(weights, 4, n, stdin) != size_t(n)) stop("the weights end early");
  W = weights, packed = new unsigned char[bytes](), absmax = new float[blocks]();
  scheduler_tsan = __tsan_get_current_fiber();
  std::vector<int> order(T);
  for (int t = 0; t < T; ++t) order[t] = t;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(order, random);
  std::fwrite(packed, 1, bytes, stdout);
  std::fwrite(absmax, 4, blocks, stdout);
}
"""


@dataclass(frozen=True)
class Outcome:
    """What a launch left: the packed bytes, the scales, and complaints."""

    packed: UInt8[np.ndarray, " bytes"]
    absmax: Float[np.ndarray, " blocks"]
    complaints: str


@dataclass(frozen=True)
class Program:
    """Variants of a kernel, compiled in one way."""

    path: Path
    variants: tuple[str, ...]

    def run(
        self, variant: str, W: Float[np.ndarray, " values"], seed: int = 0
    ) -> Outcome:
        """Run a variant on some weights, in the order that the seed draws.

        A launch that is stopped leaves zeros.
        """
        arguments = (self.variants.index(variant), W.size, seed)
        # ThreadSanitizer waits a second at the end, for threads that are not there.
        environment = os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=0"}
        ended = subprocess.run(
            [self.path, *map(str, arguments)],
            input=W.tobytes(),
            capture_output=True,
            env=environment,
        )
        size, blocks = (W.size + 1) // 2, -(-W.size // 64)
        whole = len(ended.stdout) == size + 4 * blocks
        out = ended.stdout if whole else bytes(size + 4 * blocks)
        complaints = ended.stderr.decode(errors="replace") if ended.returncode else ""
        return Outcome(
            np.frombuffer(out, np.uint8, size),
            np.frombuffer(out[size:], np.float32),
            complaints,
        )


def missing() -> str | None:
    """Say in one sentence why kernels cannot run on this CPU; None where they can."""
    if shutil.which("g++"):
        return None
    return "g++ is not installed: install it, or read the book on the web."


def build(variants: Mapping[str, str], flavour: str, folder: Path) -> Program:
    """Compile variants of one kernel into a program.

    Args:
        variants: the CUDA source of `quantize(W, packed, absmax, n)`, by a name.
        flavour: what to make visible, from `FLAVOURS`.
        folder: for the program.

    Raises:
        InputError: the flavour is unknown, g++ is missing, or it refuses a variant.
    """
    if flavour not in FLAVOURS:
        raise InputError(f"flavour is {flavour!r}; choose one of {list(FLAVOURS)}.")
    if reason := missing():
        raise InputError(reason)
    parts = [CUDA]
    for number, text in enumerate(variants.values()):
        parts.append(f'namespace v{number} {{\n#line 0 "kernel.cu"\n{text}\n}}')
    table = ", ".join(f"v{number}::quantize" for number in range(len(variants)))
    parts.append(f"Kernel kernels[] = {{{table}}};")
    path = folder / f"{flavour}-{len(list(folder.iterdir()))}"
    # The model is compiled without a sanitizer: it is not what is looked at.
    model = path.with_suffix(".o")
    races = ("-DRACES",) if flavour == "races" else ()
    _compile(CUDA + MACHINERY + MODEL + MAIN, ("-c", *races), model)
    flags = (*FLAVOURS[flavour], "-x", "none", str(model))
    _compile("\n".join(parts), flags, path)
    return Program(path, tuple(variants))


def _compile(text: str, flags: tuple[str, ...], path: Path) -> None:
    command = [*GXX, *flags, "-o", str(path)]
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    if done.returncode:
        raise InputError(f"g++ refuses the kernel: {done.stderr.splitlines()[0]}")
