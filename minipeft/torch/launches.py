"""What an operator does on a GPU: check, allocate, launch on the current stream."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from minipeft import kernels
from minipeft.errors import InputError
from minipeft.kernels import checks, compiler, driver, tables
from minipeft.kernels.checks import Facts, Layout, check, log2_blocksize
from minipeft.torch.codebook import dynamic_map

GPUS = {"cuda"}
"""The types of device on which kernels run."""

WRITTEN = {getattr(torch, name) for name in kernels.CTYPES}
"""The dtypes that kernels write."""

HOST = -1
"""The number that stands for every other device in the facts about a tensor."""

BLOCKSIZE = 256
"""Values of a moment of eight bits that share a scale."""

FEW = 4
"""Rows for which ordinary units of a GPU are as fast as a matrix product."""

SHARED = {torch.float32: FEW, torch.float16: 64, torch.bfloat16: 64}
"""With at most so many rows of x the kernel `product` runs, with more cuBLAS."""

TENSOR_CORES = (8, 0)
"""The first generation whose tensor cores the kernel uses."""

EMULATED = 16
"""As `SHARED`, for 16 bits on an older GPU.

There the lanes exchange the numbers: 38 instructions a weight for each 8 rows, by the
machine code for sm_75. On a T4 three times 8 rows take as long as decoding the weight,
writing it and reading it again; on an RTX 2080 Ti, two to three times.
"""


@dataclass(frozen=True)
class Ready:
    """A quantized weight on a GPU whose parts have been checked.

    Args:
        weight: its tensors, as `operators.parts` lists them.
        layout: its sizes, likewise.
        sizes: the same with names.
        bits: of a code.
        facts: of the tensors.
    """

    weight: list[Tensor]
    layout: list[int]
    sizes: Layout
    bits: int
    facts: list[Facts]

    def holds(self, weight: Sequence[Tensor]) -> bool:
        """Tell whether these tensors are the checked ones and lie where they lay."""
        pairs = zip(self.weight, weight, self.facts, strict=True)
        return all(a is b and b.data_ptr() == f.address for a, b, f in pairs)


class Place(NamedTuple):
    """How a tensor lies, in torch's words; checks read it in the words of `Facts`."""

    dtype: torch.dtype
    shape: torch.Size
    contiguous: bool
    device: torch.device
    address: int


def ready(weight: Sequence[Tensor], layout: Sequence[int]) -> Ready:
    """Check the parts of a quantized weight.

    Raises:
        InputError: at the first part that a kernel would misread.
    """
    facts, sizes = list(map(_facts, weight)), layout_of(weight, layout)
    packed, *scales, codebook = facts
    bits = checks.check_codes(packed, scales[0], codebook, sizes)
    if len(scales) > 1:
        checks.check_nested(scales[1], scales[2], sizes, codebook.device)
    return Ready(list(weight), list(layout), sizes, bits, facts)


def available(*tensors: Tensor) -> bool:
    """Tell whether kernels can read these tensors, and a compiler is there."""
    first = tensors[0]
    return (
        first.device.type in GPUS
        and all(t.device == first.device and _fits(t) for t in tensors)
        and _compiler_is_here()
    )


