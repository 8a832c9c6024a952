"""The kernels of both GPU columns: their sources, how they are compiled and launched.

*.cu, *.cuh  one file for each method, and code that the files share
compiler     compiles them with NVRTC
driver       launches them, with addresses and the handle of a stream
checks       refuses arrays that a kernel would misread
tables       codebooks and settings in the form that the kernels read

Nothing here imports torch or CuPy. This module is the table of kernels: file, template,
arguments with their widths, threads, blocks. All code that calls a kernel reads its
arguments from here: the launchers, and the tests that run without a GPU. A new kernel
is one .cu file and one entry.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent

# The C++ name of each dtype that a template is instantiated for.
CTYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

# The options of NVRTC, here and in the tests. No fast math: by default NVRTC computes
# by IEEE 754, with subnormal numbers.
OPTIONS = (
    "-std=c++17",
    "--ptxas-options=-warn-spills",
    "--ptxas-options=-warn-lmem-usage",
)

POINTER = "pointer"
THREADS = 256
WARPS = THREADS // 32
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}

Blocks = Callable[[Mapping[str, Any], str], int]


def _tiles(name: str, values: int) -> Blocks:
    return lambda a, dtype: -(-a[name] // values)


@dataclass(frozen=True)
class Kernel:
    """A kernel template and its arguments.

    Args:
        row: the file without its ending.
        template: its name in that file.
        arguments: name to `POINTER`, or to the NumPy dtype of a scalar, in order.
        blocks: computes the number of blocks of a launch from arguments and dtype.
        threads: of a CUDA block; the same as in `__launch_bounds__`.
        dtypes: of the instances of the template; none: a plain function.
    """

    row: str
    template: str
    arguments: dict[str, str]
    blocks: Blocks
    threads: int = THREADS
    dtypes: tuple[str, ...] = tuple(CTYPES)

    def expression(self, dtype: str) -> str:
        """Return the C++ name of an instance, such as `quantize<__half>`."""
        return f"{self.template}<{CTYPES[dtype]}>" if self.dtypes else self.template

    def widths(self) -> list[int]:
        """Return the bytes of each argument."""
        return [
            8 if kind == POINTER else np.dtype(kind).itemsize
            for kind in self.arguments.values()
        ]

    def grid(self, arguments: Sequence[Any], dtype: str) -> int:
        """Return the number of blocks of a launch."""
        named = dict(zip(self.arguments, arguments, strict=True))
        return self.blocks(named, dtype)

    def pack(self, arguments: Sequence[Any]) -> list[Any]:
        """Convert every scalar to the kernel's width; None becomes a null pointer."""
        pairs = zip(self.arguments.values(), arguments, strict=True)
        return [_packed(kind, argument) for kind, argument in pairs]


def _packed(kind: str, argument: Any) -> Any:
    if kind == POINTER:
        return np.uint64(0) if argument is None else argument
    return np.dtype(kind).type(argument)


