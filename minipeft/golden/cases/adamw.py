"""Cases of adamw_step and adamw8_step."""

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np

from minipeft.golden.cases import (
    Alternative,
    File,
    Named,
    Spec,
    gaussian,
    integers,
    reference,
)
from minipeft.golden.cases.build import doubled, either, misfits, refused
from minipeft.golden.tensors import Array
from minipeft.reference import adamw
from minipeft.reference.adamw import AdamW


def files() -> Iterator[File]:
    """Yield the two files of the row."""
    formula = (
        "m = m + (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;",
        "W = (1 - lr wd) W - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps),",
        "where t counts this step too.",
    )
    yield File(
        operation="adamw_step",
        header=formula,
        source="minipeft.reference.adamw.step",
        specs=[*_plain(), _spoiled_at_first()],
    )
    yield File(
        operation="adamw8_step",
        header=(*formula, "Moments are decoded before and encoded after."),
        source="minipeft.reference.adamw.step",
        specs=[*_coded()],
    )


def _settings(t: int, **changes: float) -> dict[str, Any]:
    usual = {"lr": 0.125, "beta1": 0.75, "beta2": 0.875, "eps": 1e-8}
    return {"t": t, **usual, "weight_decay": 0.25, **changes}


def _plain() -> Iterator[Spec]:
    W, grad = gaussian("adamw W", (3, 5)), gaussian("adamw g", (3, 5), 0.01)
    m, v = np.zeros_like(W), np.zeros_like(W)
    first = {"W": W, "grad": grad, "m": m, "v": v}
    yield _bounded("from zero", "FirstStep Decay", first, _settings(0))
    plain = _settings(0, weight_decay=0.0)
    yield _bounded("without decay", "FirstStep", first, plain)
    later = {
        **first,
        "m": gaussian("adamw m", (3, 5), 0.01),
        "v": gaussian("adamw v", (3, 5), 0.01) ** 2,
    }
    yield _bounded("the 8th step", "LaterStep Decay", later, _settings(7))
    usual = _settings(999, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01)
    yield _bounded("the usual settings", "LaterStep Decay", later, usual)
    yield _bounded("a large eps", "Eps", later, _settings(2, eps=0.01))
    still = {**first, "grad": np.zeros_like(W)}
    yield _bounded("no gradient", "ZeroGradient Decay", still, _settings(3))
    yield from _refusals(first, grad)
    for name in ("beta1", "beta2"):
        zero = _settings(7, **{name: 0.0})
        yield _bounded(f"{name} is 0", "ZeroBeta LaterStep", later, zero)
    yield from _later_refusals(_spec("", "", first, _settings(0)))


def _refusals(first: dict[str, Array], grad: Array) -> Iterator[Spec]:
    fine = _spec("", "", first, _settings(0))
    for bad in (np.nan, np.inf):
        spoiled = grad.copy()
        spoiled[1, 2] = bad
        yield refused(fine, f"{bad}", "NotFinite", grad=spoiled)
    for name, value in {"lr": -0.1, "beta2": 1.0}.items():
        yield refused(fine, f"{name} is {value}", "OutOfRange", **{name: value})


def _spoiled_at_first() -> Spec:
    inputs = {name: np.ones((3, 5), np.float32) for name in ("W", "grad", "m", "v")}
    inputs["grad"][0, 0] = np.nan
    fine = _spec("", "", inputs, _settings(0))
    return refused(fine, "nan in the first place", "NotFinite")


def _later_refusals(fine: Spec) -> Iterator[Spec]:
    for name, value in [
        ("beta1", -0.5),
        ("beta2", -0.5),
        ("beta1", 1.0),
        ("eps", -1e-8),
        ("weight_decay", -0.25),
    ]:
        yield refused(fine, f"{name} is {value}", "OutOfRange", **{name: value})
    yield from misfits("adamw_step", fine, ())


def _bounded(
    comment: str, flags: str, inputs: dict[str, Array], settings: dict[str, Any]
) -> Spec:
    """Compared with a bound: 4 roundings for m, 5 for v, and 18 in all for W."""
    spec = _spec(comment, flags, inputs, settings)
    roundings = {"W": 18, "m": 4, "v": 5}
    spec = replace(spec, roundings=roundings, magnitudes=_sizes(inputs, settings))
    wide = doubled(inputs)
    return _hat(spec, reference("adamw_step", wide, settings), wide)


def _hat(spec: Spec, ours: Named, wide: Named) -> Spec:
    """Accept eps added before the bias correction, as eps / sqrt(1 - beta2^t)."""
    settings = dict(spec.parameters)
    correction = 1 - settings["beta2"] ** (settings["t"] + 1)
    settings["eps"] = settings["eps"] / sqrt(correction)
    weight = reference("adamw_step", wide, settings)["W"]
    sizes = _sizes(dict(wide), settings)["W"]
    assert spec.magnitudes is not None
    n = spec.roundings["W"]
    if (np.abs(weight - ours["W"]) <= n * 2.0**-24 * sizes).all():
        return spec
    outputs = dict(spec.outputs or ours) | {"W": weight}
    theirs = {
        k: v if v.dtype == np.uint8 else v.astype(np.float32)
        for k, v in outputs.items()
    }
    bounds = {**spec.magnitudes, "W": sizes}
    # One rounding more: eps over the root of the correction.
    rules = {**spec.roundings, "W": n + 1}
    return either(spec, Alternative("epsilon-hat", theirs, rules, bounds))


