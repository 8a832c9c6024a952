"""AdamW, and its states in eight bits a value: the same bits as the reference.

A weight of float64 is apart: torch's square root may differ in its last bit there.

A step checks all its inputs before it writes a tensor. It works in slices, so its
temporary memory stays small for a tensor of any size.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import repeat
from math import inf, sqrt
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from minipeft.errors import InputError
from minipeft.kernels.tables import adamw_settings
from minipeft.shapes import Inexact
from minipeft.torch import blockwise, launches, operators
from minipeft.torch.adamw_checks import (
    LIMIT,
    Parts,
    check_gradient,
    check_parameter,
    check_parts,
    check_result,
    check_saved,
    check_settings,
    check_values,
    is_calm,
    is_large,
)
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import dynamic_map_on
from minipeft.torch.slices import Slice, read, slices, write
from minipeft.values import check_kind

BLOCKSIZE = 256
MIN_8BIT_SIZE = 4096  # smaller tensors (biases, norms) stay float32: they cost little

State = dict[str, Any]
"""One tensor's state: `step`, and the moments m and v, or their codes and scales."""

Weight = Inexact[Tensor, "..."]


class Moments(NamedTuple):
    """The decoded moments of a slice."""

    m: Slice
    v: Slice


class Job(NamedTuple):
    """A parameter of a step, its group, and its name in messages."""

    p: Tensor
    group: dict[str, Any]
    name: str


def init(W: Weight, bits: int = 32) -> State:
    """Start with no steps taken and both moments zero, on the device of W.

    Raises:
        InputError: if `bits` is neither 8 nor 32.
    """
    check_parameter(W, "W")
    state: State = {"step": 0}
    for name, (shape, dtype) in parts(W, bits).items():
        zero = _zero_code(name[0]) if name.endswith("codes") else 0
        state[name] = torch.full(shape, zero, dtype=dtype, device=W.device)
    return state


def parts(W: Weight, bits: int) -> Parts:
    """Return the shape and dtype of each tensor in the state of W.

    Raises:
        InputError: if `bits` is neither 8 nor 32.
    """
    if bits not in (8, 32):
        raise InputError(f"bits is {bits}; choose 8 or 32.")
    if bits == 32 or W.numel() < MIN_8BIT_SIZE:
        return {name: (tuple(W.shape), wide(W)) for name in "mv"}
    return _coded(W)


def step(W: Weight, grad: Weight, state: State, group: Mapping[str, Any]) -> None:
    """Take one step: change W and the state in place, or raise and change nothing.

    Args:
        W: the parameter.
        grad: its gradient, finite, of the same shape.
        state: from `init` or the last step; in eight bits for a W of any size.
        group: `lr`, `betas`, `eps` and `weight_decay`, as a parameter group has them.

    Raises:
        InputError: if an operand or a setting does not fit, or a result overflows.
    """
    check_kind("group", group, Mapping)
    check_kind("state", state, dict)
    check_settings({"bits": 32, **group})
    check_parameter(W, "W")
    check_gradient(W, grad, "W")
    check_parts(state, _coded(W) if "m_codes" in state else parts(W, 32), "W")
    with torch.no_grad():
        rehearse(Job(W, dict(group), "W"), grad, state)
        update(W, grad, state, group)


def update(
    W: Weight,
    grad: Weight,
    state: State,
    group: Mapping[str, Any],
    span: slice | None = None,
) -> None:
    """Take one step in place, slice by slice; the caller has checked the inputs.

    8-bit moments are decoded before the step and encoded after it. The new weight is
    computed from the moments before they are encoded.

    Args:
        W: the parameter.
        grad: its gradient.
        state: of W, or of a part of W.
        group: the settings.
        span: the range of the flattened W to which the state belongs; None: all.
    """
    span = span or slice(0, W.numel())
    t = state["step"] + 1
    held = [value for value in state.values() if isinstance(value, Tensor)]
    if W.dtype == grad.dtype and launches.available(W, grad, *held):
        own_W, own_grad = (flat.detach().view(-1)[span] for flat in (W, grad))
        _launch(own_W, own_grad, state, adamw_settings(group, t))
        state["step"] = t
        return
    for part in slices(span):
        own = slice(part.start - span.start, part.stop - span.start)
        old, slope = read(W, part), read(grad, part)
        moved, after = following(old, slope, moments(state, own), t, group)
        write(W, part, moved)
        del moved  # `encode` can use the memory that this frees
        for name, values in zip("mv", after, strict=True):
            _encode(state, name, own, values)
    state["step"] = t


def refuse_capture(devices: Iterable[torch.device]) -> None:
    """Refuse a step that a CUDA graph would repeat with the same rate and number."""
    if any(launches.capturing(device) for device in devices):
        raise InputError(
            "a CUDA graph is being captured, and each replay would repeat this step's "
            "lr and number; capture forward and backward, and call step() after them."
        )


