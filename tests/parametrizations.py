"""All parametrizations, in the form in which the laws of their kind use them.

A new row adds one entry: its module, its trained fields, how to draw an adapter for a
layer, how to start a new adapter, and the arguments of torch's configuration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from minipeft.reference import (
    blockwise,
    dora,
    double_quant,
    hira,
    ia3,
    linear,
    lora,
    miss,
    qlora,
    vera,
)
from minipeft.reference.blockwise import Blockwise
from minipeft.reference.codebook import NF4
from tests.bounds import counted
from tests.strategies import (
    Layer,
    gaussian_layers,
    gaussians,
    integer_layers,
    integers,
    rational_layers,
    rationals,
    seeds,
)


@dataclass(frozen=True)
class Parametrization:
    """One row; `make` draws (base, frozen operands, adapter) for a layer."""

    name: str
    module: Any  # forward, backward, merge of the reference
    trained: tuple[str, ...]  # fields of the adapter, in the order of the gradients
    make: Callable[[Callable, Callable, Layer], tuple[Any, tuple, Any]]
    start: Callable[[np.random.Generator, np.ndarray, int], tuple[Any, tuple, Any]]
    proof: Any = None  # the same module with the norm as an argument
    formula: Any = None  # the same formula on a dequantized base
    fractions: bool = True  # whether the formula runs on fractions
    exact: Callable | None = None  # a case without roundings
    # Arguments of torch's configuration for a model of two layers; None: it has none.
    hyper: Mapping[str, Any] | None = None

    @property
    def kind(self) -> str:
        """Return the name of the adapter's class, which is the same in each column."""
        rng, W = np.random.default_rng(0), np.ones((4, 5), np.float32)
        return type(self.start(rng, W, 2)[2]).__name__

    def case(self, data, kind: str) -> "Case":
        """Draw a layer with this adapter, of one kind of numbers."""
        layers, tensor = KINDS[kind]
        t = data.draw(layers)
        if kind == "integers" and self.exact:
            return self.exact(self, data.draw, t)
        base, frozen, adapter = self.make(data.draw, tensor, t)
        module = self.proof or self.module
        return Case(self, module, t.x, base, t.bias, frozen, adapter, t.grad_y)


@dataclass(frozen=True)
class Case:
    """An adapted layer: a base, what else is frozen, and a trained adapter."""

    row: Parametrization = field(repr=False)
    module: Any = field(repr=False)
    x: np.ndarray
    base: Any
    bias: np.ndarray | None
    frozen: tuple[Any, ...]
    adapter: Any
    grad_y: np.ndarray

    def forward(self):
        operands = (self.x, self.base, *self.frozen, self.adapter)
        return self.module.forward(*operands, self.bias)

    def backward(self):
        operands = (self.grad_y, self.x, self.base, *self.frozen, self.adapter)
        takes_bias = "bias" in signature(self.module.backward).parameters
        return self.module.backward(*operands, *[self.bias][: int(takes_bias)])

    def merged(self):
        return self.module.merge(self.base, *self.frozen, self.adapter)

    def merged_bias(self):
        change = getattr(self.module, "merge_bias", None)
        if self.bias is None or change is None:
            return self.bias
        return change(self.bias, self.adapter)

    def merged_forward(self):
        return linear.forward(self.x, self.merged(), self.merged_bias())

    def values(self):
        """Return the values with gradients: x, then the trained arrays."""
        return (self.x, *(getattr(self.adapter, name) for name in self.row.trained))

    def at(self, x, *trained):
        """Return the same case with other values."""
        changed = dict(zip(self.row.trained, trained, strict=True))
        return replace(self, x=x, adapter=replace(self.adapter, **changed))

    def counted(self):
        """Return the case with counted operands, for error bounds."""
        base = self.base if isinstance(self.base, np.ndarray) else weight(self.base)
        return replace(
            self,
            module=self.row.formula or self.module,
            x=counted(self.x),
            base=counted(base),
            bias=None if self.bias is None else counted(self.bias),
            frozen=tuple(map(_counted, self.frozen)),
            adapter=_counted(self.adapter),
            grad_y=counted(self.grad_y),
        )


def weight(base):
    """Return the base as an array."""
    return base if isinstance(base, np.ndarray) else qlora.dequantize(base)


def _counted(operand):
    if isinstance(operand, np.ndarray):
        # The norm is a divisor; given as an argument, it is exact.
        return operand
    assert is_dataclass(operand)
    parts = {f.name: getattr(operand, f.name) for f in fields(operand)}
    arrays = {k: counted(v) for k, v in parts.items() if isinstance(v, np.ndarray)}
    return replace(operand, **arrays)


KINDS = {
    "fractions": (rational_layers, rationals),
    "integers": (integer_layers, integers),
    "gaussians": (gaussian_layers, gaussians),
}


def _update(t):
    return lora.LoRA(t.A, t.B, t.scaling)


def _make_lora(draw, tensor, t):
    return t.W, (), _update(t)


def _lora_start(rng, W, r):
    return W, (), lora.init(rng, W.shape[1], W.shape[0], r, 16)


