"""QLoRA's forward for generating text: kernels/qlora.cu, a few rows of x."""

from typing import Any

from minipeft.cupy import blockwise, double_quant, lora_batched
from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.double_quant import Nested
from minipeft.cupy.executor import Array, Executor, current
from minipeft.cupy.lora_batched import Adapters
from minipeft.errors import InputError
from minipeft.kernels import CTYPES, PRODUCT_4BIT, PRODUCT_NESTED
from minipeft.kernels.checks import Facts, check, check_product, log2_blocksize


def forward(
    x: Any,
    q: Blockwise | Nested,
    lora: Adapters | None = None,
    bias: Any = None,
) -> Array:
    r"""Apply the adapted layer: $y = x \hat W^T + b + s (x A^T) B^T$.

    $\hat W$ is decoded within the kernel, rounded to the dtype of x; all terms are
    summed in float32 and rounded once. The kernel is fast for a few rows; for a large
    batch, `dequantize` and a matrix product are faster.

    Args:
        x: (tokens, in_features), float32, float16 or bfloat16, C-contiguous.
        q: the base, of 16 codes; blocks of at least 8, rows of a multiple of 8 values.
        lora: one adapter of the dtype of x, from `lora_batched.stack([lora])`.
        bias: of the base, of the dtype of x.

    Raises:
        InputError: if shapes, dtypes or devices do not fit, or q is another base.

    Source: QLoRA (arXiv:2305.14314), equations 5 and 6.
    """
    gpu = current()
    x = gpu.adopt(x)
    facts = check("x", gpu.facts(x), CTYPES)
    tokens = facts.shape[0]
    out_features, in_features = _check_base(gpu, q, facts)
    if bias is not None:
        bias = gpu.adopt(bias)
        found = check("bias", gpu.facts(bias), [facts.dtype], facts.device)
        if found.shape != (out_features,):
            raise InputError(
                f"bias has shape {found.shape}; q has {out_features} rows."
            )
    h, B, r, scaling = _lora(gpu, x, facts, lora, out_features)
    y = gpu.empty((tokens, out_features), facts.dtype, facts.device)
    sizes = [tokens, in_features, out_features, r, scaling]
    log2 = log2_blocksize(q.blocksize)
    args = [q.codebook, x, bias, h, B, y, *sizes, log2]
    if isinstance(q, Nested):
        scales = double_quant.scales(gpu, q, facts.device)
        gpu.launch(PRODUCT_NESTED, facts.dtype, [q.packed, *scales, *args])
    else:
        gpu.launch(PRODUCT_4BIT, facts.dtype, [q.packed, q.absmax, *args])
    return y


def _check_base(gpu: Executor, q: Blockwise | Nested, x: Facts) -> tuple[int, int]:
    if isinstance(q, Nested):
        layout, bits = double_quant.check_parts(gpu, q)
    else:
        layout, bits = blockwise.check_parts(gpu, q)
    check("codebook", gpu.facts(q.codebook), ["float32"], x.device)
    check_product(x, layout, 1 << bits)
    out_features, in_features = layout.shape
    return out_features, in_features


def _lora(
    gpu: Executor, x: Array, facts: Facts, lora: Adapters | None, out_features: int
) -> tuple[Array, Array, int, Array]:
    if lora is None:
        return None, None, 0, None
    n, rows, r = lora_batched.check_adapters(gpu, lora, facts)
    if n != 1 or rows != out_features:
        raise InputError(
            f"got {n} adapters of {rows} rows for {out_features} outputs; give one "
            "that fits, and use `lora_batched.forward` for several."
        )
    first = gpu.full((facts.shape[0],), "int32", 0, facts.device)
    h = lora_batched.shrink(gpu, x, facts, lora.A, first)
    return h, lora.B, r, lora.scaling