def _launch(W: Tensor, grad: Tensor, state: State, settings: list[float]) -> None:
    if "m" in state:
        operators.adamw_(W, grad, state["m"], state["v"], settings)
        return
    codes, absmax = (
        [state[f"{moment}_{part}"] for moment in "mv"] for part in ("codes", "absmax")
    )
    operators.adamw_8bit_(W, grad, codes, absmax, settings)


def following(
    W: Slice, grad: Slice, before: Moments, t: int, group: Mapping[str, Any]
) -> tuple[Slice, Moments]:
    """Return the next weights, in the dtype of the moments, and the next moments.

    The formula and roundings are those of `reference.adamw.step`; t is the number of
    this step. The divisors are tensors, because on a GPU torch divides by a plain
    number by multiplying with its rounded reciprocal.
    """
    (m, v), (beta1, beta2), lr = before, group["betas"], group["lr"]
    del before  # frees the memory of the old moments for the new ones
    W, grad = W.to(m.dtype), grad.to(m.dtype)
    m = m + (1 - beta1) * (grad - m)
    v = beta2 * v + (1 - beta2) * grad * grad
    step_size = lr / (1 - beta1**t)
    root = _root(v) / v.new_full((), sqrt(1 - beta2**t)) + group["eps"]
    W = W * (1 - lr * group["weight_decay"]) + -step_size * m / root
    return W, Moments(m, v)


def rehearse(job: Job, grad: Weight, state: State) -> bool:
    """Compute a step without writing; refuse a result that is not finite.

    Returns:
        Whether the next moments are too large for the quick check of the next step.
    """
    W, large, t = job.p, False, state.get("step", 0) + 1
    for part in slices(slice(0, W.numel())):
        old, slope = read(W, part), read(grad, part)
        own = part if state else slice(0, len(old))
        before = moments(state or init(old), own, W.device)
        moved, after = following(old, slope, before, t, job.group)
        moved = moved.to(W.dtype)
        check_result((old, slope, *before), (moved, *after), part.start, job.name)
        large = large or is_large(after._asdict())
    return large


def wide(W: Weight) -> torch.dtype:
    """Return the dtype of states and arithmetic: float32, or that of W if wider.

    bitsandbytes does the same. torch's own AdamW keeps the dtype of W: in bfloat16,
    0.999 v rounds to v, and most steps are too small to change a weight.
    """
    return torch.promote_types(W.dtype, torch.float32)


def moments(state: State, part: slice, device: torch.device | None = None) -> Moments:
    """Return both moments of a slice, decoded if they are stored in 8 bits."""
    return Moments(*(_decode(state, name, part, device) for name in "mv"))