def decodes(codebook: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the kernels decode codes of this codebook to this dtype."""
    return len(codebook) in (2, 4, 8, 16) and dtype in WRITTEN


def dequantize(
    weight: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Launch `dequantize`, or `dequantize_nested` if the scales are codes too."""
    return decode(ready(weight, layout), dtype)


def decode(W: Ready, dtype: torch.dtype) -> Tensor:
    """Launch as `dequantize` does, for a weight that was checked."""
    if dtype not in WRITTEN:
        raise InputError(
            f"the kernels write no {_name(dtype)}; choose one of "
            f"{list(kernels.CTYPES)}, or call minipeft.torch.blockwise.dequantize."
        )
    sizes, packed, codebook = W.sizes, W.facts[0], W.facts[-1]
    out = W.weight[0].new_empty(sizes.shape, dtype=dtype)
    nested = sizes.nested_blocksize is not None
    kernel = kernels.DEQUANTIZE_NESTED if nested else kernels.DEQUANTIZE
    args = [packed, *_scales(W), codebook, out]
    _launch(kernel, dtype, [*args, sizes.size, log2_blocksize(sizes.blocksize), W.bits])
    return out


def quantize(W: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Launch `quantize` and wait, to name the first value that is not finite.

    Raises:
        InputError: at the first NaN or infinity.
    """
    facts = check("W", _facts(W), kernels.CTYPES)
    table = tables.sort(codebook.cpu().numpy())
    n, log2 = facts.size, log2_blocksize(blocksize)
    packed = W.new_empty(-(-n * table.bits // 8), dtype=torch.uint8)
    absmax = W.new_empty(-(-n // blocksize), dtype=torch.float32)
    bad = W.new_full((1,), n, dtype=torch.int64)
    search = [torch.from_numpy(table.midpoints).to(W.device), table.order]
    args = [W, *search, packed, absmax, bad, n, log2, table.bits]
    _launch(kernels.QUANTIZE, W.dtype, args)
    if (first := int(bad)) < n:
        raise InputError(
            f"W holds {W.reshape(-1)[first]} at flat index {first}, the first value "
            "that is not finite; repair the weights before quantizing them."
        )
    return packed, absmax


def matmul_4bit(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None
) -> Tensor:
    """For few rows launch `product`; for more, decode once and call cuBLAS."""
    return multiply(x, ready(weight, layout), bias)


def multiply(x: Tensor, W: Ready, bias: Tensor | None) -> Tensor:
    """Multiply as `matmul_4bit` does, by a weight that was checked."""
    n = x.numel() // max(x.shape[-1], 1)
    if n > _shared(x.dtype, x.device) or W.bits != 4 or not _for_few_rows(W.sizes):
        return linear(x, decode(W, x.dtype), bias)
    y = _product(_readable(x.reshape(-1, x.shape[-1])), W, bias)
    return y.view(*x.shape[:-1], W.sizes.shape[0])


def _shared(dtype: torch.dtype, device: torch.device) -> int:
    most = SHARED.get(dtype, 0)
    if device.type != "cuda":
        return most
    old = torch.cuda.get_device_capability(device) < TENSOR_CORES
    return min(most, EMULATED) if old else most


def _for_few_rows(sizes: Layout) -> bool:
    return sizes.shape[1] % checks.GROUP == 0 and sizes.blocksize >= checks.GROUP


def _readable(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _product(rows: Tensor, W: Ready, bias: Tensor | None) -> Tensor:
    out_features, in_features = W.sizes.shape
    packed, *scales, codebook = W.facts
    x = check("x", _facts(rows), kernels.CTYPES, packed.device)
    checks.check_product(x, W.sizes, codebook.size)
    if bias is not None:
        bias = bias.contiguous()
        _check_bias(bias, x, out_features)
    y = rows.new_empty(len(rows), out_features)
    kernel = kernels.PRODUCT_NESTED if len(scales) > 1 else kernels.PRODUCT_4BIT
    numbers = [len(rows), in_features, out_features, 0, None]
    args = [packed, *_scales(W), codebook, rows, bias, None, None, y]
    log2 = log2_blocksize(W.sizes.blocksize)
    _launch(kernel, rows.dtype, [*args, *numbers, log2])
    return y


def _check_bias(bias: Tensor, x: Facts, out_features: int) -> None:
    # The kernel loads one value of it at a time.
    found = check("bias", _facts(bias), [x.dtype], x.device, x.itemsize)
    if found.shape != (out_features,):
        raise InputError(
            f"bias has shape {found.shape}; give ({out_features},), a value for each "
            "row of the weight."
        )


def adamw_(
    W: Tensor, grad: Tensor, m: Tensor, v: Tensor, settings: Sequence[float]
) -> None:
    """Launch `adamw`; each output overwrites its input."""
    facts = _check_step(W, grad)
    for name, moment in (("m", m), ("v", v)):
        _check_moment(name, moment, "float32", facts)
    args = [W, grad, m, v, W, m, v, None, facts.size, *settings]
    _launch(kernels.ADAMW, W.dtype, args)


def adamw_8bit_(
    W: Tensor,
    grad: Tensor,
    codes: Sequence[Tensor],
    absmax: Sequence[Tensor],
    settings: Sequence[float],
) -> None:
    """Launch `adamw_8bit`; each output overwrites its input."""
    facts = _check_step(W, grad)
    for name, c, a in zip("mv", codes, absmax, strict=True):
        _check_moment(f"the codes of {name}", c, "uint8", facts)
        _check_moment(f"absmax of {name}", a, "float32", facts, BLOCKSIZE)
    state = [*codes, *absmax]
    args = [W, grad, *state, _moment_maps(W.device), W, *state, None, facts.size]
    _launch(kernels.ADAMW_8BIT, W.dtype, [*args, *settings])


def dora_row_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Launch `row_norm`, or `row_norm_mixed` if W has 16 bits and A and B have 32."""
    operands, sizes = _of_norm(_place(W), _place(A), _place(B))
    norm = W.new_empty(W.shape[0], dtype=torch.float32)
    kernel = kernels.ROW_NORM if A.dtype == W.dtype else kernels.ROW_NORM_MIXED
    _launch(kernel, W.dtype, [*operands, norm, *sizes, scaling])
    return norm


# In training the three lie where they lay, and the checks read nothing but this.
@lru_cache(maxsize=4096)
def _of_norm(W: Place, A: Place, B: Place) -> tuple[list[Facts], tuple[int, int, int]]:
    operands = [_facts_at(place) for place in (W, A, B)]
    check("W", operands[0], kernels.CTYPES)
    rows, columns, r = checks.check_low_rank(*operands)
    return operands, (columns, rows, r)


def lora_batched(
    x: Tensor, y: Tensor, adapters: Sequence[Tensor], indices: Tensor
) -> Tensor:
    """Launch `shrink`, then `expand`."""
    A, B, scaling = adapters
    x = _readable(x)
    facts = check("x", _facts(x), kernels.CTYPES)
    n, out_features, r = checks.check_adapters(facts, *map(_facts, adapters))
    tokens, in_features = facts.shape
    # The kernel loads one value of y at a time.
    base = check("y", _facts(y), [facts.dtype], facts.device, facts.itemsize)
    chosen = check("indices", _facts(indices), ["int32"], facts.device, 4)
    if base.shape != (tokens, out_features) or chosen.shape != (tokens,):
        raise InputError(
            f"y has shape {base.shape} and indices {chosen.shape}; x and B need "
            f"{(tokens, out_features)} and {(tokens,)}."
        )
    check_indices(indices, n)
    h = x.new_empty(tokens, r, dtype=torch.float32)
    _launch(kernels.SHRINK, x.dtype, [x, A, indices, h, tokens, in_features, r])
    out = torch.empty_like(y)
    args = [h, B, scaling, indices, y, out, tokens, out_features, r]
    _launch(kernels.EXPAND, x.dtype, args)
    return out


def check_indices(indices: Tensor, n: int) -> None:
    """Refuse an index without an adapter; on a GPU the host does not wait."""
    inside = ((indices >= -1) & (indices < n)).all()
    torch._assert_async(inside, f"an index is not one of -1 (none) to {n - 1}")


def layout_of(weight: Sequence[Tensor], layout: Sequence[int]) -> Layout:
    """Return the sizes with their names."""
    if len(weight) == 5:
        return Layout(tuple(layout[2:]), layout[0], layout[1])
    return Layout(tuple(layout[1:]), layout[0])


def _scales(W: Ready) -> list[Any]:
    _, *scales, _ = W.facts
    if W.sizes.nested_blocksize is None:
        return scales
    codes, nested, offset = scales
    values = _dynamic_map(W.weight[0].device)
    return [codes, nested, values, offset, log2_blocksize(W.sizes.nested_blocksize)]


def _check_step(W: Tensor, grad: Tensor) -> Facts:
    facts = check("W", _facts(W), kernels.CTYPES)
    slope = check("the gradient", _facts(grad), [facts.dtype], facts.device)
    if slope.shape != facts.shape:
        raise InputError(f"the gradient has shape {slope.shape}; W has {facts.shape}.")
    return facts


def _check_moment(
    name: str, moment: Tensor, dtype: str, W: Facts, block: int = 1
) -> None:
    alignment = 16 if block == 1 else 4  # scales are loaded one at a time
    size = -(-W.size // block)
    if check(name, _facts(moment), [dtype], W.device, alignment).size != size:
        raise InputError(f"{name} has {moment.numel()} values; W needs {size}.")


def _launch(kernel: kernels.Kernel, dtype: torch.dtype, args: Sequence[Any]) -> None:
    # An output is among the arguments, as a tensor.
    device = next(a.device for a in args if isinstance(a, Tensor))
    facts = [_facts(a) if isinstance(a, Tensor) else a for a in args]
    driver.launch(kernel, _name(dtype), facts, _stream(device))


def _place(t: Tensor) -> Place:
    return Place(t.dtype, t.shape, t.is_contiguous(), t.device, t.data_ptr())


def _facts(t: Tensor) -> Facts:
    return _facts_at(_place(t))


def _facts_at(place: Place) -> Facts:
    dtype, shape, contiguous, device, address = place
    number = (device.index or 0) if device.type in GPUS else HOST
    size = dtype.itemsize
    return Facts(_name(dtype), tuple(shape), contiguous, number, address, size)


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(t: Tensor) -> bool:
    known = t.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
    if not (known and t.is_contiguous()):
        return False
    if torch.compiler.is_compiling():  # it knows no offset; the launch checks addresses
        return True
    return t.storage_offset() * t.element_size() % 16 == 0


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


@cache
def _compiler_is_here() -> bool:
    if reason := compiler.missing():
        warnings.warn(f"torch's own operations run on the GPU: {reason}", stacklevel=2)
    return reason is None


# `torch.compiler.assume_constant_result` does this, and imports torch's own compiler
# first, which takes longer than importing the rest of this package.
_compiler_is_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _dynamic_map(device: torch.device) -> Tensor:
    return _uploaded("dynamic_map", device)


def _moment_maps(device: torch.device) -> Tensor:
    return _uploaded("moment_maps", device)


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph captures the current stream of the device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks of the current one
        return torch.cuda.is_current_stream_capturing()


# One copy serves all streams of a device: from pageable memory `.to` returns when the
# copy is complete. A table outlives the mode in which it was first needed.
@cache
def _uploaded(name: str, device: torch.device) -> Tensor:
    if capturing(device):
        raise InputError(
            f"a CUDA graph is being captured and the table {name} is not on {device} "
            "yet; run the same code once before capturing it."
        )
    with torch.inference_mode(False):
        return torch.from_numpy(_TABLES[name]()).to(device)


def _both_maps() -> np.ndarray:
    return tables.moment_maps(dynamic_map().numpy(), dynamic_map(False).numpy())


_TABLES = {"dynamic_map": lambda: dynamic_map().numpy(), "moment_maps": _both_maps}
