"""DoRA's row norms on a GPU: kernels/dora.cu under the reference's name."""

from typing import Any

from minipeft.cupy.executor import Array, current
from minipeft.kernels import CTYPES, ROW_NORM, ROW_NORM_MIXED
from minipeft.kernels.checks import check, check_low_rank


def row_norm(W: Any, A: Any, B: Any, scaling: float) -> Array:
    r"""Return $\|V_o\|$ of each output row of V = W + s B A, in float32.

    V is never stored: each element stays in a register until it is squared. Float32
    factors beside W of 16 bits are split into parts of bfloat16: of a number from
    3.396e38 on, which would be infinite there, the norm is NaN.

    Args:
        W: (out_features, in_features), float32, float16 or bfloat16, C-contiguous.
        A: (r, in_features), of the dtype of W, or float32.
        B: (out_features, r), of the dtype of A.
        scaling: the factor of B A.

    Raises:
        InputError: if shapes, dtypes or devices do not fit.

    Source: DoRA (arXiv:2402.09353), equation 5.
    """
    gpu = current()
    W, A, B = gpu.adopt(W), gpu.adopt(A), gpu.adopt(B)
    facts = check("W", gpu.facts(W), CTYPES)
    factor = gpu.facts(A)
    out_features, in_features, r = check_low_rank(facts, factor, gpu.facts(B))
    norm = gpu.empty((out_features,), "float32", facts.device)
    args = [W, A, B, norm, in_features, out_features, r, scaling]
    kernel = ROW_NORM if factor.dtype == facts.dtype else ROW_NORM_MIXED
    gpu.launch(kernel, facts.dtype, args)
    return norm
