"""Blockwise quantization on any device: the same bytes as the reference, faster.

Everything here runs eagerly, on CPU and CUDA, and inside
`torch.compile(fullgraph=True)`, which fuses each direction into one or two passes.
"""

from dataclasses import dataclass
from math import isfinite, lcm, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import embedding, pad

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact, UInt8
from minipeft.torch.bins import MEMORY, bins_of, pairs_of, search
from minipeft.torch.codebook import NF4, code_bits
from minipeft.torch.linear import under_torch_func
from minipeft.torch.operands import (
    check_bytes,
    check_float_dtype,
    check_tensor,
    check_tensors,
)
from minipeft.values import check_integer, check_kind, check_sizes

SLICE = 2**18
"""Values that eager code on a CPU processes at a time: 1 MB in float32."""
DECODED = 2**17
"""Values that are decoded at a time: with their indices 0.75 MB in a cache."""
FEW = 2**10
"""For fewer numbers than this, a search is as fast as a table."""


@dataclass(frozen=True)
class Blockwise:
    """A quantized tensor: codes, and one scale for each block of consecutive values."""

    packed: UInt8[Tensor, " bytes"]
    absmax: Float[Tensor, " blocks"]
    codebook: Float[Tensor, " codes"]
    blocksize: int
    shape: tuple[int, ...]


def quantize(
    W: Inexact[Tensor, "..."],
    codebook: Float[Tensor, " codes"] = NF4,
    blocksize: int = 64,
) -> Blockwise:
    """Round every value to the nearest code of its scaled block.

    Formula and arguments: `reference.blockwise.quantize`.

    Raises:
        InputError: at the first NaN or infinity; if `blocksize` is no power of two.

    Source: QLoRA (arXiv:2305.14314), sections 2 and 3.
    """
    check_dense(W)
    check_blocksize(blocksize)
    _check_codebook(codebook)
    codebook, flat = codebook.to(W.device), W.detach().reshape(-1)
    packed, absmax = encode(flat, codebook, blocksize)
    check_finite(flat, absmax)
    return Blockwise(packed, absmax, codebook, blocksize, tuple(W.shape))


def encode(
    flat: Inexact[Tensor, " n"], codebook: Float[Tensor, " codes"], blocksize: int
) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " blocks"]]:
    """Return codes and scales; the caller has checked that every value is finite.

    Args:
        flat: the values.
        codebook: on the same device.
        blocksize: values in a block.
    """
    if not on_cpu(flat):
        return _encode(flat.float(), codebook, blocksize)
    # Slice by slice: the intermediate results stay in the processor's cache.
    slices = torch.split(flat, max(SLICE, blocksize))
    parts = [_encode(one.float(), codebook, blocksize) for one in slices]
    if len(parts) == 1:
        return parts[0]
    packed, absmax = zip(*parts, strict=True)
    return torch.cat(packed), torch.cat(absmax)


