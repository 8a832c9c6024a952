"""The settings of adapter files in the NumPy column."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minipeft.golden.tensors import Array
from minipeft.reference import adapter_files, lora
from minipeft.reference.adapter_files import Parts
from minipeft.reference.lora import LoRA


def adapter_config_scaling(
    A: Array, B: Array, module: str, config: Mapping[str, Any]
) -> Array:
    """Return the factor of B A in a layer."""
    return np.array(adapter_files.scaling(Parts(A, B), config, module), np.float32)


def adapter_config_merge(
    W: Array,
    bias: Array,
    A: Array,
    B: Array,
    module: str,
    config: Mapping[str, Any],
    B_bias: Array | None = None,
    trained_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Return the merged weight and bias."""
    parts = Parts(A, B, B_bias, trained_bias)
    return adapter_files.merge(W, bias, parts, config, module)


def gguf_merge(W: Array, A: Array, B: Array, alpha: float, share: float) -> Array:
    """Return the weight with which llama.cpp computes."""
    s = adapter_files.gguf_scaling(alpha, len(A), share)
    return lora.merge(W, LoRA(A, B, s))
