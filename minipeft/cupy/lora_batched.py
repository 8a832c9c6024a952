"""LoRA for a batch whose rows use different adapters: kernels/lora_batched.cu."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipeft.cupy.executor import Array, Executor, current, numpy_dtype
from minipeft.errors import InputError
from minipeft.kernels import CTYPES, EXPAND, SHRINK, checks
from minipeft.kernels.checks import Facts, check
from minipeft.shapes import check_shapes


@dataclass(frozen=True)
class Adapters:
    """Adapters of one layer, stacked: A (n, r, in), B (n, out, r), scaling (n,)."""

    A: Array
    B: Array
    scaling: Array


def stack(loras: Sequence[Any], dtype: str = "float32", device: int = 0) -> Adapters:
    """Stack adapters of one layer and copy them to a device.

    Zeros fill A and B of adapters with a lower rank than the highest.

    Args:
        loras: each with A (r, in_features), B (out_features, r) and scaling, in NumPy.
        dtype: of A and B on the device; scaling is float32.
        device: its number.

    Raises:
        InputError: if the adapters are not of one layer, or there is none.
    """
    for lora in loras:
        check_shapes({"A": (lora.A, "r in_features"), "B": (lora.B, "out_features r")})
    shapes = {(lora.A.shape[1], lora.B.shape[0]) for lora in loras}
    if len(shapes) != 1:
        raise InputError(
            f"got adapters for {len(shapes)} (in, out) sizes: {sorted(shapes)}; stack "
            "at least one, and those of one layer."
        )
    in_features, out_features = shapes.pop()
    r = max(lora.A.shape[0] for lora in loras)
    A = np.zeros((len(loras), r, in_features), numpy_dtype(dtype))
    B = np.zeros((len(loras), out_features, r), numpy_dtype(dtype))
    for i, lora in enumerate(loras):
        A[i, : len(lora.A)] = lora.A
        B[i, :, : len(lora.A)] = lora.B
    scaling = np.array([lora.scaling for lora in loras], np.float32)
    gpu = current()
    return Adapters(*(gpu.upload(part, device) for part in (A, B, scaling)))


def forward(
    x: Any, y: Any, adapters: Adapters, indices: Sequence[int] | np.ndarray
) -> Array:
    r"""Add to each row of y the update of its own adapter: $y_t + s_i B_i A_i x_t$.

    Args:
        x: (tokens, in_features), float32, float16 or bfloat16, C-contiguous.
        y: (tokens, out_features), the output of the frozen layer; not changed.
        adapters: from `stack`, of the dtype of x.
        indices: the adapter of each row; -1 for none.

    Raises:
        InputError: if shapes, dtypes or devices do not fit; at an index of no adapter.

    Source: Punica (arXiv:2310.18547), section 4; S-LoRA (arXiv:2311.03285), section 5.
    """
    gpu = current()
    x, y = gpu.adopt(x), gpu.adopt(y)
    facts = check("x", gpu.facts(x), CTYPES)
    tokens = facts.shape[0]
    n, out_features, r = check_adapters(gpu, adapters, facts)
    base = check("y", gpu.facts(y), [facts.dtype], facts.device)
    if base.shape != (tokens, out_features):
        raise InputError(
            f"y has shape {base.shape}; x and B need {tokens, out_features}."
        )
    chosen = gpu.upload(_check_indices(indices, tokens, n), facts.device)
    h = shrink(gpu, x, facts, adapters.A, chosen)
    out = gpu.empty(base.shape, facts.dtype, facts.device)
    args = [h, adapters.B, adapters.scaling, chosen, y, out, tokens, out_features, r]
    gpu.launch(EXPAND, facts.dtype, args)
    return out


def shrink(gpu: Executor, x: Array, facts: Facts, A: Array, chosen: Array) -> Array:
    """Return h (tokens, r) in float32: each row's own A times the row."""
    tokens, in_features = facts.shape
    r = gpu.facts(A).shape[1]
    h = gpu.empty((tokens, r), "float32", facts.device)
    args = [x, A, chosen, h, tokens, in_features, r]
    gpu.launch(SHRINK, facts.dtype, args)
    return h


def check_adapters(gpu: Executor, adapters: Adapters, x: Facts) -> tuple[int, int, int]:
    """Return the number of adapters, out_features and rank; refuse shapes unlike x."""
    parts = (adapters.A, adapters.B, adapters.scaling)
    return checks.check_adapters(x, *map(gpu.facts, parts))


def _check_indices(
    indices: Sequence[int] | np.ndarray, tokens: int, n: int
) -> np.ndarray:
    chosen = np.asarray(indices, np.int32)
    if chosen.shape != (tokens,):
        raise InputError(f"indices has shape {chosen.shape}; x has {tokens} rows.")
    wrong = np.flatnonzero((chosen < -1) | (chosen >= n))
    if wrong.size:
        raise InputError(
            f"row {wrong[0]} asks for adapter {chosen[wrong[0]]}; choose -1 (none) to "
            f"{n - 1}."
        )
    return chosen