def _encode(
    flat: Float[Tensor, " n"], codebook: Float[Tensor, " codes"], blocksize: int
) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " blocks"]]:
    bits, n = code_bits(codebook), len(flat)
    # Zeros fill the last block and the unused end of the last byte.
    width = width_of(blocksize, n)
    blocks = _fill(flat, max(width, 8)).view(-1, width)
    absmax = blocks.abs().amax(dim=1)
    packed = pack(nearest(scale(blocks, absmax), codebook).view(-1), bits)
    return packed[: -(-n * bits // 8)], absmax[: -(-n // blocksize)]


def dequantize(
    q: Blockwise, dtype: torch.dtype = torch.float32
) -> Inexact[Tensor, "..."]:
    """Replace every code by its value, as `reference.blockwise.dequantize` does.

    Args:
        q: what `quantize` returned.
        dtype: of the result; the float32 product is rounded to it.

    Raises:
        InputError: if the number of codes or scales does not fit the shape, `dtype` is
            no float dtype, or a scale on the CPU is not finite.
    """
    check_float_dtype(dtype)
    n, bits = check_parts(q), code_bits(q.codebook)
    if decodes_in_slices(q):
        return decode_to(torch.empty(q.shape, dtype=dtype, device="cpu"), q)
    decoded = _decode(q.packed, q.codebook, n)
    # Axes: block, byte, code. A compiler can then decode one byte in an inner loop.
    blocksize = width_of(q.blocksize, n)
    width = min(8 // bits, blocksize)
    blocks = _fill(decoded, blocksize).view(-1, blocksize // width, width)
    blocks = blocks * q.absmax.float().view(-1, 1, 1)
    return blocks.to(dtype).view(-1)[:n].view(q.shape)


def decodes_in_slices(q: Any) -> bool:
    """Tell whether `decode_to` can decode this: whole blocks of 4 bits on a CPU.

    A pass that `torch.func` transforms may write to no memory made before it.
    """
    whole = not prod(q.shape) % max(q.blocksize, 2)
    if not (whole and len(q.codebook) == 16 and on_cpu(q.packed)):
        return False
    return not under_torch_func()


def decode_to(W: Inexact[Tensor, "..."], q: Blockwise) -> Inexact[Tensor, "..."]:
    """Decode to a tensor in slices; one look-up gives two values.

    Args:
        W: what is overwritten, contiguous, of the shape of q.
        q: whole blocks of 4-bit codes on a CPU; its parts have been checked.
    """
    size = max(DECODED, q.blocksize)
    pairs, blocks = pairs_of(tuple(q.codebook.tolist())), len(q.absmax)
    for packed, absmax, values in zip(
        torch.split(q.packed, size // 2),
        torch.split(q.absmax.float().view(-1, 1), size // q.blocksize),
        torch.split(W.view(blocks, q.blocksize), size // q.blocksize),
        strict=True,
    ):
        index, found = MEMORY.pairs(len(packed))
        torch.index_select(pairs, 0, index.copy_(packed), out=found)
        decoded = found.view(torch.float32).view(values.shape)
        if W.dtype == torch.float32:
            torch.mul(decoded, absmax, out=values)
        else:
            values.copy_(decoded.mul_(absmax))
    return W


def on_cpu(tensor: Tensor) -> bool:
    """Tell whether look-up tables are faster: for eager code on a CPU."""
    plain = type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling() and not _tracing()


def _tracing() -> bool:
    return bool(torch._C._get_tracing_state())


def nearest(
    scaled: Float[Tensor, "..."], codebook: Float[Tensor, " codes"]
) -> UInt8[Tensor, "..."]:
    """Return the code of the nearest value, as `reference.blockwise.nearest` does."""
    check_tensor("scaled", scaled)
    code_bits(codebook)
    many = scaled.dtype == torch.float32 and scaled.numel() >= FEW
    if many and on_cpu(scaled) and (bins := bins_of(tuple(codebook.tolist()))):
        return search(scaled, bins)
    values, order = codebook.sort(stable=True)
    midpoints = (values[:-1] + values[1:]) / 2
    if torch.compiler.is_compiling() and len(codebook) <= 16:
        # A compiler fuses the comparisons into one pass, 10 times as fast as a search.
        # In eager code each comparison would read all the memory once.
        codes = order[0].float()
        for k in range(len(midpoints)):
            codes = torch.where(scaled > midpoints[k], order[k + 1].float(), codes)
        return codes.to(torch.uint8)
    return order.to(torch.uint8)[torch.bucketize(scaled, midpoints, out_int32=True)]


def pack(
    codes: UInt8[Tensor, " n"], bits: int, fill: int = 0
) -> UInt8[Tensor, " bytes"]:
    """Write codes of `bits` bits one after another: `reference.blockwise.pack`."""
    check_bytes("codes", codes)
    check_integer("bits", bits, 1, 8)
    check_integer("fill", fill, 0, 2**bits - 1)
    if bits == 8:
        return codes
    period = lcm(bits, 8)  # after this many bits a code ends where a byte ends
    groups = _fill(codes, period // bits, fill).view(-1, period // bits)
    columns = [torch.zeros_like(groups[:, 0]) for _ in range(period // 8)]
    for i, j, shift in _overlaps(bits):
        columns[j] = columns[j] | _shift(groups[:, i], shift)
    return torch.stack(columns, dim=1).view(-1)[: -(-len(codes) * bits // 8)]


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, n: int) -> UInt8[Tensor, " n"]:
    """Return the first `n` codes that `pack` wrote."""
    check_bytes("packed", packed)
    check_integer("bits", bits, 1, 8)
    check_integer("n", n, 0, len(packed) * 8 // bits)
    period = lcm(bits, 8)
    groups = _fill(packed, period // 8).view(-1, period // 8)
    columns = [torch.zeros_like(groups[:, 0]) for _ in range(period // bits)]
    for i, j, shift in _overlaps(bits):
        columns[i] = columns[i] | _shift(groups[:, j], -shift)
    return torch.stack(columns, dim=1).view(-1)[:n] & (2**bits - 1)


def width_of(blocksize: int, n: int) -> int:
    """Return the length of a block in memory: no power of two above n is needed."""
    return blocksize if n >= blocksize or not n else 1 << (n - 1).bit_length()


def check_blocksize(blocksize: int) -> None:
    """Refuse a block size that is no power of two from 1 to 2**31."""
    # A compiler follows no more than that.
    whole = hasattr(blocksize, "__index__") and blocksize is not True
    if not whole or not 1 <= blocksize <= 2**31 or blocksize & (blocksize - 1):
        raise InputError(
            f"blocksize is {blocksize}; choose a power of two from 1 to 2**31, such as "
            "64."
        )


def check_parts(q: Blockwise) -> int:
    """Return the number of weights; refuse another number of codes or scales."""
    check_kind("q", q, Blockwise)
    check_blocksize(q.blocksize)
    check_sizes("shape", q.shape)
    check_bytes("packed", q.packed)
    check_tensors({"absmax": (q.absmax, "blocks")})
    n, bits = prod(q.shape), code_bits(q.codebook)
    needed = {"packed": -(-n * bits // 8), "absmax": -(-n // q.blocksize)}
    for name, wanted in needed.items():
        if (size := len(getattr(q, name))) != wanted:
            raise InputError(
                f"{name} has {size} values where shape {list(q.shape)} and blocksize "
                f"{q.blocksize} need {wanted}; pass the parts of one quantized tensor."
            )
    # Scales on a GPU are not read: the host would wait. `quantize` refuses weights that
    # are not finite, and what reads a file checks its scales on the CPU.
    # A sum is quick, and is finite only if each term is; a finite term may overflow it.
    if on_cpu(q.absmax) and not isfinite(q.absmax.sum().item()):
        bad = torch.nonzero(~torch.isfinite(q.absmax))
        if len(bad):
            i = int(bad[0])
            raise InputError(
                f"absmax holds {q.absmax[i].item()} at block {i}; give finite scales."
            )
    return n


def _check_codebook(codebook: Float[Tensor, " codes"]) -> None:
    code_bits(codebook)
    # A codebook on a GPU is not read: to read it would make the host wait. It is a
    # copy of one that was checked on the CPU.
    if codebook.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = torch.nonzero(~torch.isfinite(codebook))
    if len(bad):
        i = int(bad[0])
        raise InputError(
            f"the codebook holds {codebook[i].item()} at code {i}; give finite values."
        )


def check_dense(W: Inexact[Tensor, "..."]) -> None:
    """Refuse what is no tensor of floats, and one that is not stored densely."""
    check_tensor("W", W)
    if W.layout != torch.strided:
        raise InputError(f"W has the layout {W.layout}; give W.to_dense().")


def check_finite(flat: Float[Tensor, " n"], absmax: Float[Tensor, " blocks"]) -> None:
    """Refuse NaN and infinities: one of them would spoil the scale of its whole block.

    The scales show whether one is there, so the weights are not read again. In a
    compiled graph the check raises a RuntimeError with the same meaning.
    """
    finite = torch.isfinite(absmax).all()
    if torch.compiler.is_compiling():
        torch._assert_async(finite, "W holds values that are not finite")
    elif not finite:
        flat = flat.float()  # 1e300 is a number in float64 alone
        bad = torch.nonzero(~torch.isfinite(flat))[:, 0]
        raise InputError(
            f"W holds {flat[bad[0]]} at flat index {bad[0]}, the first of {len(bad)} "
            "values that are not finite; repair the weights before quantizing them."
        )


def scale(
    blocks: Float[Tensor, "blocks blocksize"], absmax: Float[Tensor, " blocks"]
) -> Float[Tensor, "blocks blocksize"]:
    """Multiply each block by the reciprocal of its scale; leave a block of scale 0."""
    check_tensors({"blocks": (blocks, "blocks n"), "absmax": (absmax, "blocks")})
    # The reciprocal of a subnormal may overflow; to multiply both by 2**64 is exact.
    # (`where` would give two plain numbers torch's default dtype.)
    one = torch.ones_like(absmax)
    lift = torch.where(
        absmax.abs() < torch.finfo(torch.float32).tiny, one * 2.0**64, one
    )
    lifted = torch.where(absmax == 0, 1.0, absmax * lift)
    # In float64, because GPU compilers may approximate a float32 division; the
    # second rounding never changes the result of the first.
    inverse = (1 / lifted.double()).float()
    if on_cpu(blocks) and not bool((lift > 1).any()):
        return blocks * inverse[:, None]
    return (blocks * lift[:, None]) * inverse[:, None]


def _decode(
    packed: UInt8[Tensor, " bytes"], codebook: Float[Tensor, " codes"], n: int
) -> Float[Tensor, " n"]:
    bits = code_bits(codebook)
    if bits == 8:
        return codebook.index_select(0, packed.int())
    if 8 % bits:
        return codebook[unpack(packed, bits, n).int()]
    # A byte has 256 possible contents: one look-up decodes all codes of a byte.
    byte = torch.arange(256, device=packed.device)
    places = range(8 - bits, -1, -bits)
    meanings = torch.stack([codebook[byte >> p & 2**bits - 1] for p in places], dim=1)
    return embedding(packed.int(), meanings).view(-1)[:n]


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    # Code i of a group lies in byte j, shifted to the left by this many bits.
    places = [
        (i, j, 8 * (j + 1) - bits * (i + 1))
        for i in range(lcm(bits, 8) // bits)
        for j in range(lcm(bits, 8) // 8)
    ]
    return [place for place in places if -bits < place[2] < 8]


def _shift(codes: UInt8[Tensor, " n"], left: int) -> UInt8[Tensor, " n"]:
    return codes << left if left >= 0 else codes >> -left


def _fill(flat: Tensor, multiple: int, fill: int = 0) -> Tensor:
    spare = -len(flat) % multiple
    return pad(flat, (0, spare), value=fill) if spare else flat
