"""AdamW on a GPU: kernels/adamw.cu, a step in one pass, under the reference's names."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from minipeft.cupy.blockwise import Blockwise
from minipeft.cupy.codebook import dynamic_map
from minipeft.cupy.executor import Array, Executor, current
from minipeft.errors import InputError
from minipeft.kernels import ADAMW, ADAMW_8BIT, CTYPES
from minipeft.kernels.checks import Facts, check
from minipeft.kernels.tables import adamw_settings, moment_maps

BLOCKSIZE = 256
Full = Callable[[tuple[int, ...], str, int, int], Array]
"""Allocates an array of a shape, dtype and value for a device."""

MIN_8BIT_SIZE = 4096  # smaller tensors (biases, norms) stay float32: they cost little


@dataclass(frozen=True)
class AdamW:
    """The settings; the defaults are those of `torch.optim.AdamW`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}; choose both in [0, 1).")
        for name in ("lr", "eps", "weight_decay"):
            if not (value := getattr(self, name)) >= 0:
                raise InputError(f"{name} is {value}; choose 0 or more.")


@dataclass(frozen=True)
class State:
    """The optimizer's state of one tensor: steps taken, two moments."""

    t: int
    m: Array | Blockwise
    v: Array | Blockwise


def init(W: Any, bits: int = 32) -> State:
    """Start with no steps taken and both moments zero.

    Args:
        W: the parameter; only its shape, dtype and device matter.
        bits: 32 (float32, whatever W has), or 8 for tensors of at least 4,096 values.

    Raises:
        InputError: if `bits` is neither, or W has a dtype that no kernel updates.

    Source: 8-bit optimizers (arXiv:2110.02861), section 2.
    """
    gpu = current()
    return zeros(W, bits, gpu.full)


def zeros(W: Any, bits: int, full: Full) -> State:
    """Start as `init` does; `full` allocates and fills the moments."""
    if bits not in (8, 32):
        raise InputError(f"bits is {bits}; choose 8 or 32.")
    gpu = current()
    facts = check("W", gpu.facts(gpu.adopt(W)), CTYPES)
    if bits == 32 or facts.size < MIN_8BIT_SIZE:
        like = (facts.shape, "float32", 0, facts.device)
        return State(0, full(*like), full(*like))
    m, v = (_coded(facts, signed, full) for signed in (True, False))
    return State(0, m, v)


def step(W: Any, grad: Any, state: State, config: AdamW) -> tuple[Array, State]:
    r"""Return the next weight and the next state; the old ones do not change.

    $m = m + (1 - \beta_1)(g - m)$, $v = \beta_2 v + (1 - \beta_2) g^2$,
    $W = (1 - \eta\lambda) W - \frac{\eta}{1 - \beta_1^t}
    \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}$. Every operation is rounded
    to float32, the next weight once more to the dtype of W.

    Args:
        W: the parameter, float32, float16 or bfloat16 and C-contiguous.
        grad: its gradient, of the same shape and dtype.
        state: from `init` or the last step.
        config: the settings; they may change from step to step.

    Raises:
        InputError: if the gradient does not fit W, or is not finite.

    Source: AdamW (arXiv:1711.05101), algorithm 2; 8-bit states: arXiv:2110.02861.
    """
    gpu = current()
    W, grad = gpu.adopt(W), gpu.adopt(grad)
    facts = check_gradient(gpu, W, grad)
    bad = gpu.upload(np.array([facts.size], np.uint64), facts.device)
    settings = adamw_settings(vars(config), state.t + 1)
    inputs = parts(gpu, state, facts)
    outputs = [gpu.empty(f.shape, f.dtype, f.device) for f in map(gpu.facts, inputs)]
    W_out = gpu.empty(facts.shape, facts.dtype, facts.device)
    launch(gpu, facts, [W, grad, *inputs], [W_out, *outputs, bad], settings)
    check_finite(gpu, grad, int(gpu.download(bad)[0]), facts.size)
    return W_out, rebuild(state, outputs)


