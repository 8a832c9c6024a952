"""Every kernel with inputs for which the reference gives every byte of the result.

Codecs and optimizers are defined bit by bit, so their inputs can be any numbers.
Kernels with sums get small integers over a power of two: every partial sum is exact in
float32, in every order, and the reference computes the same in float64. A trial runs
the public launcher; the results of the kernel are read from the arguments of its
launch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minipeft.cupy import adamw, blockwise, dora, double_quant, lora_batched, paged
from minipeft.cupy import qlora as gpu_qlora
from minipeft.cupy.executor import Array, current, numpy_dtype
from minipeft.errors import InputError
from minipeft.kernels import (
    ADAMW,
    ADAMW_8BIT,
    DEQUANTIZE,
    DEQUANTIZE_NESTED,
    EXPAND,
    FIRST_BAD,
    NEST,
    PRODUCT_4BIT,
    PRODUCT_NESTED,
    QUANTIZE,
    ROW_NORM,
    ROW_NORM_MIXED,
    SHRINK,
    Kernel,
)
from minipeft.lab.gpu.launches import Launch
from minipeft.reference import adamw as ref_adamw
from minipeft.reference import blockwise as ref_blockwise
from minipeft.reference import dora as ref_dora
from minipeft.reference import double_quant as ref_double_quant
from minipeft.reference import linear, qlora
from minipeft.reference.codebook import FP4, NF4, dynamic_map
from minipeft.reference.lora import LoRA

DEVICE = 0
CODEBOOKS = {"NF4": NF4, "FP4": FP4}
# 16 codes that are small integers over 8; times a scale of 4, 8 or 16 they stay exact.
EIGHTHS = (np.arange(16, dtype=np.float32) - 8) / np.float32(8)
SCALING = 0.5
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
SETTINGS = ref_adamw.AdamW()
STEPS = 3  # taken before the one that is measured


@dataclass(frozen=True)
class Sizes:
    """How large the tensors are: those of one layer of a model of 7 billion."""

    out_features: int = 4096
    in_features: int = 4096
    r: int = 16
    adapters: int = 8  # and as many rows of x

    @property
    def weights(self) -> tuple[int, int]:
        """Return the shape of W."""
        return self.out_features, self.in_features


@dataclass(frozen=True)
class Trial:
    """One kernel on one set of inputs.

    Args:
        kernel: the kernel under test.
        dtype: of its instance.
        note: the difference from other trials of the kernel.
        run: copies the inputs to the device and calls the launcher.
        expected: the correct results, by the name of the argument.
    """

    kernel: Kernel
    dtype: str
    note: str
    run: Callable[[], object]
    expected: Mapping[str, np.ndarray]

    @property
    def name(self) -> str:
        """Name the kernel and the trial."""
        return f"{self.kernel.row}.{self.kernel.template} {self.note}".strip()


def difference(trial: Trial, launch: Launch) -> str | None:
    """Describe a difference from the expected results; None if there is none.

    Every byte counts.
    """
    for name, expected in trial.expected.items():
        got = current().download(launch.arguments[name])
        if (got.dtype, got.size) != (expected.dtype, expected.size):
            return f"{name} is {got.dtype}[{got.size}]"
        bits = np.dtype(f"u{got.itemsize}")
        wrong = got.reshape(-1).view(bits) != expected.reshape(-1).view(bits)
        if wrong.any():
            where, count = int(np.argmax(wrong)), np.count_nonzero(wrong)
            return f"{count} of {wrong.size} values of {name} differ, first at {where}"
    return None


def trials(sizes: Sizes) -> Iterator[Trial]:
    """Build the trials one by one: the arrays of one trial use much memory."""
    for kernel, note, build in TABLE:
        for dtype in kernel.dtypes or ("float32",):
            run, expected = build(sizes, dtype)
            yield Trial(kernel, dtype, note, run, expected)


Built = tuple[Callable[[], object], Mapping[str, np.ndarray]]


def _normal(sizes: Sizes, dtype: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(sizes.weights, np.float32).astype(numpy_dtype(dtype))


def _integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-2, 3, shape).astype(np.float64)


def _up(array: np.ndarray) -> Array:
    return current().upload(array, DEVICE)


def _part(value: Any) -> Any:
    is_array = isinstance(value, np.ndarray | np.generic)
    return _up(np.asarray(value)) if is_array else value


def _parts(kind: Callable[..., Any], q: Any) -> Any:
    """Copy a quantized tensor of the reference to the device."""
    return kind(**{name: _part(value) for name, value in vars(q).items()})


def _none_bad(n: int) -> np.ndarray:
    return np.array([n], np.uint64)


def _exact(sums: np.ndarray, dtype: str) -> np.ndarray:
    """Round sums that float32 holds exactly once, to the dtype; a zero has no sign."""
    return (sums + 0.0).astype(np.float32).astype(numpy_dtype(dtype))


# Codecs


def _quantize(codebook: np.ndarray) -> Callable[[Sizes, str], Built]:
    def build(sizes: Sizes, dtype: str) -> Built:
        W = _normal(sizes, dtype)
        q = ref_blockwise.quantize(W, codebook)
        found = {"packed": q.packed, "absmax": q.absmax, "bad": _none_bad(W.size)}
        return lambda: blockwise.quantize(_up(W), codebook), found

    return build


def _dequantize(codebook: np.ndarray) -> Callable[[Sizes, str], Built]:
    def build(sizes: Sizes, dtype: str) -> Built:
        q = ref_blockwise.quantize(_normal(sizes, "float32"), codebook)
        values = ref_blockwise.dequantize(q, numpy_dtype(dtype))

        def run() -> object:
            return blockwise.dequantize(_parts(blockwise.Blockwise, q), dtype)

        return run, {"out": values}

    return build


def _nest(sizes: Sizes, dtype: str) -> Built:
    W = _normal(sizes, dtype)
    q = ref_double_quant.quantize(W)
    found = {"codes": q.absmax_codes, "nested_absmax": q.nested_absmax}
    return lambda: double_quant.quantize(_up(W)), found


def _dequantize_nested(sizes: Sizes, dtype: str) -> Built:
    q = ref_double_quant.quantize(_normal(sizes, "float32"))
    values = ref_double_quant.dequantize(q, numpy_dtype(dtype))

    def run() -> object:
        return double_quant.dequantize(_parts(double_quant.Nested, q), dtype)

    return run, {"out": values}


# The optimizer


def _adamw(bits: int) -> Callable[[Sizes, str], Built]:
    def build(sizes: Sizes, dtype: str) -> Built:
        W, grad, m = (_normal(sizes, dtype, seed) for seed in range(3))
        zero = ref_adamw.init(W, bits)
        state = ref_adamw.State(STEPS, _like(zero.m, m), _like(zero.v, m * m))
        after, expected = ref_adamw.step(W, grad, state, SETTINGS)
        found = {"W_out": after, "bad": _none_bad(W.size)} | _moments(expected)
        config = adamw.AdamW(**vars(SETTINGS))

        def run() -> object:
            there = adamw.State(STEPS, _moment(state.m), _moment(state.v))
            return adamw.step(_up(W), _up(grad), there, config)

        return run, found

    return build


def _like(moment: ref_adamw.Moment, values: np.ndarray) -> ref_adamw.Moment:
    if isinstance(moment, np.ndarray):
        values = values.astype(moment.dtype)
    return ref_adamw.encode(values, moment)


def _moment(moment: Any) -> Any:
    if isinstance(moment, np.ndarray):
        return _up(moment)
    return _parts(blockwise.Blockwise, moment)


def _moments(state: ref_adamw.State) -> dict[str, np.ndarray]:
    named = ref_adamw.to_arrays(replace(state, t=0))
    return {f"{name}_out": array for name, array in named.items() if name != "t"}


def _first_bad(sizes: Sizes, dtype: str) -> Built:
    W, grad = _normal(sizes, dtype), _normal(sizes, dtype, 1)
    middle = grad.size // 2
    grad.reshape(-1)[middle :: grad.size // 4] = np.nan
    page = -(-W.size // adamw.BLOCKSIZE) * adamw.BLOCKSIZE

    def run() -> None:
        pages = paged.init([adamw.init(_up(W))], page, 1)
        with suppress(InputError):  # the step refuses this gradient
            paged.step(pages, 0, _up(W), _up(grad), adamw.AdamW())

    return run, {"bad": np.array([middle], np.uint64)}


# Sums


@dataclass(frozen=True)
class _Batch:
    """Rows of x, each with an adapter of its own, in float64."""

    x: np.ndarray
    y: np.ndarray
    loras: tuple[LoRA, ...]
    indices: np.ndarray

    def hidden(self) -> np.ndarray:
        rows = zip(self.x, self.indices, strict=True)
        return np.stack([linear.forward(x, self.loras[i].A) for x, i in rows])

    def out(self) -> np.ndarray:
        rows = zip(self.hidden(), self.indices, strict=True)
        updates = [linear.forward(h, SCALING * self.loras[i].B) for h, i in rows]
        return self.y + np.stack(updates)

    def forward(self, dtype: str) -> Callable[[], object]:
        def run() -> object:
            x, y = (_up(part.astype(numpy_dtype(dtype))) for part in (self.x, self.y))
            adapters = lora_batched.stack(self.loras, dtype, DEVICE)
            return lora_batched.forward(x, y, adapters, self.indices)

        return run


def _batch(sizes: Sizes) -> _Batch:
    rng, n = np.random.default_rng(4), sizes.adapters
    x, y = (_integers(rng, n, size) for size in (sizes.in_features, sizes.out_features))
    loras = tuple(_lora(rng, sizes) for _ in range(n))
    return _Batch(x, y, loras, rng.permutation(n).astype(np.int32))


def _lora(rng: np.random.Generator, sizes: Sizes) -> LoRA:
    A = _integers(rng, sizes.r, sizes.in_features)
    return LoRA(A, _integers(rng, sizes.out_features, sizes.r), SCALING)


def _shrink(sizes: Sizes, dtype: str) -> Built:
    batch = _batch(sizes)
    return batch.forward(dtype), {"h": _exact(batch.hidden(), "float32")}


def _expand(sizes: Sizes, dtype: str) -> Built:
    batch = _batch(sizes)
    return batch.forward(dtype), {"out": _exact(batch.out(), dtype)}


def _base(sizes: Sizes) -> ref_blockwise.Blockwise:
    rng = np.random.default_rng(5)
    n = sizes.out_features * sizes.in_features
    packed = rng.integers(0, 256, n // 2, np.uint8)
    absmax = rng.choice(np.array([4, 8, 16], np.float32), n // BLOCKSIZE)
    return ref_blockwise.Blockwise(packed, absmax, EIGHTHS, BLOCKSIZE, sizes.weights)


def _nested_base(sizes: Sizes) -> ref_double_quant.Nested:
    """Give every scale the code of 0 or of 1: it decodes to 4 or to 8."""
    rng, q = np.random.default_rng(6), _base(sizes)
    values = dynamic_map()
    ends = np.flatnonzero((values == 0) | (values == 1)).astype(np.uint8)
    codes = rng.choice(ends, q.absmax.size)
    nested = np.full(-(-codes.size // NESTED_BLOCKSIZE), 4, np.float32)
    sizes_ = (BLOCKSIZE, NESTED_BLOCKSIZE)
    return ref_double_quant.Nested(
        q.packed, codes, nested, np.float32(4), EIGHTHS, *sizes_, sizes.weights
    )


def _product(sizes: Sizes, dtype: str) -> Built:
    return _decode(sizes, dtype, _base(sizes))


def _product_nested(sizes: Sizes, dtype: str) -> Built:
    return _decode(sizes, dtype, _nested_base(sizes))


def _decode(sizes: Sizes, dtype: str, q: Any) -> Built:
    """Multiply one row by the base alone, as in decoding."""
    row, W = _row(sizes), qlora.dequantize(q, np.float64)
    y = _exact(linear.forward(row, W), dtype)

    def run() -> object:
        x = _up(row.astype(numpy_dtype(dtype)))
        return gpu_qlora.forward(x, _base_there(q))

    return run, {"y": y}


def _adapted(sizes: Sizes, dtype: str) -> Built:
    """Multiply one row by the base and the adapter beside it."""
    row, q, lora = _row(sizes), _base(sizes), _lora(np.random.default_rng(9), sizes)
    y = _exact(qlora.forward(row, q, lora), dtype)

    def run() -> object:
        x = _up(row.astype(numpy_dtype(dtype)))
        adapter = lora_batched.stack([lora], dtype, DEVICE)
        return gpu_qlora.forward(x, _base_there(q), adapter)

    return run, {"y": y}


def _row(sizes: Sizes) -> np.ndarray:
    return _integers(np.random.default_rng(7), 1, sizes.in_features)


def _base_there(q: Any) -> Any:
    nested = isinstance(q, ref_double_quant.Nested)
    return _parts(double_quant.Nested if nested else blockwise.Blockwise, q)


def _row_norm(sizes: Sizes, dtype: str) -> Built:
    return _norms(sizes, dtype, dtype)


def _row_norm_mixed(sizes: Sizes, dtype: str) -> Built:
    return _norms(sizes, dtype, "float32")


def _norms(sizes: Sizes, dtype: str, factors: str) -> Built:
    rng = np.random.default_rng(8)
    W, lora = _integers(rng, *sizes.weights), _lora(rng, sizes)
    norm = _exact(ref_dora.row_norm(W, lora), "float32")

    def run() -> object:
        A, B = (_up(part.astype(numpy_dtype(factors))) for part in (lora.A, lora.B))
        return dora.row_norm(_up(W.astype(numpy_dtype(dtype))), A, B, SCALING)

    return run, {"norm": norm}


TABLE: tuple[tuple[Kernel, str, Callable[[Sizes, str], Built]], ...] = (
    *((QUANTIZE, name, _quantize(codebook)) for name, codebook in CODEBOOKS.items()),
    *((DEQUANTIZE, name, _dequantize(book)) for name, book in CODEBOOKS.items()),
    (NEST, "", _nest),
    (DEQUANTIZE_NESTED, "NF4", _dequantize_nested),
    (ADAMW, "", _adamw(32)),
    (ADAMW_8BIT, "", _adamw(8)),
    (FIRST_BAD, "", _first_bad),
    (SHRINK, "", _shrink),
    (EXPAND, "", _expand),
    (PRODUCT_4BIT, "", _product),
    (PRODUCT_4BIT, "and LoRA", _adapted),
    (PRODUCT_NESTED, "", _product_nested),
    (ROW_NORM, "", _row_norm),
    (ROW_NORM_MIXED, "", _row_norm_mixed),
)
