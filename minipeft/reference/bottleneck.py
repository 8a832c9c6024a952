"""Bottleneck adapters: a small two-layer network beside or behind a frozen layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.shapes import Shaped, check_floats, check_scaling, check_shapes
from minipeft.values import check_calls, check_integer, check_kind, check_number

Sublayer = Callable[[Any], Any]
Stream = Shaped[np.ndarray, "... features"]
Down = Shaped[np.ndarray, "bottleneck features"]
DownBias = Shaped[np.ndarray, " bottleneck"]
Up = Shaped[np.ndarray, "features bottleneck"]
UpBias = Shaped[np.ndarray, " features"]


@dataclass(frozen=True)
class Bottleneck:
    """A projection to few features, a ReLU, and a projection back."""

    down: Down
    down_bias: DownBias
    up: Up
    up_bias: UpBias
    scaling: Any  # 1 for serial adapters; trained or chosen for parallel ones


class BottleneckGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the four trained parts."""

    x: Stream
    down: Down
    down_bias: DownBias
    up: Up
    up_bias: UpBias


def init(
    rng: np.random.Generator, features: int, bottleneck: int, scaling: float = 1.0
) -> Bottleneck:
    """Start without a change: `down` from $N(0, 0.02^2)$, everything else zero.

    Houlsby et al. draw both matrices near zero. With a zero `up` the start is exact.

    Raises:
        InputError: if the bottleneck is empty, or the scaling not finite.

    Source: Houlsby et al. (arXiv:1902.00751), section 2.1.
    """
    check_kind("rng", rng, np.random.Generator)
    check_integer("features", features, 0)
    check_integer("bottleneck", bottleneck, 1)
    check_number("scaling", scaling)
    down = 0.02 * rng.standard_normal((bottleneck, features), np.float32)
    up = np.zeros((features, bottleneck), np.float32)
    down_bias = np.zeros(bottleneck, np.float32)
    up_bias = np.zeros(features, np.float32)
    return Bottleneck(down, down_bias, up, up_bias, scaling)


def forward(x: Stream, adapter: Bottleneck) -> Stream:
    r"""Return the adapter's output: $s\,(\mathrm{ReLU}(x D^T + c)\,U^T + e)$.

    Raises:
        InputError: if an operand has another adapter's shape, or no float dtype.

    Source: Houlsby et al. (arXiv:1902.00751), figure 2.
    """
    _check_fits(x, adapter)
    h = np.maximum(linear.forward(x, adapter.down, adapter.down_bias), 0)
    return adapter.scaling * linear.forward(h, adapter.up, adapter.up_bias)


def backward(grad_y: Stream, x: Stream, adapter: Bottleneck) -> BottleneckGradients:
    """Return the gradients of x and of the trained parts; ReLU's slope at 0 is 0.

    Raises:
        InputError: if an operand has another adapter's shape, or no float dtype.
    """
    _check_fits(x, adapter)
    check_shapes({"x": (x, "... features"), "grad_y": (grad_y, "... features")})
    before = linear.forward(x, adapter.down, adapter.down_bias)
    up = linear.backward(adapter.scaling * grad_y, np.maximum(before, 0), adapter.up)
    down = linear.backward(up.x * (before > 0), x, adapter.down)
    return BottleneckGradients(down.x, down.W, down.bias, up.W, up.bias)


def serial(h: Stream, adapter: Bottleneck) -> Stream:
    """Place the adapter behind a sublayer, with a skip: h + f(h)."""
    check_floats("h", h)
    return h + forward(h, adapter)


def parallel(x: Stream, h: Stream, adapter: Bottleneck) -> Stream:
    """Place the adapter beside a sublayer that turns x into h: h + f(x)."""
    check_floats("h", h)
    return _add(h, forward(x, adapter))


def houlsby(
    x: Stream,
    sublayers: tuple[Sublayer, Sublayer],
    adapters: tuple[Bottleneck, Bottleneck],
) -> Stream:
    """Run a block with a serial adapter behind attention and behind feed-forward.

    Args:
        x: the residual stream.
        sublayers: attention and feed-forward, each with its norm and without its skip.
        adapters: one for each.

    Source: Houlsby et al. (arXiv:1902.00751), figure 2.
    """
    _check_block(x, sublayers)
    check_kind("adapters", adapters, tuple, list)
    if len(adapters) != 2:
        raise InputError(f"adapters holds {len(adapters)}; give one for each sublayer.")
    for sublayer, adapter in zip(sublayers, adapters, strict=True):
        x = _add(x, serial(sublayer(x), adapter))
    return x


def pfeiffer(
    x: Stream, sublayers: tuple[Sublayer, Sublayer], adapter: Bottleneck
) -> Stream:
    """Run a block with one serial adapter, behind feed-forward.

    Source: Pfeiffer et al. (arXiv:2005.00247), appendix A.2.
    """
    attention, feedforward = _check_block(x, sublayers)
    x = _add(x, attention(x))
    return _add(x, serial(feedforward(x), adapter))


def beside(
    x: Stream, sublayers: tuple[Sublayer, Sublayer], adapter: Bottleneck
) -> Stream:
    """Run a block with one parallel adapter, beside feed-forward.

    Source: He et al. (arXiv:2110.04366), section 3.3.
    """
    attention, feedforward = _check_block(x, sublayers)
    x = _add(x, attention(x))
    return _add(x, parallel(x, feedforward(x), adapter))


def _check_block(
    x: Stream, sublayers: tuple[Sublayer, Sublayer]
) -> tuple[Sublayer, Sublayer]:
    """Refuse what no block runs on, before the first sublayer runs."""
    check_floats("x", x)
    check_kind("sublayers", sublayers, tuple, list)
    if len(sublayers) != 2:
        raise InputError(f"sublayers holds {len(sublayers)}; give two functions.")
    for sublayer in sublayers:
        check_calls("a sublayer", sublayer)
    return sublayers


def _check_fits(x: Stream, adapter: Bottleneck) -> None:
    """Refuse an input or parts of another adapter: a bias of one would broadcast."""
    check_kind("the adapter", adapter, Bottleneck)
    check_shapes(
        {
            "down": (adapter.down, "bottleneck features"),
            "down_bias": (adapter.down_bias, "bottleneck"),
            "up": (adapter.up, "features bottleneck"),
            "up_bias": (adapter.up_bias, "features"),
            "x": (x, "... features"),
        }
    )
    check_scaling(adapter.scaling, adapter.down)


def _add(skip: Stream, h: Stream) -> Stream:
    check_shapes(
        {"the residual": (skip, "... features"), "a sublayer": (h, "... features")}
    )
    return skip + h
