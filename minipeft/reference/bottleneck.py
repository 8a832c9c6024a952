"""Bottleneck adapters: a small two-layer network beside or behind a frozen part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minipeft.errors import InputError
from minipeft.reference import linear
from minipeft.shapes import Shaped

Sublayer = Callable[[Any], Any]


@dataclass(frozen=True)
class Bottleneck:
    """Down to few features, a ReLU, and up again."""

    down: Shaped[np.ndarray, "bottleneck features"]
    down_bias: Shaped[np.ndarray, " bottleneck"]
    up: Shaped[np.ndarray, "features bottleneck"]
    up_bias: Shaped[np.ndarray, " features"]
    scaling: Any  # 1 in serial; He et al. train or choose it in parallel


class BottleneckGradients(NamedTuple):
    """Gradients of a loss with respect to the input and the four trained parts."""

    x: Shaped[np.ndarray, "... features"]
    down: Shaped[np.ndarray, "bottleneck features"]
    down_bias: Shaped[np.ndarray, " bottleneck"]
    up: Shaped[np.ndarray, "features bottleneck"]
    up_bias: Shaped[np.ndarray, " features"]


def init(
    rng: np.random.Generator, features: int, bottleneck: int, scaling: float = 1.0
) -> Bottleneck:
    r"""Start at no change: down from $N(0, 0.02^2)$, everything else zero.

    Houlsby et al. draw both matrices near zero; with up at zero the start is exact.

    Raises:
        InputError: if the bottleneck is empty.

    Source: Houlsby et al. (arXiv:1902.00751), section 2.1.
    """
    if bottleneck < 1:
        raise InputError(f"bottleneck is {bottleneck}; choose 1 or more features.")
    down = 0.02 * rng.standard_normal((bottleneck, features), np.float32)
    up, zeros = np.zeros((features, bottleneck), np.float32), np.zeros
    return Bottleneck(
        down, zeros(bottleneck, np.float32), up, zeros(features, np.float32), scaling
    )


def forward(
    x: Shaped[np.ndarray, "... features"], adapter: Bottleneck
) -> Shaped[np.ndarray, "... features"]:
    r"""Return what the adapter adds: $s\,(\mathrm{ReLU}(x D^T + c)\,U^T + e)$.

    Source: Houlsby et al. (arXiv:1902.00751), figure 2.
    """
    h = np.maximum(linear.forward(x, adapter.down, adapter.down_bias), 0)
    return adapter.scaling * linear.forward(h, adapter.up, adapter.up_bias)


def backward(
    grad_y: Shaped[np.ndarray, "... features"],
    x: Shaped[np.ndarray, "... features"],
    adapter: Bottleneck,
) -> BottleneckGradients:
    """Return the gradients of x and of the trained parts; ReLU's slope at 0 is 0."""
    before = linear.forward(x, adapter.down, adapter.down_bias)
    up = linear.backward(adapter.scaling * grad_y, np.maximum(before, 0), adapter.up)
    down = linear.backward(up.x * (before > 0), x, adapter.down)
    return BottleneckGradients(down.x, down.W, down.bias, up.W, up.bias)


def serial(
    h: Shaped[np.ndarray, "... features"], adapter: Bottleneck
) -> Shaped[np.ndarray, "... features"]:
    """Place the adapter behind a sublayer, with a skip: h + f(h)."""
    return h + forward(h, adapter)


def parallel(
    x: Shaped[np.ndarray, "... features"],
    h: Shaped[np.ndarray, "... features"],
    adapter: Bottleneck,
) -> Shaped[np.ndarray, "... features"]:
    """Place the adapter beside a sublayer that turns x into h: h + f(x)."""
    return h + forward(x, adapter)


def houlsby(
    x: Shaped[np.ndarray, "... features"],
    sublayers: tuple[Sublayer, Sublayer],
    adapters: tuple[Bottleneck, Bottleneck],
) -> Shaped[np.ndarray, "... features"]:
    """Run a block with a serial adapter behind attention and behind feed-forward.

    Args:
        x: the residual stream.
        sublayers: attention and feed-forward, each with its norm and without its skip.
        adapters: one for each.

    Source: Houlsby et al. (arXiv:1902.00751), figure 2.
    """
    for sublayer, adapter in zip(sublayers, adapters, strict=True):
        x = x + serial(sublayer(x), adapter)
    return x


def pfeiffer(
    x: Shaped[np.ndarray, "... features"],
    sublayers: tuple[Sublayer, Sublayer],
    adapter: Bottleneck,
) -> Shaped[np.ndarray, "... features"]:
    """Run a block with one serial adapter, behind feed-forward.

    Source: Pfeiffer et al. (arXiv:2005.00247), section 3.
    """
    attention, feedforward = sublayers
    x = x + attention(x)
    return x + serial(feedforward(x), adapter)


def beside(
    x: Shaped[np.ndarray, "... features"],
    sublayers: tuple[Sublayer, Sublayer],
    adapter: Bottleneck,
) -> Shaped[np.ndarray, "... features"]:
    """Run a block with one parallel adapter, beside feed-forward.

    Source: He et al. (arXiv:2110.04366), section 4.
    """
    attention, feedforward = sublayers
    x = x + attention(x)
    return x + parallel(x, feedforward(x), adapter)