QUANTIZE = Kernel(
    "blockwise",
    "quantize",
    {
        "W": POINTER,
        "midpoints": POINTER,
        "order": "uint64",
        "packed": POINTER,
        "absmax": POINTER,
        "bad": POINTER,
        "n": "int64",
        "log2_blocksize": "int32",
        "bits": "int32",
    },
    lambda a, dtype: -(-a["n"] // max(1 << a["log2_blocksize"], 2048)),
)
DEQUANTIZE = Kernel(
    "blockwise",
    "dequantize",
    {
        "packed": POINTER,
        "absmax": POINTER,
        "codebook": POINTER,
        "out": POINTER,
        "n": "int64",
        "log2_blocksize": "int32",
        "bits": "int32",
    },
    _tiles("n", 8192),
)

NEST = Kernel(
    "double_quant",
    "nest",
    {
        "absmax": POINTER,
        "midpoints": POINTER,
        "codes": POINTER,
        "nested_absmax": POINTER,
        "n": "int64",
        "offset": "float32",
        "log2_blocksize": "int32",
    },
    lambda a, dtype: -(-a["n"] >> a["log2_blocksize"]),
    dtypes=(),
)
# The arguments that decode the scale of a block.
SCALES = {
    "absmax_codes": POINTER,
    "nested_absmax": POINTER,
    "map": POINTER,
    "offset": POINTER,
    "log2_nested_blocksize": "int32",
}
DEQUANTIZE_NESTED = Kernel(
    "double_quant",
    "dequantize_nested",
    {
        "packed": POINTER,
        **SCALES,
        "codebook": POINTER,
        "out": POINTER,
        "n": "int64",
        "log2_blocksize": "int32",
        "bits": "int32",
    },
    _tiles("n", 8192),
)
# The numbers that a step computes from its settings.
SETTINGS = {
    "decay": "float32",
    "new_m": "float32",
    "beta2": "float32",
    "new_v": "float32",
    "minus_step": "float32",
    "correction": "float32",
    "eps": "float32",
}
ADAMW = Kernel(
    "adamw",
    "adamw",
    {
        "W": POINTER,
        "grad": POINTER,
        "m": POINTER,
        "v": POINTER,
        "W_out": POINTER,
        "m_out": POINTER,
        "v_out": POINTER,
        "bad": POINTER,
        "n": "int64",
        **SETTINGS,
    },
    lambda a, dtype: -(-a["n"] * SIZES[dtype] // (16 * THREADS)),
)
ADAMW_8BIT = Kernel(
    "adamw",
    "adamw_8bit",
    {
        "W": POINTER,
        "grad": POINTER,
        "m_codes": POINTER,
        "v_codes": POINTER,
        "m_absmax": POINTER,
        "v_absmax": POINTER,
        "maps": POINTER,
        "W_out": POINTER,
        "m_codes_out": POINTER,
        "v_codes_out": POINTER,
        "m_absmax_out": POINTER,
        "v_absmax_out": POINTER,
        "bad": POINTER,
        "n": "int64",
        **SETTINGS,
    },
    _tiles("n", 8 * 1024),
)
FIRST_BAD = Kernel(
    "paged",
    "first_bad",
    {"x": POINTER, "bad": POINTER, "n": "int64", "limit": "float32"},
    _tiles("n", 8 * THREADS),
)
SHRINK = Kernel(
    "lora_batched",
    "shrink",
    {
        "x": POINTER,
        "A": POINTER,
        "indices": POINTER,
        "h": POINTER,
        "tokens": "int64",
        "in_features": "int32",
        "r": "int32",
    },
    lambda a, dtype: a["tokens"] * -(-a["r"] // WARPS),
)
EXPAND = Kernel(
    "lora_batched",
    "expand",
    {
        "h": POINTER,
        "B": POINTER,
        "scaling": POINTER,
        "indices": POINTER,
        "y": POINTER,
        "out": POINTER,
        "tokens": "int64",
        "out_features": "int32",
        "r": "int32",
    },
    lambda a, dtype: a["tokens"] * -(-a["out_features"] // THREADS),
)
PRODUCT = {
    "codebook": POINTER,
    "x": POINTER,
    "bias": POINTER,
    "h": POINTER,
    "B": POINTER,
    "y": POINTER,
    "tokens": "int32",
    "in_features": "int32",
    "out_features": "int32",
    "r": "int32",
    "scaling": POINTER,
    "log2_blocksize": "int32",
}


def _of_few_rows(a: Mapping[str, Any], dtype: str) -> int:
    rows = 64 if SIZES[dtype] == 2 else 4  # that share one decoding
    return -(-a["out_features"] // 16) * -(-a["tokens"] // rows)


PRODUCT_4BIT = Kernel(
    "qlora",
    "product",
    {"packed": POINTER, "absmax": POINTER, **PRODUCT},
    _of_few_rows,
)
PRODUCT_NESTED = Kernel(
    "qlora",
    "product_nested",
    {
        "packed": POINTER,
        **SCALES,
        **PRODUCT,
    },
    _of_few_rows,
)
NORM = {
    "W": POINTER,
    "A": POINTER,
    "B": POINTER,
    "norm": POINTER,
    "in_features": "int32",
    "out_features": "int32",
    "r": "int32",
    "scaling": "float32",
}
ROW_NORM = Kernel(
    "dora",
    "row_norm",
    NORM,
    lambda a, dtype: -(-a["out_features"] * SIZES[dtype] // 64),
)
# W in 16 bits, A and B in float32.
ROW_NORM_MIXED = Kernel(
    "dora",
    "row_norm_mixed",
    NORM,
    _tiles("out_features", 32),
    dtypes=("float16", "bfloat16"),
)

KERNELS = (
    *(QUANTIZE, DEQUANTIZE),
    *(NEST, DEQUANTIZE_NESTED),
    *(ADAMW, ADAMW_8BIT),
    *(SHRINK, EXPAND),
    *(PRODUCT_4BIT, PRODUCT_NESTED),
    *(ROW_NORM, ROW_NORM_MIXED),
    *(FIRST_BAD,),
)


def source(row: str) -> str:
    """Read the CUDA source of a row and replace each `#include` by the header's text.

    So the compiler needs no path, and a test can change every line.
    """
    return _written_out(f"{row}.cu", set())


def _written_out(name: str, seen: set[str]) -> str:
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((FOLDER / name).read_text().splitlines(), 1):
        header = re.fullmatch(r'#include "(\w+\.cuh)"', line)
        if not header:
            lines.append(line)
        elif header[1] not in seen:
            seen.add(header[1])
            text = _written_out(header[1], seen)
            lines += [text, f'#line {number + 1} "{name}"']
    return "\n".join(lines)


def instances(row: str) -> list[tuple[Kernel, str]]:
    """List a row's kernels with every dtype that they are compiled for."""
    return [(k, d) for k in KERNELS if k.row == row for d in k.dtypes or ("float32",)]


def expressions(row: str) -> list[str]:
    """List the C++ names of a row's instances."""
    return [kernel.expression(dtype) for kernel, dtype in instances(row)]
