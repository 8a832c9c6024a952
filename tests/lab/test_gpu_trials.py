"""The trials of `minipeft gpu-report` on the CPU: checked output, counted bytes."""

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from minipeft.cupy.executor import use
from minipeft.kernels import FOLDER, KERNELS, POINTER
from minipeft.lab.gpu import trials
from minipeft.lab.gpu.launches import Launch, Recorder
from minipeft.lab.gpu.trials import Sizes, Trial
from tests.cuda.executors import CpuExecutor
from tests.cuda.toolchain import needs_cpu_build

pytestmark = needs_cpu_build
SIZES = Sizes(out_features=64, in_features=256, r=4, adapters=3)
N = SIZES.out_features * SIZES.in_features
NAMES = [f"{kernel.template} {note}".strip() for kernel, note, _ in trials.TABLE]
# Tables, settings and counters: the same few bytes for tensors of any size.
SMALL = {"offset", "midpoints", "codebook", "map", "maps", "bad", "indices", "scaling"}


class Watching(CpuExecutor):
    """Records the arguments that each kernel changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: dict[str, set[str]] = {}

    def launch(self, kernel, dtype, args):
        arrays = dict(zip(kernel.arguments, args, strict=True))
        arrays = {k: a for k, a in arrays.items() if isinstance(a, np.ndarray)}
        before = {name: array.tobytes() for name, array in arrays.items()}
        super().launch(kernel, dtype, args)
        self.changed[kernel.template] = {
            name for name, array in arrays.items() if array.tobytes() != before[name]
        }


@cache
def launched(name: str, dtype: str | None = None) -> tuple[Trial, Launch, set[str]]:
    """Run a trial; return its launch and the arguments that the kernel changed.

    Without a dtype: the first of the kernel's.
    """
    kernel, note, build = trials.TABLE[NAMES.index(name)]
    dtype = dtype or next(iter(kernel.dtypes), "float32")
    cpu = Watching()
    recorder = Recorder(cpu)
    with use(recorder):
        trial = Trial(kernel, dtype, note, *build(SIZES, dtype))
        trial.run()
        return trial, recorder.take(kernel), cpu.changed[kernel.template]


def test_every_kernel_has_a_trial_and_no_two_share_a_name():
    tried = {kernel.template for kernel, _, _ in trials.TABLE}
    assert tried == {kernel.template for kernel in KERNELS}
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_kernel_writes_is_expected(name):
    """Each output starts as a pattern, so a kernel changes each array that it fills."""
    trial, _, changed = launched(name)
    assert changed <= set(trial.expected)
    assert set(trial.expected) - changed <= {"bad"}  # nothing is bad: its count stays


@pytest.mark.parametrize("name", NAMES)
def test_one_wrong_bit_is_seen_in_any_of_it(name):
    trial, launch, _ = launched(name)
    with use(CpuExecutor()):
        assert trials.difference(trial, launch) is None
        for argument in trial.expected:
            array = launch.arguments[argument].reshape(-1)
            array.view(np.uint8)[-1] ^= 1
            found = trials.difference(trial, launch)
            array.view(np.uint8)[-1] ^= 1
            where = array.size - 1
            assert found == (
                f"1 of {array.size} values of {argument} differ, first at {where}"
            )


# The counts in the head of each file, as numbers: bytes of all arrays and operations of
# a launch. s: bytes of the dtype, b = 4. In the heads N is a block size, here 64, and
# N' the nested one, here 256; the N of the formulas counts weights.
Count = Callable[[int], float]
r, t = SIZES.r, SIZES.adapters
IN, OUT = SIZES.in_features, SIZES.out_features
BYTES: dict[str, tuple[str, Count]] = {
    "quantize NF4": (
        "s read, b/8 + 4/N written",
        lambda s: N * (s + 4 / 8 + 4 / 64),
    ),
    "dequantize NF4": (
        "b/8 + 4/N read, s written",
        lambda s: N * (4 / 8 + 4 / 64 + s),
    ),
    "nest": (
        "a scale: 4 read, 1 + 4/N' written",
        lambda s: N / 64 * (4 + 1 + 4 / 256),
    ),
    "dequantize_nested NF4": (
        "b/8 + 1/N + 4/(N N') read, s written",
        lambda s: N * (4 / 8 + 1 / 64 + 4 / (64 * 256) + s),
    ),
    "adamw": (
        "W, g read and W written: 3 s; m, v read and written: 16.",
        lambda s: N * (3 * s + 16),
    ),
    "adamw_8bit": (
        "W, g read and W written: 3 s; codes 2 read, 2 written; scales 16/256:",
        lambda s: N * (3 * s + 4 + 16 / 256),
    ),
    "first_bad": ("s read", lambda s: N * s),
    "shrink": (
        "s r in_features of A, s in_features of x r/8 times from L1, 4 r written",
        lambda s: t * (s * r * IN + s * IN + 4 * r),
    ),
    "expand": (
        "s r out_features of B, 4 r of h, 2 s out_features of y and out",
        lambda s: t * (s * r * OUT + 4 * r + 2 * s * OUT),
    ),
    "product": (
        "1/2 + 4/N of its code and scale",
        lambda s: N * (1 / 2 + 4 / 64) + s * (IN + OUT),  # x and y
    ),
    "product_nested": (
        "(1/2 + 1/N when nested)",
        lambda s: N * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + s * (IN + OUT),
    ),
    "row_norm": (
        "s read from DRAM",
        lambda s: N * s + s * r * (IN + OUT) + 4 * OUT,  # A and B, norm
    ),
    "row_norm_mixed": (
        "of A, from L2, f r / 16 where W is float32 and f r / 32 where it has 16 bits",
        lambda s: N * s + 4 * r * (IN + OUT) + 4 * OUT,
    ),
}
OPERATIONS: dict[str, tuple[str, float]] = {
    "quantize NF4": ("quantize 1 maximum, 1 product, 4 comparisons", 6 * N),
    "dequantize NF4": ("dequantize 1 product", N),
    "nest": (
        "a scale: 2 differences, 1 maximum, 1 product, 8 comparisons",
        12 * N / 64,
    ),
    "dequantize_nested NF4": (
        "a value: 1 product; its scale: a product and a sum for every thread that uses "
        "it, 1/8 each",
        1.25 * N,
    ),
    "adamw": ("Operations a value: 14", 14 * N),
    "adamw_8bit": ("in eight bits 16 comparisons more", 30 * N),
    "first_bad": ("Operations: one comparison", N),
    "shrink": ("Flops: 2 r (in_features + out_features)", t * 2 * r * IN),
    "expand": ("Flops: 2 r (in_features + out_features)", t * 2 * r * OUT),
    "product": (
        "Flops: 2 a weight and row, and the decoding: a shift, a mask, a product",
        (2 + 3) * N,
    ),
    "product_nested": ("`product_nested` decodes the scales too", (2 + 3) * N),
    "row_norm": ("Flops: 2 r + 3", (2 * r + 3) * N),
    "row_norm_mixed": ("are float32 beside W of 16 bits", (2 * r + 3) * N),
}


def head(row: str) -> str:
    """Return the comment that opens a row's file, as one line."""
    lines = (FOLDER / f"{row}.cu").read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("//"))
    return re.sub(r"\s+", " ", " ".join(line[2:] for line in lines[:end]))


