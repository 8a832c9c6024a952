"""NF4 and LoRA in Qwix. Packages: qwix==0.1.8 jax==0.10.2."""

import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from minipeft.golden.tensors import Array


def nf4_quantize(W: Array, blocksize: int) -> tuple[Array, Array]:
    """`qwix.quantize` of blocks, one in each row; the driver packs the codes."""
    if blocksize < 1 or W.size % blocksize or not W.size:
        raise NotImplementedError("whole blocks alone")
    rows = jnp.asarray(W.reshape(-1, blocksize))
    found = qwix.quantize(rows, "nf4", channelwise_axes=[0])
    codes = np.asarray(found.qvalue).astype(np.uint8).reshape(-1)
    absmax = np.asarray(found.scale).astype(np.float32).reshape(-1)
    return codes[::2] << 4 | codes[1::2], absmax


def lora_forward(
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    alpha: float,
    rank_stabilized: bool,
    bias: Array | None = None,
) -> Array:
    """`apply_lora_to_model` on a linear layer of Flax."""
    if rank_stabilized:
        raise NotImplementedError("Qwix scales by alpha/r alone")
    rngs = nnx.Rngs(0)
    base = nnx.Linear(W.shape[1], len(W), use_bias=bias is not None, rngs=rngs)
    _hold(base.kernel, W.T)
    if bias is not None:
        _hold(base.bias, bias)
    provider = qwix.LoraProvider(module_path=".*", rank=len(A), alpha=alpha)
    layer = qwix.apply_lora_to_model(base, provider, jnp.asarray(x), rngs=rngs)
    _hold(layer.kernel_lora_a, A.T)
    _hold(layer.kernel_lora_b, B.T)
    return np.asarray(layer(jnp.asarray(x)))


def _hold(parameter: nnx.Param, array: Array) -> None:
    if parameter.value.shape != array.shape:
        raise NotImplementedError("Qwix leaves shapes to whoever loads parameters")
    parameter.value = jnp.asarray(array)
