"""The small model of a GPU runs correct kernels and reports errors of wrong ones."""

import numpy as np
import pytest

from minipeft.errors import InputError
from minipeft.lab import fibers

KERNEL = """
__global__ void quantize(const float* W, unsigned char* packed, float* absmax, int n) {
  __shared__ float shared[64];
  const int t = threadIdx.x, i = blockIdx.x * 64 + t;
  shared[t] = i < n ? W[i] : 0.0f;
  __syncthreads();
  if (t % 2 == 0 && i < n) packed[i / 2] = shared[t] + 16 * shared[t + 1];
  if (t == 0) absmax[blockIdx.x] = shared[63];
}
"""
VARIANTS = {
    "right": KERNEL,
    "no barrier": KERNEL.replace("  __syncthreads();\n", ""),
    "divergent": KERNEL.replace("  __sync", "  if (t < 9) __sync"),
    "too far": KERNEL.replace("i < n ?", "i <= n ?"),
}
W = (np.arange(64 * 3 - 1) % 16).astype(np.float32)
PACKED = np.append(W, 0).astype(np.uint8).reshape(-1, 2) @ np.uint8([1, 16])
REPORTS = {
    "values": "__syncthreads not reached by every thread",
    "races": "ThreadSanitizer: data race",
    "addresses": "AddressSanitizer: heap-buffer-overflow",
}

needs_gxx = pytest.mark.skipif(
    fibers.missing() is not None, reason=str(fibers.missing())
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fibers")
    return {f: fibers.build(VARIANTS, f, folder) for f in fibers.FLAVOURS}


@needs_gxx
@pytest.mark.parametrize("flavour", fibers.FLAVOURS)
@pytest.mark.parametrize("seed", range(3))
def test_a_right_kernel_is_right_in_every_order(programs, flavour, seed):
    outcome = programs[flavour].run("right", W, seed)
    assert outcome.complaints == ""
    assert np.array_equal(outcome.packed, PACKED)
    assert outcome.absmax.tolist() == [15, 15, 0]


@needs_gxx
def test_a_missing_barrier_shows_in_some_order(programs):
    outputs = [programs["values"].run("no barrier", W, s).packed for s in range(4)]
    assert any(not np.array_equal(packed, PACKED) for packed in outputs)
    assert len({packed.tobytes() for packed in outputs}) > 1


@needs_gxx
@pytest.mark.parametrize(
    ("variant", "flavour"),
    [("divergent", "values"), ("no barrier", "races"), ("too far", "addresses")],
)
def test_each_flavour_reports_what_it_is_there_for(programs, variant, flavour):
    outcome = programs[flavour].run(variant, W)
    assert REPORTS[flavour] in outcome.complaints


@needs_gxx
def test_a_kernel_that_does_not_compile_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"g\+\+ refuses the kernel: kernel.cu:1:"):
        fibers.build({"broken": "\nint quantize(;"}, "values", tmp_path)


def test_an_unknown_flavour_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="flavour is 'speed'; choose one of"):
        fibers.build(VARIANTS, "speed", tmp_path)


def test_no_compiler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(fibers.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"g\+\+ is not installed"):
        fibers.build(VARIANTS, "values", tmp_path)