class AdamW(torch.optim.Optimizer):
    """AdamW with states of 32 or 8 bits; replaces `torch.optim.AdamW`.

    A step changes all parameters or none, and waits for the device once. Where a
    gradient, a setting or a weight of float16 might overflow, the step is computed
    twice: first as a check, then to write.

    Args:
        params: parameters or groups of them; a group may have settings of its own.
        lr: the learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, relative to lr.
        bits: of the states, 32 or 8.

    Raises:
        InputError: if a setting or a parameter does not fit; on `step`, if a gradient
            does not fit or a result overflows; on `load_state_dict`, if the states
            belong to another optimizer. Then nothing was changed.
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
        check_kind("params", params, Iterable)
        if isinstance(params, str | bytes):
            raise InputError(f"params is {params!r}; give a list of parameters.")
        settings = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(
            params, {**settings, "weight_decay": weight_decay, "bits": bits}
        )
        self._survey()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a copy or a pickle, which hold only groups and states."""
        super().__setstate__(state)
        self._survey()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for p, _, name in self.jobs():
                check_parameter(p, name)
        except InputError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step for every parameter that has a gradient.

        Raises:
            InputError: if a CUDA graph is being captured.
        """
        refuse_capture({job.p.device for job in self.jobs()})
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A state made in inference mode could not be changed outside that mode.
        with torch.inference_mode(False), torch.no_grad():
            work = [job for job in self.jobs() if job.p.grad is not None]
            self.check(work)
            self.advance(work)
        return loss

    def check(self, work: list[Job]) -> None:
        """Refuse a step whose inputs do not fit or whose results are not finite."""
        for p, group, name in work:
            check_settings(group)
            check_gradient(p, cast(Tensor, p.grad), name)
            if state := self.state.get(p):
                check_parts(state, parts(p, group["bits"]), name, self.home(p))
        grads = [cast(Tensor, p.grad) for p, *_ in work if p.numel()]
        calm = all(self._is_calm(job) for job in work)
        if grads and not (calm and get_total_norm(grads, inf) <= LIMIT):
            self.settle()
            states = [self.state.get(job.p, {}) for job in work]
            self.large |= {
                job.p
                for job, state in zip(work, states, strict=True)
                if rehearse(job, cast(Tensor, job.p.grad), state)
            }

    def advance(self, work: list[Job]) -> None:
        """Take a step for these parameters with the settings of their groups."""
        for p, group, _ in work:
            if not self.state[p]:
                self.state[p] = init(p, group["bits"])
        for p, group, _ in work:
            update(p, cast(Tensor, p.grad), self.state[p], group)

    def jobs(self) -> list[Job]:
        """Return every parameter with its group and its name or number."""
        found: list[Job] = []
        for group in self.param_groups:
            numbers = range(len(found), len(found) + len(group["params"]))
            names = group.get("param_names") or [f"parameter {i}" for i in numbers]
            found += map(Job, group["params"], repeat(group), names)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit for bit; or raise and change nothing."""
        self.check_state_dict(state_dict)
        # torch would cast every state to the dtype of its parameter. But codes are
        # bytes and scales need float32, so the states are loaded without torch.
        super().load_state_dict({**state_dict, "state": {}})
        with torch.inference_mode(False):
            for i, (p, *_) in zip(_ids(state_dict), self.jobs(), strict=True):
                for key, value in state_dict["state"].get(i, {}).items():
                    is_tensor = isinstance(value, Tensor)
                    self.state[p][key] = self.placed(value, p) if is_tensor else value
        self._survey()

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise the errors of `load_state_dict`, and change nothing.

        Raises:
            InputError: if the states belong to another optimizer or other parameters,
                have other bits, or are not finite.
        """
        check_saved(state_dict, self.param_groups)
        ids, states = _ids(state_dict), state_dict["state"]
        if strange := sorted(set(states) - set(ids), key=str):
            raise InputError(
                f"the file has a state for parameter {strange[0]} of {len(ids)}; load "
                "it into the optimizer it was saved from."
            )
        for i, (p, group, name) in zip(ids, self.jobs(), strict=True):
            if state := states.get(i):
                check_parts(state, parts(p, group["bits"]), name)
                check_values(state, name)

    def settle(self) -> None:
        """Make `self.state` up to date; in this class it always is."""

    def home(self, p: Tensor) -> torch.device:
        """Return the device that stores the state of a parameter."""
        return p.device

    def placed(self, value: Tensor, p: Tensor) -> Tensor:
        """Return a copy of a saved state on the device of the states of p."""
        return value.detach().to(p.device, copy=True)

    def _is_calm(self, job: Job) -> bool:
        t = self.state.get(job.p, {}).get("step", 0) + 1
        return job.p not in self.large and is_calm(job.p.dtype, t, job.group)

    def _survey(self) -> None:
        # The parameters whose moments are too large for the quick check.
        self.large = {p for p, state in self.state.items() if is_large(state)}


def _ids(state_dict: Mapping[str, Any]) -> list[Any]:
    return [i for group in state_dict["param_groups"] for i in group["params"]]


def _coded(W: Weight) -> Parts:
    n = W.numel()
    sizes = {"codes": ((n,), torch.uint8)}
    sizes |= {"absmax": ((-(-n // BLOCKSIZE),), torch.float32)}
    return {f"{m}_{kind}": size for m in "mv" for kind, size in sizes.items()}


def _decode(state: State, name: str, part: slice, device: torch.device | None) -> Slice:
    if name in state:
        values: Tensor = state[name].view(-1)[part]
        return values.to(device)
    codes = state[f"{name}_codes"][part].to(device)
    absmax = state[f"{name}_absmax"][_blocks(part)].to(device)
    values = dynamic_map_on(codes.device, signed=name == "m")
    q = Blockwise(codes, absmax, values, BLOCKSIZE, (len(codes),))
    return blockwise.dequantize(q)


def _encode(state: State, name: str, part: slice, values: Slice) -> None:
    if name in state:
        state[name].view(-1)[part].copy_(values)
        return
    codebook = dynamic_map_on(values.device, signed=name == "m")
    codes, absmax = blockwise.encode(values, codebook, BLOCKSIZE)
    state[f"{name}_codes"][part].copy_(codes)
    state[f"{name}_absmax"][_blocks(part)].copy_(absmax)


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCKSIZE, -(-part.stop // BLOCKSIZE))


@cache
def _zero_code(name: str) -> int:
    codebook = dynamic_map_on(torch.device("cpu"), signed=name == "m")
    return int(blockwise.nearest(codebook.new_zeros(1), codebook)[0])


def _root(v: Tensor) -> Tensor:
    # On the CPU torch's float32 root may err in the last bit. The float64 root, rounded
    # to float32, does not. (A GPU rounds correctly.)
    exact = v.is_cuda or v.dtype != torch.float32
    return v.sqrt() if exact else v.double().sqrt().float()