def test_the_heads_are_held_to_for_every_kernel():
    templates = {kernel.template for kernel in KERNELS}
    assert {name.split()[0] for name in BYTES} == templates
    assert {name.split()[0] for name in OPERATIONS} == templates


@pytest.mark.parametrize("name", BYTES)
def test_the_bytes_are_those_that_the_head_states(name):
    statement, count = BYTES[name]
    kernel = trials.TABLE[NAMES.index(name)][0]
    assert statement in head(kernel.row)
    for dtype in {"float32", "float16"}.intersection(kernel.dtypes or ("float32",)):
        _, launch, _ = launched(name, dtype)
        small = sum(
            array.nbytes
            for argument, array in launch.arguments.items()
            if kernel.arguments[argument] == POINTER
            and argument in SMALL
            and array is not None
        )
        size = np.dtype(dtype).itemsize
        assert launch.bytes_moved - small == count(size)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operations_are_those_that_the_head_states(name):
    statement, count = OPERATIONS[name]
    kernel = trials.TABLE[NAMES.index(name)][0]
    assert statement in head(kernel.row)
    assert launched(name)[1].operations == count


def test_an_adapter_adds_its_own_work():
    plain, adapted = (launched(name)[1] for name in ("product", "product and LoRA"))
    assert adapted.operations - plain.operations == 2 * r * OUT
    more = 4 * (r * OUT + r) + 4  # B and h, the scaling
    assert adapted.bytes_moved - plain.bytes_moved == more


def test_the_recorder_forgets_what_it_handed_out():
    """Otherwise a report would keep the arrays of all kernels in memory."""
    trial = launched("quantize NF4")[0]
    recorder = Recorder(CpuExecutor())
    with use(recorder):
        trial.run()
    recorder.take(trial.kernel)
    with pytest.raises(ValueError, match="not enough values"):
        recorder.take(trial.kernel)
