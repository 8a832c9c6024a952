"""LoRA for a batch in which every request has an adapter of its own, or none."""

from dataclasses import dataclass

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.reference.linear import Bias, Output, Weight
from minipeft.shapes import Integer, Shaped, check_array, check_shapes
from minipeft.values import check_kind

MatricesA = Shaped[np.ndarray, "n r in_features"]
MatricesB = Shaped[np.ndarray, "n out_features r"]
Input = Shaped[np.ndarray, "requests ... in_features"]
Indices = Integer[np.ndarray, " requests"]


@dataclass(frozen=True)
class Adapters:
    """Updates of one weight, stacked; a lower rank is filled up with zeros."""

    A: MatricesA
    B: MatricesB
    scaling: Shaped[np.ndarray, " n"]


def forward(
    x: Input,
    W: Weight,
    adapters: Adapters,
    indices: Indices,
    bias: Bias | None = None,
) -> Output:
    r"""Give each request its own update: $y = x W^T + b + s_i (x A_i^T) B_i^T$.

    Args:
        x: the rows of the requests.
        W: the frozen weight, the same for all.
        adapters: the updates.
        indices: the update i of each request; -1 for none.
        bias: of the frozen layer.

    Raises:
        InputError: if an operand has another layer's shape, or no float dtype; if an
            index names no adapter.

    Source: Punica (arXiv:2310.18547), section 4; S-LoRA (arXiv:2311.03285), section 5.
    """
    check_fits(W, adapters)
    _check_requests(x, adapters, indices)
    y = linear.forward(x, W, bias)
    for request, i in enumerate(indices):
        if i >= 0:
            A, B, s = adapters.A[i], adapters.B[i], adapters.scaling[i]
            y[request] += s * ((x[request] @ A.T) @ B.T)
    return y


def check_fits(W: Weight, adapters: Adapters) -> None:
    """Refuse updates of another layer, or another number of one of their parts."""
    check_kind("adapters", adapters, Adapters)
    check_shapes(
        {
            "W": (W, "out_features in_features"),
            "A": (adapters.A, "n r in_features"),
            "B": (adapters.B, "n out_features r"),
            "scaling": (adapters.scaling, "n"),
        }
    )
    if not adapters.A.shape[1]:
        raise InputError("r is 0; give A at least one row and B at least one column.")


def _check_requests(x: Input, adapters: Adapters, indices: Indices) -> None:
    """Refuse rows of another number of requests, and indices that name no adapter."""
    check_shapes({"x": (x, "... in_features")})
    check_array("indices", indices, "whole numbers")
    one_axis = indices.ndim == 1 and indices.shape == x.shape[:-1][:1]
    if indices.dtype.kind not in "iu" or not one_axis:
        raise InputError(
            f"indices has dtype {indices.dtype} and shape {indices.shape}, and x has "
            f"shape {x.shape}; give one integer for each first index of x."
        )
    n = len(adapters.A)
    wrong = indices[(indices < -1) | (indices >= n)]
    if wrong.size:
        raise InputError(
            f"adapter {wrong[0]} is asked for; choose 0 to {n - 1}, or -1 for none."
        )
