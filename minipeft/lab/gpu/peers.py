"""bitsandbytes' kernels on the tensors of a launch, where such a kernel exists."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipeft.cupy.executor import current
from minipeft.lab.gpu.launches import Launch
from minipeft.lab.gpu.trials import SETTINGS, STEPS, Trial


@dataclass(frozen=True)
class Peer:
    """A kernel of another library, ready to be called.

    Args:
        call: does what the launch did.
        result: which argument of the launch `call` returns its own version of; none
            where its numbers are others.
    """

    call: Callable[[], Any]
    result: str

    def agreement(self, launch: Launch) -> float | None:
        """Return the share of values that equal ours."""
        if not self.result:
            return None
        from minipeft.golden.drivers.bridge import to_numpy  # needs torch

        theirs = to_numpy(self.call().cpu()).reshape(-1)
        ours = current().download(launch.arguments[self.result]).reshape(-1)
        return float(np.mean(ours == theirs))


def missing(place: str) -> str | None:
    """Say in half a sentence why bitsandbytes cannot be timed; None where it can."""
    try:
        import bitsandbytes  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name} is not installed"
    if place.startswith("cuda") and not torch.cuda.is_available():
        return "this torch has no CUDA"
    return None


def key(trial: Trial) -> str:
    """Return the name under which `PEERS` holds a trial's counterpart."""
    return f"{trial.kernel.template} {trial.note}".strip()


@dataclass(frozen=True)
class Tensors:
    """The arguments of a launch, arrays as torch tensors."""

    arguments: Mapping[str, Any]
    place: str

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name in the table of kernels."""
        from minipeft.golden.drivers.bridge import to_torch

        value = self.arguments[name]
        if not hasattr(value, "dtype") or not getattr(value, "shape", ()):
            return value
        return to_torch(current().download(value)).to(self.place)


def _quantize(kind: str) -> Callable[[Tensors], Peer]:
    def build(t: Tensors) -> Peer:
        from bitsandbytes import functional

        W, blocksize = t["W"], 1 << t["log2_blocksize"]

        def call() -> Any:
            return functional.quantize_4bit(W, blocksize=blocksize, quant_type=kind)[0]

        return Peer(call, "packed")

    return build


def _dequantize(kind: str) -> Callable[[Tensors], Peer]:
    def build(t: Tensors) -> Peer:
        from bitsandbytes import functional

        packed, state = t["packed"], _state(t, kind, t["out"])
        return Peer(lambda: functional.dequantize_4bit(packed, state), "out")

    return build


def _product(t: Tensors) -> Peer:
    from bitsandbytes import matmul_4bit

    x, packed = t["x"], t["packed"].reshape(-1, 1).t()  # as `Linear4bit` passes it
    like = t["x"].new_empty(t["out_features"], t["in_features"])
    state = _state(t, "nf4", like)
    return Peer(lambda: matmul_4bit(x, packed, state), "")  # with its own codes


def _adamw(t: Tensors) -> Peer:
    from bitsandbytes import functional

    values = t["maps"].reshape(4, 256)
    W, grad = t["W"].reshape(-1), t["grad"].reshape(-1)
    state = [t[f"{moment}_codes"] for moment in "mv"]
    maps, scales = (values[0], values[2]), [t[f"{moment}_absmax"] for moment in "mv"]
    s = SETTINGS
    settings = (*s.betas, 0.0, 0.0, s.eps, STEPS + 1, s.lr)

    def call() -> Any:
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, W, *state, *settings, *maps, *scales, s.weight_decay
        )
        return W

    return Peer(call, "W_out")


def _state(t: Tensors, kind: str, like: Any) -> Any:
    from bitsandbytes.functional import QuantState, get_4bit_type

    code = get_4bit_type(kind, device=t.place)
    blocksize = 1 << t["log2_blocksize"]
    absmax = t["absmax"]
    return QuantState(absmax, like.shape, code, blocksize, kind, like.dtype)


# By `key`. The optimizer is that of `AdamW8bit`, the product of `Linear4bit`.
PEERS: dict[str, Callable[[Tensors], Peer]] = {
    "quantize NF4": _quantize("nf4"),
    "quantize FP4": _quantize("fp4"),
    "dequantize NF4": _dequantize("nf4"),
    "dequantize FP4": _dequantize("fp4"),
    "product": _product,
    "adamw_8bit": _adamw,
}
