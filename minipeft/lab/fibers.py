"""A GPU made of fibers: run small CUDA kernels on a CPU, with threads in any order.

For chapter 19: kernels of one signature, in blocks of 64 threads. The execution model
is that of the tests, `minipeft/kernels/cpu/`; here it needs no header of NVIDIA's.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipeft import kernels
from minipeft.errors import InputError
from minipeft.shapes import Float, UInt8

# The errors that each way of compiling makes visible: wrong values; data races;
# addresses outside an array, and undefined behaviour of C++.
FLAVOURS = {
    "values": (),
    "races": ("-fsanitize=thread",),
    "addresses": (
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ),
}
CPU = Path(kernels.__file__).with_name("cpu")
GXX = ("g++", "-std=c++20", "-O1", "-g1", "-ffp-contract=off", f"-I{CPU}", "-x", "c++")

CUDA = """
#include <cmath>
#include "model.hpp"
#define __global__
#define __shared__ static
#define threadIdx (::shim::thread)
#define blockIdx (::shim::block)
inline void __syncthreads() { ::shim::sync_block(); }
"""

MAIN = r"""
#include <cstdio>
#include <cstdlib>
int main(int, char** words) {  // variant, n, seed; the weights come from stdin
  int n = std::atoi(words[2]);
  const int blocks = (n + 63) / 64, bytes = (n + 1) / 2;
  float* weights = new float[n];  // as long as the tensor: sanitizers see the ends
  if (std::fread(weights, 4, n, stdin) != size_t(n)) shim::stop("too few weights");
  const float* W = weights;
  unsigned char* packed = new unsigned char[bytes]();
  float* absmax = new float[blocks]();
  void* arguments[] = {&W, &packed, &absmax, &n};
  const unsigned seed = std::atoi(words[3]);
  shim::launch(registry().at(words[1]), blocks, 64, seed, arguments);
  std::fwrite(packed, 1, bytes, stdout);
  std::fwrite(absmax, 4, blocks, stdout);
  delete[] weights, delete[] packed, delete[] absmax;
}
"""


def heart() -> str:
    """Return the part of the model that runs a block, as it is compiled."""
    text = (CPU / "fibers.cpp").read_text("utf-8")
    parts = ("void wait_as", "void open_barriers", "void run_block", "void sync_block")
    found = []
    for part in parts:
        begin = text.index(part)
        found.append(text[begin : text.index("\n}\n", begin) + 2])
    return "\n\n".join(found)


@dataclass(frozen=True)
class Outcome:
    """The result of a launch: the packed bytes, the scales, and error messages."""

    packed: UInt8[np.ndarray, " bytes"]
    absmax: Float[np.ndarray, " blocks"]
    complaints: str


@dataclass(frozen=True)
class Variants:
    """Variants of a kernel, compiled in one way."""

    path: Path
    variants: tuple[str, ...]

    def run(
        self, variant: str, W: Float[np.ndarray, " values"], seed: int = 0
    ) -> Outcome:
        """Run a variant on some weights, in the order that the seed draws.

        A stopped launch returns zeros.
        """
        arguments = (f"v{self.variants.index(variant)}", W.size, seed)
        # ThreadSanitizer waits for other threads at the end, a second, without need.
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


def build(variants: Mapping[str, str], flavour: str, folder: Path) -> Variants:
    """Compile variants of one kernel into a program.

    Args:
        variants: the CUDA source of `quantize(W, packed, absmax, n)`, by a name.
        flavour: the errors to make visible, from `FLAVOURS`.
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
    names = [f"v{number}" for number in range(len(variants))]
    entries = ", ".join(f'{{"{v}", shim::describe(&{v}::quantize)}}' for v in names)
    parts.append(f"Registry registry() {{ return {{{entries}}}; }}")
    path = folder / f"{flavour}-{len(list(folder.iterdir()))}"
    # The execution model is compiled without a sanitizer: only the kernel is tested.
    model = path.with_suffix(".o")
    races = ("-DSHIM_RACES",) if flavour == "races" else ()
    sources = f'#include "{CPU / "fibers.cpp"}"\n{MAIN}'
    _compile(sources, ("-c", *races), model)
    flags = (*FLAVOURS[flavour], "-x", "none", str(model))
    _compile("\n".join(parts), flags, path)
    return Variants(path, tuple(variants))


def _compile(text: str, flags: tuple[str, ...], path: Path) -> None:
    command = [*GXX, "-", *flags, "-o", str(path)]
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    if done.returncode:
        raise InputError(f"g++ refuses the kernel: {done.stderr.splitlines()[0]}")
