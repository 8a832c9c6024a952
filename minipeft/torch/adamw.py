"""AdamW, and its states in eight bits a value: the same bits as the reference."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from math import sqrt
from typing import Any, cast, overload

import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.shapes import Float, Inexact
from minipeft.torch import blockwise
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import dynamic_map

BLOCKSIZE = 256
MIN_8BIT_SIZE = 4096  # smaller tensors (biases, norms) keep float32: little to save

State = dict[str, Any]
"""Of one tensor: `step` and the moments m and v, or their codes and scales."""


def init(W: Inexact[Tensor, "..."], bits: int = 32) -> State:
    """Start with no steps taken and both moments zero.

    In eight bits, m is coded by the signed dynamic map and v by the unsigned one.

    Args:
        W: the parameter; only its shape, dtype and device matter.
        bits: 32 (float32, whatever 16 bits W may have), or 8 for tensors of at least
            4,096 values.

    Raises:
        InputError: if `bits` is neither.

    Source: 8-bit optimizers (arXiv:2110.02861), section 2.
    """
    if bits not in (8, 32):
        raise InputError(f"bits is {bits}; choose 8 or 32.")
    state: State = {"step": 0}
    for name in ("m", "v"):
        state[name] = torch.zeros(W.shape, dtype=wide(W), device=W.device)
        if bits == 8 and W.numel() >= MIN_8BIT_SIZE:
            _encode(state, name, state.pop(name))
    return state


def update(
    W: Inexact[Tensor, "..."],
    grad: Inexact[Tensor, "..."],
    state: State,
    group: Mapping[str, Any],
) -> None:
    r"""Take one step; W and the state are changed in place.

    $m = m + (1 - \beta_1)(g - m)$, $v = \beta_2 v + (1 - \beta_2) g^2$,
    $W = (1 - \eta\lambda) W - \frac{\eta}{1 - \beta_1^t}
    \frac{m}{\sqrt{v} / \sqrt{1 - \beta_2^t} + \epsilon}$. Every operation is rounded
    to float32, the next weight once more to the dtype of W. Moments of eight bits are
    decoded before, encoded after; the weight sees the moments before they are encoded.

    Args:
        W: the parameter.
        grad: its gradient, finite, of the same shape and dtype.
        state: from `init` or the last step.
        group: `lr`, `betas`, `eps` and `weight_decay`, as a parameter group has them.

    Source: AdamW (arXiv:1711.05101), algorithm 2; 8-bit states: arXiv:2110.02861.
    """
    t, (beta1, beta2), lr = state["step"] + 1, group["betas"], group["lr"]
    m, v = decode(state, "m", W.shape), decode(state, "v", W.shape)
    W_old, grad = W.to(wide(W)), grad.to(wide(W))
    m = m + (1 - beta1) * (grad - m)
    v = beta2 * v + (1 - beta2) * grad * grad
    step_size = lr / (1 - beta1**t)
    root = _root(v) / v.new_full((), sqrt(1 - beta2**t)) + group["eps"]
    W.copy_(W_old * (1 - lr * group["weight_decay"]) + -step_size * m / root)
    state["step"] = t
    for name, values in (("m", m), ("v", v)):
        if name in state:
            state[name] = values
        else:
            _encode(state, name, values)


def wide(W: Inexact[Tensor, "..."]) -> torch.dtype:
    """Return the dtype of states and of arithmetic: float32, or that of W if wider.

    So does bitsandbytes. torch's own AdamW keeps to the dtype of W, and in bfloat16
    beta2 = 0.999 is 1, and most steps are smaller than half a last bit.
    """
    return torch.promote_types(W.dtype, torch.float32)


def decode(state: State, name: str, shape: tuple[int, ...]) -> Inexact[Tensor, "..."]:
    """Return the values of a moment, whatever its bits."""
    if name in state:
        values: Tensor = state[name]
        return values
    codes, absmax = state[f"{name}_codes"], state[f"{name}_absmax"]
    codebook = _codebook(name, codes.device)
    return blockwise.dequantize(Blockwise(codes, absmax, codebook, BLOCKSIZE, shape))


class AdamW(torch.optim.Optimizer):
    """AdamW with states of 32 or 8 bits; a drop-in for `torch.optim.AdamW`.

    Args:
        params: parameters or groups of them; a group may have settings of its own.
        lr: the learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, relative to lr.
        bits: of the states, 32 or 8.

    Raises:
        InputError: if a setting is out of range; on `step`, if a gradient is sparse or
            not finite, and then nothing was changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bits: int = 32,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(
            params, {**settings, "weight_decay": weight_decay, "bits": bits}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take more parameters, with settings of their own."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        check_gradients([p.grad for p, _ in work])
        self.advance(work)
        return loss

    def advance(self, work: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Take a step for these parameters, each by the settings of its group."""
        for p, group in work:
            if not self.state[p]:
                self.state[p] = init(p, group["bits"])
            update(p, cast(Tensor, p.grad), self.state[p], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit."""
        # torch would cast every state to the dtype of its parameter, but a code is no
        # number and a scale needs its 32 bits: they go past it.
        super().load_state_dict({**state_dict, "state": {}})
        ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        owners = [p for g in self.param_groups for p in g["params"]]
        for i, p in zip(ids, owners, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[p][key] = self.placed(value, p) if is_tensor else value

    def placed(self, value: Tensor, p: Tensor) -> Tensor:
        """Return a copy of a saved state, where the states of p live."""
        return value.to(p.device, copy=True)


def check_settings(group: Mapping[str, Any]) -> None:
    """Refuse settings that no step can use."""
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise InputError(f"betas are {group['betas']}; choose both in [0, 1).")
    for name in ("lr", "eps", "weight_decay"):
        if not (value := group[name]) >= 0:
            raise InputError(f"{name} is {value}; choose 0 or more.")
    if group["bits"] not in (8, 32):
        raise InputError(f"bits is {group['bits']}; choose 8 or 32.")


def check_gradients(grads: list[Tensor]) -> None:
    """Refuse gradients that would spoil the state; one look at the device for all."""
    if any(grad.is_sparse for grad in grads):
        raise InputError("a gradient is sparse; build the embedding with sparse=False.")
    finite = [torch.isfinite(grad).all() for grad in grads]
    if finite and not torch.stack([f.to(finite[0].device) for f in finite]).all():
        grad = next(g for g, f in zip(grads, finite, strict=True) if not f)
        flat = grad.reshape(-1)
        first = int(torch.nonzero(~torch.isfinite(flat))[0])
        raise InputError(
            f"the gradient holds {flat[first]} at index {first}; skip this step."
        )


def _encode(state: State, name: str, values: Tensor) -> None:
    q = blockwise.quantize(values, _codebook(name, values.device), BLOCKSIZE)
    state[f"{name}_codes"], state[f"{name}_absmax"] = q.packed, q.absmax


@cache
def _codebook(name: str, device: torch.device) -> Float[Tensor, " codes"]:
    return dynamic_map(signed=name == "m").to(device)


def _root(v: Tensor) -> Tensor:
    # On the CPU torch's float32 root may be off by the last bit; float64's, rounded,
    # is not. (A GPU rounds correctly.)
    exact = v.is_cuda or v.dtype != torch.float32
    return v.sqrt() if exact else v.double().sqrt().float()
