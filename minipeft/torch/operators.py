"""The kernels as torch operators: `torch.ops.minipeft.…`.

On CUDA an operator launches a kernel on torch's current stream. On other devices it
runs the eager code, with which the tests compare the kernels. Every operator has a fake
implementation, so `torch.compile(fullgraph=True)` can trace it. No operator but
`quantize`, which looks for NaN, waits for the device, so a CUDA graph can hold them.

A quantized weight is a list of tensors and a list of sizes, from `parts`:

    Blockwise: `[packed, absmax, codebook]` and `[blocksize, *shape]`;
    Nested: `[packed, absmax_codes, nested_absmax, offset, codebook]` and
        `[blocksize, nested_blocksize, *shape]`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.kernels import checks
from minipeft.torch import blockwise, double_quant, launches
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import dynamic_map
from minipeft.torch.double_quant import Nested
from minipeft.torch.linear import full_precision, transformed

LAUNCHES: dict[str, Callable[..., Any]] = {}
"""What each operator does on a GPU, by its name."""

operator = partial(torch.library.custom_op, mutates_args=())


def parts(q: Blockwise | Nested) -> tuple[list[Tensor], list[int]]:
    """Return the two lists that describe a quantized weight to the operators."""
    if isinstance(q, Nested):
        scales = [q.absmax_codes, q.nested_absmax, q.offset]
        sizes = [q.blocksize, q.nested_blocksize]
        return [q.packed, *scales, q.codebook], [*sizes, *q.shape]
    return [q.packed, q.absmax, q.codebook], [q.blocksize, *q.shape]


# Codecs


@operator("minipeft::dequantize")
def dequantize(
    weight: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Run `blockwise.dequantize`; codes and scales are constants without a gradient."""
    return blockwise.dequantize(_quantized(weight, layout), dtype)


