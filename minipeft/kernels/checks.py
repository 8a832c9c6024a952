"""The checks of arrays before a kernel gets their addresses; all columns use them."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from minipeft.errors import InputError

MAX_RANK = 256  # as in lora_batched.cu
GROUP = 8  # codes that a lane of qlora.cu decodes at once, within one block


@dataclass(frozen=True)
class Facts:
    """The facts about an array that are known without reading its values.

    Args:
        dtype: by NumPy's name, or `bfloat16`.
        shape: its sizes.
        contiguous: whether its values lie one after another, in C order.
        device: the number of its device.
        address: of its first value.
        itemsize: bytes of a value.
    """

    dtype: str
    shape: tuple[int, ...]
    contiguous: bool
    device: int
    address: int
    itemsize: int

    @property
    def size(self) -> int:
        """Count the values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Count the bytes."""
        return self.size * self.itemsize


@dataclass(frozen=True)
class Layout:
    """How the values of a quantized tensor are cut into blocks."""

    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int | None = None

    def __post_init__(self) -> None:
        log2_blocksize(self.blocksize)
        if self.nested_blocksize is not None:
            log2_blocksize(self.nested_blocksize)

    @property
    def size(self) -> int:
        """Count the values."""
        return prod(self.shape)


def check(
    name: str,
    facts: Facts,
    dtypes: Collection[str],
    device: int | None = None,
    alignment: int = 16,
) -> Facts:
    """Refuse an array that a kernel would misread; otherwise return its facts.

    Raises:
        InputError: at another dtype or device, gaps between the values, memory that was
            freed, or an address that is no multiple of `alignment` (16 where a kernel
            loads 16 bytes).
    """
    if facts.dtype not in dtypes:
        raise InputError(f"{name} is {facts.dtype}; give one of {list(dtypes)}.")
    if not facts.contiguous:
        raise InputError(f"{name} is not C-contiguous; pass a contiguous copy.")
    if device is not None and facts.device != device:
        raise InputError(
            f"{name} is on device {facts.device}, other parts on device {device}; "
            "move them to one device."
        )
    if not facts.address and facts.size:
        raise InputError(f"{name} has no memory: it was freed; fill the tensor again.")
    if facts.address % alignment:
        raise InputError(
            f"{name} starts {facts.address % alignment} bytes past a multiple of "
            f"{alignment}, where a kernel cannot load it; pass a copy."
        )
    return facts


def log2_blocksize(blocksize: int) -> int:
    """Return the logarithm; refuse what is no power of two from 1 to 2**31."""
    if not 1 <= blocksize <= 2**31 or blocksize & (blocksize - 1):
        raise InputError(
            f"blocksize is {blocksize}; choose a power of two from 1 to 2**31, such as "
            "64."
        )
    return blocksize.bit_length() - 1


def code_bits(size: int) -> int:
    """Return the bits of a code for a codebook of 2, 4, 8 or 16 values.

    Raises:
        InputError: at another size.
    """
    if size not in (2, 4, 8, 16):
        raise InputError(
            f"the codebook has {size} values; the kernels take 2, 4, 8 or 16."
        )
    return size.bit_length() - 1


def check_codes(packed: Facts, scales: Facts, codebook: Facts, layout: Layout) -> int:
    """Return the bits of a code; refuse parts that a kernel would misread.

    Args:
        packed: the codes.
        scales: one for each block: `absmax` in float32, or the codes of absmax.
        codebook: of the codes; all other parts must be on its device.
        layout: of the tensor.
    """
    nested = layout.nested_blocksize is not None
    check("codebook", codebook, ["float32"])
    bits = code_bits(codebook.size)
    check("packed", packed, ["uint8"], codebook.device)
    check_size("packed", packed, -(-layout.size * bits // 8), layout)
    name, dtype = ("absmax_codes", "uint8") if nested else ("absmax", "float32")
    check(name, scales, [dtype], codebook.device)
    check_size(name, scales, -(-layout.size // layout.blocksize), layout)
    return bits


def check_nested(
    nested_absmax: Facts, offset: Facts, layout: Layout, device: int
) -> None:
    """Refuse nested scales of another size, or an offset that is not one number.

    Args:
        nested_absmax: a scale for each block of the codes of absmax.
        offset: what was subtracted from absmax.
        layout: of the tensor.
        device: of the codes.
    """
    check("offset", offset, ["float32"], device, 4)
    check_size("offset", offset, 1, layout)
    check("nested_absmax", nested_absmax, ["float32"], device)
    blocks = -(-layout.size // layout.blocksize)
    expected = -(-blocks // (layout.nested_blocksize or 1))
    check_size("nested_absmax", nested_absmax, expected, layout)


def check_size(name: str, facts: Facts, expected: int, layout: Layout) -> None:
    """Refuse a part of a quantized tensor whose size contradicts the other parts."""
    if facts.size != expected:
        raise InputError(
            f"{name} has {facts.size} values where shape {list(layout.shape)} and "
            f"blocksize {layout.blocksize} need {expected}; pass the parts of one "
            "quantized tensor."
        )


def check_product(x: Facts, layout: Layout, codes: int) -> None:
    """Refuse a base that the kernel `product` cannot multiply, or an unfit x."""
    shape, blocksize = layout.shape, layout.blocksize
    if len(shape) != 2 or codes != 16 or blocksize < GROUP or shape[1] % GROUP:
        raise InputError(
            f"the base has shape {list(shape)}, {codes} codes and blocksize "
            f"{blocksize}; this kernel takes rows of a multiple of {GROUP} values, 16 "
            f"codes and blocks of {GROUP} or more: dequantize any other, and multiply."
        )
    if len(x.shape) != 2 or x.shape[1] != shape[1]:
        raise InputError(f"x has shape {x.shape}; give (tokens, {shape[1]}).")


def check_adapters(
    x: Facts, A: Facts, B: Facts, scaling: Facts
) -> tuple[int, int, int]:
    """Return the number of adapters, out_features and rank; refuse shapes unlike x."""
    check("A", A, [x.dtype], x.device)
    check("B", B, [x.dtype], x.device)
    check("scaling", scaling, ["float32"], x.device)
    stacked = len(A.shape) == len(B.shape) == 3 and scaling.shape == A.shape[:1]
    if not (
        stacked
        and B.shape[::2] == A.shape[:2]
        and len(x.shape) == 2
        and x.shape[1] == A.shape[2]
    ):
        raise InputError(
            f"x {x.shape}, A {A.shape}, B {B.shape} and scaling {scaling.shape} do not "
            "fit; stack the adapters of this layer."
        )
    n, r, _ = A.shape
    if not 1 <= r <= MAX_RANK:
        raise InputError(f"the rank is {r}; the kernels take 1 to {MAX_RANK}.")
    return n, B.shape[1], r


def check_low_rank(W: Facts, A: Facts, B: Facts) -> tuple[int, int, int]:
    """Return out_features, in_features and rank; refuse A and B of another layer.

    Args:
        W: the weight.
        A: of the dtype of W, or float32.
        B: of the dtype of A.
    """
    check("A", A, sorted({W.dtype, "float32"}), W.device)
    check("B", B, [A.dtype], W.device)
    fits = len(W.shape) == len(A.shape) == len(B.shape) == 2
    if not fits or (B.shape[0], A.shape[1], B.shape[1]) != (*W.shape, A.shape[0]):
        raise InputError(
            f"W {W.shape}, A {A.shape} and B {B.shape} do not fit; give (out, in), "
            "(r, in) and (out, r)."
        )
    return W.shape[0], W.shape[1], A.shape[0]
