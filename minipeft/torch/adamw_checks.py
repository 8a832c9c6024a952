"""The checks of an optimizer before its first write; each message is one sentence."""

from collections.abc import Mapping, Sequence
from math import inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from minipeft.errors import InputError
from minipeft.shapes import Inexact
from minipeft.values import check_kind

Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""The shape and dtype of each tensor of a state, by its name."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SETTINGS = ("lr", "betas", "eps", "weight_decay", "bits")
AGAIN = "load it into the optimizer it was saved from."

# The quick check. While all gradients stay below LIMIT, rounding lets m grow by a
# factor of at most 1 + 2^-21 a step, which is e^4 < 2^6 in 2^23 steps, and v likewise:
# |m| < 2^42 and v < 2^78. With a step size up to 2^20 and an eps of at least 2^-40 a
# weight then moves by at most 2^102, and that is below half a last bit of the largest
# float32: nothing overflows.
LIMIT = 2.0**36
LARGEST = torch.finfo(torch.float64).max
STEPS, STEP_SIZE, EPS = 2**23, 2.0**20, 2.0**-40


def check_settings(group: Mapping[str, Any]) -> None:
    """Refuse settings with which no step can be computed."""
    check_kind("group", group, Mapping)
    if missing := [name for name in SETTINGS if name not in group]:
        raise InputError(f"group has no {missing[0]}; give {', '.join(SETTINGS)}.")
    betas = group["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(_is_number(b) and 0 <= b < 1 for b in betas):
        raise InputError(f"betas are {betas}; choose both in [0, 1).")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not (_is_number(value) and 0 <= value <= LARGEST):
            raise InputError(f"{name} is {value}; choose a plain number from 0 on.")
    if group["bits"] not in (8, 32):
        raise InputError(f"bits is {group['bits']}; choose 8 or 32.")


def check_parameter(p: Tensor, name: str) -> None:
    """Refuse a tensor that a step cannot change in place value by value."""
    check_kind(name, p, Tensor)
    why = None
    if is_lazy(p):
        why = "has no values yet; run the model once before building the optimizer."
    elif p.is_meta:
        why = "is a placeholder on the device meta; load it, or bring it back first."
    elif p.dtype not in DTYPES:
        why = f"is {_dtype(p)}; train float16, bfloat16, float32 or float64."
    elif p.layout != torch.strided or hasattr(p, "to_local"):
        why = "is sparse or sharded; use an optimizer of torch.optim for it."
    elif p.is_inference():
        why = "was made in inference mode; make it outside."
    elif any(n > 1 and s == 0 for n, s in zip(p.shape, p.stride(), strict=True)):
        why = "is expanded: its values share memory; clone it first."
    if why:
        raise InputError(f"{name} {why}")


def check_gradient(p: Tensor, grad: Tensor, name: str) -> None:
    """Refuse a gradient of another shape, dtype or device; no value is read."""
    check_kind(f"the gradient of {name}", grad, Tensor)
    if grad.layout != torch.strided:
        raise InputError(
            f"the gradient of {name} is sparse; build the embedding with sparse=False."
        )
    if grad.shape != p.shape:
        raise InputError(
            f"the gradient of {name} has shape {tuple(grad.shape)}; the parameter has "
            f"{tuple(p.shape)}."
        )
    if grad.device != p.device or grad.dtype not in DTYPES:
        raise InputError(
            f"the gradient of {name} is {_dtype(grad)} on {grad.device}; the parameter "
            f"is {_dtype(p)} on {p.device}."
        )


def check_parts(
    state: Mapping[str, Any],
    parts: Parts,
    name: str,
    device: torch.device | None = None,
) -> None:
    """Refuse a state that does not belong to this parameter with these bits."""
    if not isinstance(state, Mapping) or state.keys() != {"step", *parts}:
        has = ", ".join(sorted(map(str, state)))
        raise InputError(
            f"the state of {name} holds {has or 'nothing'}, and this optimizer keeps "
            f"{', '.join(['step', *parts])}; {AGAIN}"
        )
    t = state["step"]
    if type(t) is not int or not 0 <= t <= LARGEST:
        raise InputError(
            f"the state of {name} has step {t!r:.60}; it counts from 0. {AGAIN}"
        )
    for key, (shape, dtype) in parts.items():
        value = state[key]
        fits = isinstance(value, Tensor) and value.dtype == dtype
        if not fits or tuple(value.shape) != shape:
            raise InputError(
                f"{key} of {name} is {_described(value)}, and this optimizer needs "
                f"{_name(dtype)} of shape {shape}; {AGAIN}"
            )
        if device is not None and value.device != device:
            raise InputError(
                f"{key} of {name} is on {value.device}, not on {device}; build the "
                "optimizer where the model is, or load the state dict again."
            )


def check_values(state: Mapping[str, Any], name: str) -> None:
    """Refuse moments and scales that no step can produce."""
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not _largest(value) < inf:
            raise InputError(f"{key} of {name} is not finite; load another file.")
        if key != "m" and value.numel() and value.min() < 0:
            raise InputError(f"{key} of {name} is negative; load another file.")


def check_saved(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a state dict whose groups are not those of this optimizer."""
    saved = state_dict.get("param_groups")
    if not isinstance(saved, list) or not isinstance(state_dict.get("state"), Mapping):
        raise InputError("a state dict has a state and a list of param_groups.")
    sizes = [len(g.get("params", ())) for g in saved]
    own = [len(g["params"]) for g in groups]
    if sizes != own:
        raise InputError(
            f"the file has groups of {sizes} parameters, and this optimizer of {own}; "
            + AGAIN
        )
    for theirs, mine in zip(saved, groups, strict=True):
        if missing := [key for key in SETTINGS if key not in theirs]:
            raise InputError(
                f"the file has no {missing[0]}: it is of another optimizer; {AGAIN}"
            )
        check_settings(theirs)
        if theirs["bits"] != mine["bits"]:
            raise InputError(
                f"the file has states of {theirs['bits']} bits; build the optimizer "
                f"with bits={theirs['bits']} instead of {mine['bits']}."
            )
        names, own_names = theirs.get("param_names"), mine.get("param_names")
        if names and own_names and names != own_names:
            raise InputError(
                f"the file has the states of {', '.join(names)}, in this order; the "
                f"optimizer has {', '.join(own_names)}."
            )


def is_calm(dtype: torch.dtype, t: int, group: Mapping[str, Any]) -> bool:
    """Return whether finite gradients below `LIMIT` cannot make step t overflow.

    The largest float16 is 65,504, so for weights of float16 the answer is always no.
    """
    step_size = group["lr"] / (1 - group["betas"][0] ** t)
    decay = group["lr"] * group["weight_decay"]
    quiet = t < STEPS and step_size <= STEP_SIZE and group["eps"] >= EPS
    return quiet and decay <= 2 and dtype != torch.float16


def is_large(state: Mapping[str, Any]) -> bool:
    """Return whether the moments exceed the limits that the quick check assumes."""
    bounds = {"m": LIMIT, "m_absmax": LIMIT, "v": LIMIT**2, "v_absmax": LIMIT**2}
    return any(
        not _largest(state[key]) <= bound
        for key, bound in bounds.items()
        if key in state
    )


Values = tuple[Inexact[Tensor, " n"], ...]


def check_result(before: Values, after: Values, start: int, name: str) -> None:
    """Refuse a slice with a value that overflows, and name the tensor that caused it.

    Args:
        before: W, the gradient, m and v.
        after: W in its own dtype, m and v.
        start: the index of the slice's first value.
        name: of the parameter.
    """
    W, grad, *_ = before
    # A weight that was NaN before is not an error of this step. The first
    # moment cannot overflow where the square of the gradient does not.
    good = after[0].isfinite() | ~W.isfinite()
    good &= grad.isfinite() & after[1].isfinite() & after[2].isfinite()
    found = torch.nonzero(~good)
    if len(found):
        i = int(found[0])
        values = [tensor[i].item() for tensor in (*before, after[0], after[2])]
        raise InputError(_cause(values, start + i, name, W.dtype))


def _cause(values: list[float], at: int, name: str, dtype: torch.dtype) -> str:
    W, grad, m, v, W_new, v_new = values
    if not isfinite(grad):
        return f"the gradient of {name} holds {grad} at index {at}; skip this step."
    if not isfinite(m) or not isfinite(v):
        return f"the state of {name} is not finite at index {at}; load a good one."
    if not isfinite(v_new):
        wide = torch.promote_types(dtype, torch.float32)
        return (
            f"the gradient of {name} holds {grad} at index {at}, and its square "
            f"overflows the second moment ({_name(wide)}); clip the gradients, or skip "
            "this step."
        )
    if not v_new:
        return (
            f"the second moment of {name} is 0 at index {at}, so eps alone divides "
            "the step; choose a larger eps."
        )
    return (
        f"the step takes {name} from {W} to {W_new} at index {at}, beyond "
        f"{_name(dtype)}; lower the learning rate."
    )


def _largest(values: Tensor) -> Tensor | float:
    # One pass without temporary memory; NaN stays NaN.
    return torch.linalg.vector_norm(values, inf) if values.numel() else 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{_dtype(value)} of shape {tuple(value.shape)}"


def _dtype(tensor: Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