@operator("minipeft::dequantize_nested")
def dequantize_nested(
    weight: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Run `double_quant.dequantize` in one pass over the codes."""
    return double_quant.dequantize(_quantized(weight, layout), dtype)


def _fake_dequantize(
    weight: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return weight[0].new_empty(launches.layout_of(weight, layout).shape, dtype=dtype)


@operator("minipeft::quantize")
def quantize(W: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Run `blockwise.quantize` with up to 16 values; return packed codes and absmax."""
    q = blockwise.quantize(W, codebook, blocksize)
    return q.packed, q.absmax


def _fake_quantize(
    W: Tensor, codebook: Tensor, blocksize: int
) -> tuple[Tensor, Tensor]:
    n, bits = W.numel(), checks.code_bits(len(codebook))
    packed = W.new_empty(-(-n * bits // 8), dtype=torch.uint8)
    return packed, W.new_empty(-(-n // blocksize), dtype=torch.float32)


# The product


@operator("minipeft::matmul_4bit")
def matmul_4bit(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None
) -> Tensor:
    r"""Return $y = x \hat W^T + b$; after the call no tensor of W's size is stored.

    Only x gets a gradient; backward decodes the weight again. On a GPU, a product of
    few rows decodes the weight in registers; for more rows the weight is decoded once
    and cuBLAS multiplies.

    Args:
        x: `(..., in_features)`.
        weight: the tensors of the quantized W, `(out_features, in_features)`.
        layout: the sizes of W.
        bias: of the dtype of x.

    Source: QLoRA (arXiv:2305.14314), equation 5.
    """
    return linear(x, _decoded(weight, layout, x.dtype), bias)


def _fake_matmul_4bit(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], launches.layout_of(weight, layout).shape[0])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, layout, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.layout = layout


def _grad_matmul_4bit(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    weight = ctx.saved_tensors
    decode = dequantize_nested if len(weight) == 5 else dequantize
    W = decode(list(weight), ctx.layout, grad_y.dtype)
    return grad_y @ W, [None] * len(weight), None, None


def on_kernels(x: Tensor, layer: Any, bias: Tensor | None) -> Tensor | None:
    """Multiply by the weight of a quantized layer; None where no kernel can.

    Plain eager code launches without torch's dispatcher. There an operator with a list
    of tensors and a backward in Python costs the host several times as much as the
    launch.
    """
    if _direct(x) and (weight := _ready(layer, x.dtype)):
        return _launched(x, weight, bias)
    if not layer.runs_kernels(x.dtype):
        return None
    return cast(Tensor, matmul_4bit(x, *parts(layer.q), bias))


def _ready(layer: Any, dtype: torch.dtype) -> launches.Ready | None:
    try:
        tensors = [layer._buffers[name] for name in layer.tensors]
    except (
        KeyError
    ):  # a shard: its memory is freed, and gathered elsewhere for backward
        return None
    if layer.ready is None or not layer.ready.holds(tensors):
        usable = launches.available(*tensors)
        layer.ready = launches.ready(*parts(layer.q)) if usable else None
    known: launches.Ready | None = layer.ready
    return known if known and launches.decodes(known.weight[-1], dtype) else None


def _direct(*operands: Tensor) -> bool:
    # What traces or records operations must see the operator.
    if transformed() or torch._C._len_torch_dispatch_stack():
        return False
    # A negative view holds the values of its base; the dispatcher writes them out.
    plain = all(type(t) in (Tensor, Parameter) and not t.is_neg() for t in operands)
    return plain and operands[0].device.type in launches.GPUS


def _launched(x: Tensor, weight: launches.Ready, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Launched.apply(x, weight, bias))  # type: ignore[no-untyped-call]
    return launches.multiply(x, weight, bias)


class _Launched(torch.autograd.Function):
    """`matmul_4bit` for autograd: backward decodes the weight again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: launches.Ready, bias: Tensor | None
    ) -> Tensor:
        ctx.weight = weight
        return launches.multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        return grad_y @ launches.decode(ctx.weight, grad_y.dtype), None, None


# The optimizer


@operator("minipeft::adamw_", mutates_args=("W", "m", "v"))
def adamw_(
    W: Tensor, grad: Tensor, m: Tensor, v: Tensor, settings: Sequence[float]
) -> None:
    """Take a step in place; moments of float32, the gradient finite.

    Args:
        W: the parameter, or a page of it.
        grad: its gradient, of the same shape and dtype.
        m: first moment.
        v: second moment.
        settings: from `kernels.tables.adamw_settings`.

    Source: AdamW (arXiv:1711.05101), algorithm 2.
    """
    W.copy_(_advance(W, grad, m, v, settings))


def _advance(
    W: Tensor, grad: Tensor, m: Tensor, v: Tensor, settings: Sequence[float]
) -> Tensor:
    decay, new_m, beta2, new_v, minus_step, correction, eps = settings
    slope = grad.to(m.dtype)
    m += new_m * (slope - m)
    v.mul_(beta2).add_(new_v * slope * slope)
    root = v.double().sqrt().float() / v.new_full((), correction) + eps
    return W.to(m.dtype) * decay + minus_step * m / root


@operator("minipeft::adamw_8bit_", mutates_args=("W", "codes", "absmax"))
def adamw_8bit_(
    W: Tensor,
    grad: Tensor,
    codes: Sequence[Tensor],
    absmax: Sequence[Tensor],
    settings: Sequence[float],
) -> None:
    """Take a step in place; the 8-bit moments are decoded and encoded within the step.

    Args:
        W: the parameter, or a page of the parameter with whole blocks of 256.
        grad: its gradient, of the same shape and dtype.
        codes: of m and of v.
        absmax: of m and of v.
        settings: from `kernels.tables.adamw_settings`.

    Source: 8-bit optimizers (arXiv:2110.02861), section 2.
    """
    signs, shape = (True, False), tuple(W.shape)
    maps = [dynamic_map(signed).to(W.device) for signed in signs]
    m, v = (
        blockwise.dequantize(Blockwise(c, a, values, launches.BLOCKSIZE, shape))
        for c, a, values in zip(codes, absmax, maps, strict=True)
    )
    W.copy_(_advance(W, grad, m, v, settings))
    for c, a, values, moment in zip(codes, absmax, maps, (m, v), strict=True):
        q = blockwise.quantize(moment, values, launches.BLOCKSIZE)
        c.copy_(q.packed)
        a.copy_(q.absmax)


def _nothing(*_: object) -> None:
    return None


# Adapters


@operator("minipeft::dora_row_norm")
def dora_row_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    r"""Return $\|W_o + s B_o A\|$ of each output row, in float32.

    On a GPU, A and B have the dtype of W, or are float32. Beside W of 16 bits, that is
    split into parts of bfloat16: a number of 3.396e38 or more, which would be infinite
    there, makes the norm NaN. Autograd treats the norm as a constant, as the paper
    does.

    Source: DoRA (arXiv:2402.09353), equation 5 and section 4.3.
    """
    with full_precision(W.device):
        V = W.float() + scaling * (B.float() @ A.float())
    # On a CPU torch's float32 root may err in the last bit; the rounded float64 root
    # does not.
    return V.square().sum(dim=1).double().sqrt().float()


def row_norm_on_kernels(
    W: Tensor, A: Tensor, B: Tensor, scaling: float
) -> Tensor | None:
    """Launch `dora_row_norm` where plain eager code can; None: elsewhere, or unfit."""
    if not (_direct(W, A, B) and launches.available(W)):
        return None
    try:
        return launches.dora_row_norm(W, A, B, scaling)
    except InputError:  # the caller converts them, or says which does not fit
        return None


def _fake_dora_row_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return W.new_empty(W.shape[0], dtype=torch.float32)


@operator("minipeft::lora_batched")
def lora_batched(
    x: Tensor, y: Tensor, adapters: Sequence[Tensor], indices: Tensor
) -> Tensor:
    """Add the update of each row's own adapter to y: $y_t + s_i B_i A_i x_t$.

    Args:
        x: `(tokens, in_features)`.
        y: `(tokens, out_features)`, the output of the frozen layer.
        adapters: A `(n, r, in_features)`, B `(n, out_features, r)`, of the dtype of x,
            and scaling `(n,)` in float32.
        indices: the number of each row's adapter, int32; -1 for none.

    Source: Punica (arXiv:2310.18547), section 4; S-LoRA (arXiv:2311.03285), section 5.
    """
    A, B, scaling = adapters
    launches.check_indices(indices, len(A))
    i = indices.clamp(min=0)
    h = torch.einsum("nri,ni->nr", A[i].float(), x.float())
    update = scaling[i, None] * torch.einsum("nor,nr->no", B[i].float(), h)
    return torch.where(indices[:, None] < 0, y, (y + update).to(y.dtype))


def _fake_lora_batched(
    x: Tensor, y: Tensor, adapters: Sequence[Tensor], indices: Tensor
) -> Tensor:
    return torch.empty_like(y)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, adapters, indices = inputs
    ctx.save_for_backward(x, indices, *adapters)


def _grad_lora_batched(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, indices, A, B, scaling = ctx.saved_tensors
    i = indices.clamp(min=0)
    s = torch.where(indices < 0, 0.0, scaling[i])[:, None]
    slope = s * grad.float()
    h = torch.einsum("nri,ni->nr", A[i].float(), x.float())
    grad_h = torch.einsum("nor,no->nr", B[i].float(), slope)
    grad_x = torch.einsum("nri,nr->ni", A[i].float(), grad_h).to(x.dtype)
    grad_A, grad_B = torch.zeros_like(A.float()), torch.zeros_like(B.float())
    grad_A.index_add_(0, i, grad_h[:, :, None] * x.float()[:, None])
    grad_B.index_add_(0, i, slope[:, :, None] * h[:, None])
    return grad_x, grad, [grad_A.to(A.dtype), grad_B.to(B.dtype), None], None


# Helpers


def _quantized(weight: Sequence[Tensor], layout: Sequence[int]) -> Any:
    packed, *scales, codebook = weight
    sizes = launches.layout_of(weight, layout)
    if sizes.nested_blocksize is None:
        return Blockwise(packed, scales[0], codebook, sizes.blocksize, sizes.shape)
    codes, nested, offset = scales
    blocks = (sizes.blocksize, sizes.nested_blocksize)
    return Nested(packed, codes, nested, offset, codebook, *blocks, sizes.shape)


def _decoded(
    weight: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype
) -> Tensor:
    decode = double_quant if len(weight) == 5 else blockwise
    return decode.dequantize(_quantized(weight, layout), dtype)


def _register() -> None:
    for op, launch, fake in (
        (dequantize, launches.dequantize, _fake_dequantize),
        (dequantize_nested, launches.dequantize, _fake_dequantize),
        (quantize, launches.quantize, _fake_quantize),
        (matmul_4bit, launches.matmul_4bit, _fake_matmul_4bit),
        (adamw_, launches.adamw_, _nothing),
        (adamw_8bit_, launches.adamw_8bit_, _nothing),
        (dora_row_norm, launches.dora_row_norm, _fake_dora_row_norm),
        (lora_batched, launches.lora_batched, _fake_lora_batched),
    ):
        op.register_kernel("cuda")(launch)
        op.register_fake(fake)
        LAUNCHES[op._qualname] = launch
    matmul_4bit.register_autograd(_grad_matmul_4bit, setup_context=_keep_weight)
    lora_batched.register_autograd(_grad_lora_batched, setup_context=_keep_rows)
    dora_row_norm.register_autograd(lambda ctx, grad: (None, None, None, None))


_register()
