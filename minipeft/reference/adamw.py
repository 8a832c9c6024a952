"""AdamW, and its states in eight bits a value."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from numbers import Real

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import blockwise
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import dynamic_map
from minipeft.shapes import Float, check_array, check_floats, check_shapes
from minipeft.values import check_integer, check_kind, check_number

Weight = Float[np.ndarray, "..."]
Moment = Weight | Blockwise
BLOCKSIZE = 256
MIN_8BIT_SIZE = 4096  # smaller tensors (biases, norms) stay float32: they cost little


@dataclass(frozen=True)
class AdamW:
    """The settings; the defaults are those of `torch.optim.AdamW`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not pair or not all(
            isinstance(beta, Real) and 0 <= beta < 1 for beta in self.betas
        ):
            raise InputError(f"betas are {self.betas!r}; choose both in [0, 1).")
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, value := getattr(self, name))
            if value < 0:
                raise InputError(f"{name} is {value}; choose 0 or more.")


@dataclass(frozen=True)
class State:
    """The optimizer's state of one tensor: steps taken, two moments."""

    t: int
    m: Moment
    v: Moment

    def __post_init__(self) -> None:
        """Refuse two moments of different sizes."""
        check_integer("t", self.t, 0)
        for name, moment in (("m", self.m), ("v", self.v)):
            if not isinstance(moment, Blockwise):
                check_floats(name, moment)
        if self.m.shape != self.v.shape:
            raise InputError(
                f"m has shape {self.m.shape} and v {self.v.shape}; give the moments of "
                "one tensor."
            )


def init(W: Weight, bits: int = 32) -> State:
    """Start with no steps taken and both moments zero.

    In eight bits, m is coded by the signed dynamic map and v by the unsigned one.

    Args:
        W: the parameter; only its shape and dtype matter.
        bits: 32, or 8 for tensors of at least 4,096 values.

    Raises:
        InputError: if `bits` is neither, or W holds no floats.

    Source: 8-bit optimizers (arXiv:2110.02861), section 2.
    """
    check_integer("bits", bits)
    if bits not in (8, 32):
        raise InputError(f"bits is {bits}; choose 8 or 32.")
    check_shapes({"W": (W, "...")})
    m, v = np.zeros(W.shape, wide(W)), np.zeros(W.shape, wide(W))
    if bits == 32 or W.size < MIN_8BIT_SIZE:
        return State(0, m, v)
    signed, unsigned = dynamic_map(signed=True), dynamic_map(signed=False)
    return State(
        0,
        blockwise.quantize(m, signed, BLOCKSIZE),
        blockwise.quantize(v, unsigned, BLOCKSIZE),
    )


def step(W: Weight, grad: Weight, state: State, config: AdamW) -> tuple[Weight, State]:
    r"""Return the next weight and the next state.

    $m = m + (1 - \beta_1)(g - m)$, $v = \beta_2 v + (1 - \beta_2) g^2$,
    $W = (1 - \eta\lambda) W - \frac{\eta}{1 - \beta_1^t}
    \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}$. Each operation is rounded to
    float32, and the next W once more to its dtype. The next W is computed from the
    moments before they are encoded.

    Args:
        W: the parameter.
        grad: its gradient, of the same shape and dtype.
        state: from `init` or the last step.
        config: the settings; they may change from step to step.

    Raises:
        InputError: if the gradient or a moment has another shape or no float dtype,
            or the gradient is not finite.

    Source: AdamW (arXiv:1711.05101), algorithm 2; 8-bit states: arXiv:2110.02861.
    """
    check_kind("the state", state, State)
    check_kind("the config", config, AdamW)
    m, v = decode(state.m), decode(state.v)
    check_fits(W, grad, m, v)
    t = state.t + 1
    beta1, beta2 = config.betas
    W_old, grad = W.astype(wide(W)), grad.astype(wide(W))
    m = m + (1 - beta1) * (grad - m)
    v = beta2 * v + (1 - beta2) * grad * grad
    step_size = config.lr / (1 - beta1**t)
    root = np.sqrt(v) / sqrt(1 - beta2**t) + config.eps
    W_new = W_old * (1 - config.lr * config.weight_decay) + -step_size * m / root
    return W_new.astype(W.dtype), State(t, encode(m, state.m), encode(v, state.v))


def wide(W: Weight) -> np.dtype[np.generic]:
    """Return the dtype of states and arithmetic; bfloat16 would round 0.999 to 1."""
    check_floats("W", W)
    return np.promote_types(W.dtype, np.float32)


def decode(moment: Moment) -> Weight:
    """Return the values of a moment, decoded if it is stored in 8 bits."""
    if isinstance(moment, Blockwise):
        return blockwise.dequantize(moment)
    check_floats("the moment", moment)
    return moment.copy()


def encode(values: Weight, like: Moment) -> Moment:
    """Store the values of a moment in the form of `like`."""
    check_floats("values", values)
    check_kind("like", like, np.ndarray, Blockwise)
    if isinstance(like, Blockwise):
        blockwise.check_parts(like)
        return blockwise.quantize(values, like.codebook, like.blocksize)
    check_floats("like", like)
    return values.copy()


def to_arrays(state: State) -> dict[str, np.ndarray]:
    """Return the state as named arrays, which every file format can store."""
    check_kind("the state", state, State)
    arrays = {"t": np.asarray(state.t)}
    for name, moment in (("m", state.m), ("v", state.v)):
        if isinstance(moment, Blockwise):
            blockwise.check_parts(moment)
            arrays[f"{name}_codes"] = moment.packed.reshape(moment.shape).copy()
            arrays[f"{name}_absmax"] = moment.absmax.copy()
        else:
            arrays[name] = moment.copy()
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> State:
    """Return the state that `to_arrays` wrote, without rounding."""

    def moment(name: str) -> Moment:
        if name in arrays:
            return arrays[name].copy()
        codes, absmax = arrays[f"{name}_codes"].copy(), arrays[f"{name}_absmax"].copy()
        values = dynamic_map(signed=name == "m")
        return Blockwise(codes.reshape(-1), absmax, values, BLOCKSIZE, codes.shape)

    check_kind("arrays", arrays, Mapping)
    needed = [("t",), ("m", "m_codes"), ("v", "v_codes")]
    missing = [names[0] for names in needed if not any(n in arrays for n in names)]
    if missing:
        raise InputError(f"the arrays hold no {missing[0]}; give all of `to_arrays`.")
    for name, array in arrays.items():
        check_array(f"{name} of the arrays", array, "numbers")
    t = arrays["t"]
    if t.size != 1:
        raise InputError(f"t has shape {t.shape}; give one whole number.")
    return State(t.item(), moment("m"), moment("v"))


def check_fits(W: Weight, grad: Weight, m: Weight, v: Weight) -> None:
    """Refuse a gradient or moment of another shape, and a gradient not finite."""
    check_shapes(
        {"W": (W, "..."), "grad": (grad, "..."), "m": (m, "..."), "v": (v, "...")}
    )
    bad = np.flatnonzero(~np.isfinite(grad))
    if bad.size:
        raise InputError(
            f"the gradient holds {grad.flat[bad[0]]} at index {bad[0]}; skip this step."
        )