def parts(gpu: Executor, state: State, W: Facts) -> list[Array]:
    """Return the arrays of a state for the kernels, after checking them against W.

    These are m and v; in eight bits, the codes of both, then the scales of both.
    """
    moments = [("m", state.m), ("v", state.v)]
    if len({isinstance(moment, Blockwise) for _, moment in moments}) > 1:
        raise InputError(
            "one moment of the state is in 8 bits and the other is not; pass what "
            "`init` or the last step returned for this W."
        )
    if not isinstance(state.m, Blockwise):
        return [_part(gpu, n, a, ("float32", W.shape), W.device) for n, a in moments]
    for name, moment in moments:
        _check_shape(name, tuple(moment.shape), W.shape)
    codes, scales = (W.size,), (-(-W.size // BLOCKSIZE),)
    return [
        _part(gpu, f"{name}.{part}", getattr(moment, part), expected, W.device)
        for part, expected in (
            ("packed", ("uint8", codes)),
            ("absmax", ("float32", scales)),
        )
        for name, moment in moments
    ]


def launch(
    gpu: Executor,
    W: Facts,
    inputs: list[Array],
    outputs: list[Array],
    settings: list[float],
) -> None:
    """Launch a step; it works in place where an output is also an input.

    Args:
        gpu: the executor.
        W: the facts of the weight, or of a page of it.
        inputs: W, gradient, and the arrays of the state from `parts`.
        outputs: W, the arrays of the state, and the index of the first bad value.
        settings: from `adamw_settings`.
    """
    if len(inputs) == 4:
        args = [*inputs, *outputs, W.size, *settings]
        gpu.launch(ADAMW, W.dtype, args)
    else:
        args = [
            *inputs,
            _maps(gpu, W.device, gpu.stream(W.device)),
            *outputs,
            W.size,
            *settings,
        ]
        gpu.launch(ADAMW_8BIT, W.dtype, args)


def rebuild(state: State, arrays: list[Array]) -> State:
    """Return the state after a step: `state` with new arrays."""
    if not isinstance(state.m, Blockwise) or not isinstance(state.v, Blockwise):
        return State(state.t + 1, *arrays)
    m_codes, v_codes, m_absmax, v_absmax = arrays
    m = replace(state.m, packed=m_codes, absmax=m_absmax)
    v = replace(state.v, packed=v_codes, absmax=v_absmax)
    return State(state.t + 1, m, v)


def _part(
    gpu: Executor,
    name: str,
    array: Array,
    expected: tuple[str, tuple[int, ...]],
    device: int,
) -> Array:
    dtype, shape = expected
    # Scales need no alignment: a kernel loads them one by one.
    found = check(
        name, gpu.facts(array), [dtype], device, 4 if "absmax" in name else 16
    )
    _check_shape(name, found.shape, shape)
    return array


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise InputError(
            f"{name} of the state has shape {found}, W needs {expected}; pass what "
            "`init` or the last step returned for this W."
        )


def _coded(facts: Facts, signed: bool, full: Full) -> Blockwise:
    codebook = dynamic_map(signed)
    zero = int(np.flatnonzero(codebook == 0)[0])
    return Blockwise(
        full((facts.size,), "uint8", zero, facts.device),
        full((-(-facts.size // BLOCKSIZE),), "float32", 0, facts.device),
        current().upload(codebook, facts.device),
        BLOCKSIZE,
        facts.shape,
    )


# One copy for each device and stream: a kernel on another stream could start first.
@lru_cache(maxsize=8)
def _maps(gpu: Executor, device: int, stream: int) -> Array:
    return gpu.upload(moment_maps(dynamic_map(), dynamic_map(signed=False)), device)


def check_gradient(gpu: Executor, W: Array, grad: Array) -> Facts:
    """Return the facts of W; refuse a gradient of another shape, dtype or device."""
    facts = check("W", gpu.facts(W), CTYPES)
    slope = check("the gradient", gpu.facts(grad), [facts.dtype], facts.device)
    if slope.shape != facts.shape:
        raise InputError(f"the gradient has shape {slope.shape}; W has {facts.shape}.")
    return facts


def check_finite(gpu: Executor, grad: Array, first_bad: int, n: int) -> None:
    """Refuse a gradient that is not finite; the message names the first such value."""
    if first_bad == n:
        return
    value = gpu.download(grad.reshape(-1)[first_bad : first_bad + 1])[0]
    if np.isfinite(np.float32(value)):
        raise InputError(
            f"the gradient holds {value} at index {first_bad}, whose square no moment "
            "can hold; skip this step."
        )
    raise InputError(
        f"the gradient holds {value} at index {first_bad}; skip this step."
    )