# The root of a sum may be irrational, so the norms are drawn like the other operands;
# they are the first frozen operand.
_dora = SimpleNamespace(
    forward=lambda x, W, norm, adapter, bias: dora._forward(x, W, adapter, bias, norm),
    backward=lambda grad_y, x, W, norm, a: dora._backward(grad_y, x, W, a, norm),
    merge=lambda W, norm, adapter: dora._merge(W, adapter, norm),
)


def _make_dora(draw, tensor, t):
    magnitude, norm = (draw(tensor((len(t.W),))) for _ in range(2))
    return t.W, (abs(norm),), dora.DoRA(t.A, t.B, t.scaling, magnitude)


def _exact_dora(row, draw, t):
    """Return a case whose rows of W + s B A have length 2, 4, 8 or 0."""
    rng = np.random.default_rng(draw(seeds))
    places = 4 if t.W.shape[1] >= 4 else 1  # 4 entries of c have length 2 c
    V = np.zeros_like(t.W)
    for values in V:
        chosen = rng.permutation(len(values))[:places]
        values[chosen] = rng.choice([-1, 1], places) * rng.choice([0, 2, 4])
    A, B = np.sign(t.A), np.sign(t.B)  # so that the squares of W stay below 2**24
    W = V - np.float32(t.scaling) * (B @ A)
    # With zeros, and with gains far below 1.
    magnitude = draw(integers((len(W),))) * rng.choice([1, 2.0**-6], len(W))
    adapter = dora.DoRA(A, B, t.scaling, magnitude.astype(np.float32))
    return Case(row, dora, t.x, W, t.bias, (), adapter, t.grad_y)


def _dora_start(rng, W, r):
    return W, (), dora.init(rng, W, r, 16)


def _make_vera(draw, tensor, t):
    b = draw(tensor((len(t.W),)).filter(np.any))
    adapter = vera.VeRA(draw(tensor((len(t.A),))), b)
    return t.W, (vera.Projections(t.A, t.B),), adapter


def _vera_start(rng, W, r):
    pair = vera.projections(int(rng.integers(2**32)), r, W.shape[1], W.shape[0])
    return W, (pair,), vera.init(r, W.shape[0])


SIDES = ("output", "input")


def _make_ia3(draw, tensor, t):
    side = draw(st.sampled_from(SIDES))
    scale = draw(tensor((t.W.shape[SIDES.index(side)],)))
    if draw(st.booleans()):  # no division undoes a zero
        scale[0] = 0 * scale[0]
    return t.W, (), ia3.IA3(scale, side)


def _ia3_start(rng, W, r):
    side = SIDES[r % 2]
    return W, (), ia3.init(W.shape[SIDES.index(side)], side)


GRID = np.arange(-8, 8, dtype=np.float32) / np.float32(8)


def on_a_grid(W, seed):
    """Return a quantized base of W's shape whose values are small integers."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, W.size).astype(np.uint8)
    scales = rng.choice([8, 16, 32], -(-W.size // 4)).astype(np.float32)
    return Blockwise(blockwise.pack(codes, 4), scales, GRID, 4, W.shape)


def quantized(W, double):
    """Return a 4-bit base with scales in 32 bits or in eight."""
    return (double_quant if double else blockwise).quantize(W, NF4, 16)


def _make_qlora(draw, tensor, t):
    if tensor is integers:
        return on_a_grid(t.W, draw(seeds)), (), _update(t)
    return quantized(t.W, draw(st.booleans())), (), _update(t)


def _qlora_start(rng, W, r):
    _, _, adapter = _lora_start(rng, W, r)
    return quantized(W, r % 2 == 0), (), adapter


def _make_hira(draw, tensor, t):
    return t.W, (), hira.HiRA(t.A, t.B, t.scaling)


def _hira_start(rng, W, r):
    return W, (), hira.init(rng, W.shape[1], W.shape[0], r, 0.5)


def _make_miss(draw, tensor, t):
    return t.W, (), miss.MiSS(draw(tensor((len(t.A), len(t.W))).filter(np.any)))


def _miss_start(rng, W, r):
    return W, (), miss.init(W.shape[1], W.shape[0], r)


AB = ("A", "B")
RANK = {"r": 4, "alpha": 8}
ROWS = (
    Parametrization("lora", lora, AB, _make_lora, _lora_start, hyper=RANK),
    Parametrization(
        *("dora", dora, (*AB, "magnitude"), _make_dora, _dora_start),
        proof=_dora,
        exact=_exact_dora,
        hyper=RANK,
    ),
    Parametrization("vera", vera, ("d", "b"), _make_vera, _vera_start, hyper={"r": 6}),
    Parametrization(
        "ia3", ia3, ("l",), _make_ia3, _ia3_start, hyper={"feedforward": ["1"]}
    ),
    Parametrization(
        "qlora", qlora, AB, _make_qlora, _qlora_start, formula=lora, fractions=False
    ),
    Parametrization("hira", hira, AB, _make_hira, _hira_start, hyper={"r": 4}),
    Parametrization("miss", miss, ("D",), _make_miss, _miss_start, hyper={"r": 4}),
)