def _sizes(inputs: dict[str, Array], settings: dict[str, Any]) -> dict[str, Array]:
    """Return the sum of the absolute values of all terms."""
    W, g, m, v = (inputs[n].astype(np.float64) for n in ("W", "grad", "m", "v"))
    t, lr, beta1, beta2, eps, decay = settings.values()
    m = np.abs(m) + (1 - beta1) * (np.abs(g) + np.abs(m))
    v = beta2 * v + (1 - beta2) * g**2
    root = np.sqrt(v / (1 - beta2 ** (t + 1))) + eps
    update = lr / (1 - beta1 ** (t + 1)) * m / root
    return {"W": np.abs(W) * (1 - lr * decay) + update, "m": m, "v": v}


def _coded() -> Iterator[Spec]:
    """Betas are powers of two and gradients whole numbers: m and v are exact."""
    size = 256 + 9
    settings = _settings(0, beta1=0.5, beta2=0.75)
    W = gaussian("adamw8 W", (size,))
    empty = _state(np.zeros(size, np.float32), adamw.init(W))
    grad = integers("adamw8 g", (size,), 2000)
    sparse = grad * (np.arange(size) % 2).astype(np.float32)
    for comment, flags, g in (
        ("from zero", "FirstStep Codes", grad),
        ("every other gradient is 0", "ZeroGradient Codes", sparse),
    ):
        yield _exact(comment, flags, {"W": W, "grad": g, **empty}, settings)
    config = AdamW(0.125, (0.5, 0.75), 1e-8, 0.25)
    _, state = adamw.step(W, sparse, adamw.init(W), config)
    still = {"W": W, "grad": np.zeros_like(W), **_state(W, state)}
    yield _exact(
        "then no gradient at all", "LaterStep Codes", still, settings | {"t": 1}
    )
    small = {n: a[:1] if n.endswith("absmax") else a[:9] for n, a in still.items()}
    fine = _spec("", "", small, settings)
    yield from _misfits(fine)
    large = settings | {"t": 1, "eps": 256.0}
    yield _exact("a large eps", "LaterStep Eps Codes", still, large)
    yield from _out_of_range(fine)


def _out_of_range(fine: Spec) -> Iterator[Spec]:
    for name, value in [
        ("lr", -0.1),
        ("beta1", -0.5),
        ("beta1", 1.0),
        ("beta2", -0.5),
        ("beta2", 1.0),
        ("eps", -1e-8),
        ("weight_decay", -0.25),
    ]:
        yield refused(fine, f"{name} is {value}", "OutOfRange", **{name: value})
    for bad in (np.nan, np.inf):
        spoiled = fine.inputs["grad"].copy()
        spoiled[-1] = bad
        yield refused(fine, f"{bad} in the last place", "NotFinite", grad=spoiled)


def _misfits(fine: Spec) -> Iterator[Spec]:
    """Change one part of the state, whose sizes are those of W."""
    yield from misfits("adamw8_step", fine, ())
    for name in ("m_codes", "m_absmax", "v_codes", "v_absmax"):
        short = {name: fine.inputs[name][:-1]}
        yield refused(fine, f"{name} is one short", "ShapeMismatch", **short)


def _state(W: Array, state: adamw.State) -> dict[str, Array]:
    """Return an 8-bit state for a tensor of any size."""
    like = adamw.init(np.zeros(adamw.MIN_8BIT_SIZE, np.float32), 8)
    m, v = adamw.decode(state.m), adamw.decode(state.v)
    coded = adamw.State(0, adamw.encode(m, like.m), adamw.encode(v, like.v))
    arrays = adamw.to_arrays(coded)
    return {name: arrays[name] for name in arrays if name != "t"}


def _exact(
    comment: str, flags: str, inputs: dict[str, Array], settings: dict[str, Any]
) -> Spec:
    """Return a case with exact codes and scales, and a bound for the weight."""
    outputs = dict(reference("adamw8_step", inputs, settings))
    m = adamw.from_arrays({"t": np.array(0), **_only(inputs)})
    plain = {
        "W": inputs["W"].astype(np.float64),
        "grad": inputs["grad"].astype(np.float64),
        "m": adamw.decode(m.m).astype(np.float64),
        "v": adamw.decode(m.v).astype(np.float64),
    }
    outputs["W"] = reference("adamw_step", plain, settings)["W"].astype(np.float32)
    spec = replace(
        _spec(comment, flags, inputs, settings),
        roundings={"W": 18},
        outputs=outputs,
        magnitudes={"W": _sizes(plain, settings)["W"]},
    )
    return _hat(spec, reference("adamw_step", plain, settings), plain)


def _only(inputs: dict[str, Array]) -> dict[str, Array]:
    return {name: inputs[name] for name in inputs if name[:2] in ("m_", "v_")}


def _spec(
    comment: str, flags: str, inputs: dict[str, Array], settings: dict[str, Any]
) -> Spec:
    return Spec(comment, tuple(flags.split()), inputs, settings)
