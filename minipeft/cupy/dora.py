"""DoRA's row norms on a GPU: kernels/dora.cu under the reference's name."""

from typing import Any

from minipeft.cupy.executor import Array, check, current
from minipeft.cupy.kernels import CTYPES, ROW_NORM
from minipeft.errors import InputError

WARPS = 8  # rows that a CUDA block takes


def row_norm(W: Any, A: Any, B: Any, scaling: float) -> Array:
    r"""Return $\|V_o\|$ of each output row of V = W + s B A, in float32.

    V is never formed: an element lives in a register until it is squared.

    Args:
        W: (out_features, in_features), float32, float16 or bfloat16, C-contiguous.
        A: (r, in_features), of the dtype of W.
        B: (out_features, r), of the dtype of W.
        scaling: the factor of B A.

    Raises:
        InputError: if shapes, dtypes or devices do not fit.

    Source: DoRA (arXiv:2402.09353), equation 5.
    """
    gpu = current()
    W, A, B = gpu.adopt(W), gpu.adopt(A), gpu.adopt(B)
    facts = check("W", gpu.facts(W), CTYPES)
    shapes = [
        check(name, gpu.facts(part), [facts.dtype], facts.device).shape
        for name, part in (("W", W), ("A", A), ("B", B))
    ]
    out_features, in_features = facts.shape if len(facts.shape) == 2 else (0, 0)
    r = shapes[1][0]
    if shapes != [(out_features, in_features), (r, in_features), (out_features, r)]:
        raise InputError(
            f"W {shapes[0]}, A {shapes[1]} and B {shapes[2]} do not fit; give "
            "(out, in), (r, in) and (out, r)."
        )
    norm = gpu.empty((out_features,), "float32", facts.device)
    args = [W, A, B, norm, in_features, out_features, r, scaling]
    gpu.launch(ROW_NORM, facts.dtype, -(-out_features // WARPS), args)
    return norm
