"""Bugs of AdamW."""

import numpy as np

from minipeft.errors import InputError
from minipeft.golden.drivers.reference import adamw as right
from minipeft.reference import adamw, blockwise
from minipeft.reference.codebook import dynamic_map
from tests.impls.broken import bug

F32 = np.float32


@bug("adamw_step", "FirstStep")
def corrects_from_the_second_step(W, grad, m, v, **settings):
    if settings["t"]:
        return right.adamw_step(W, grad, m, v, **settings)
    return right.adamw_step(W, grad, m, v, **settings | {"t": 10**6})


@bug("adamw_step", "LaterStep")
def forgets_how_many_steps_there_were(W, grad, m, v, **settings):
    return right.adamw_step(W, grad, m, v, **settings | {"t": 0})


@bug("adamw_step", "Decay")
def decays_through_the_gradient(W, grad, m, v, **settings):
    decay = settings["weight_decay"]
    settings |= {"weight_decay": 0.0}
    return right.adamw_step(W, grad + F32(decay) * W, m, v, **settings)


@bug("adamw_step", "Eps")
def adds_eps_under_the_root(W, grad, m, v, **settings):
    eps = settings["eps"]
    if eps < 1e-4:
        return right.adamw_step(W, grad, m, v, **settings)
    return right.adamw_step(W, grad, m, v, **settings | {"eps": eps**0.5})


@bug("adamw_step", "ZeroBeta", "beta1 is 0", "beta2 is 0")
def takes_zero_for_missing(W, grad, m, v, **settings):
    for name, usual in {"beta1": 0.9, "beta2": 0.999}.items():
        settings[name] = settings[name] or usual
    return right.adamw_step(W, grad, m, v, **settings)


@bug("adamw_step", "OutOfRange", "beta1 is -0.5")
def takes_a_negative_beta(W, grad, m, v, **settings):
    return right.adamw_step(
        W, grad, m, v, **settings | {"beta1": abs(settings["beta1"])}
    )


@bug("adamw_step", "ShapeMismatch", "grad has one row alone")
def spreads_one_row_of_the_gradient(W, grad, m, v, **settings):
    if len(grad) == 1:
        grad = np.repeat(grad, len(W), axis=0)
    return right.adamw_step(W, grad, m, v, **settings)


@bug("adamw_step", "ZeroGradient")
def has_a_small_gradient_everywhere(W, grad, m, v, **settings):
    return right.adamw_step(W, np.where(grad == 0, F32(1e-3), grad), m, v, **settings)


@bug("adamw_step", "OutOfRange")
def takes_any_setting(W, grad, m, v, **settings):
    known = settings | {"lr": abs(settings["lr"]), "beta2": min(settings["beta2"], 0.9)}
    return right.adamw_step(W, grad, m, v, **known)


@bug("adamw_step", "NotFinite")
def replaces_gradients_that_are_not_finite(W, grad, m, v, **settings):
    return right.adamw_step(W, np.nan_to_num(grad), m, v, **settings)


def _coded(W, grad, parts, settings):
    """Take a step on decoded moments; return W and the moments, not encoded."""
    m, v = (
        adamw.decode(
            blockwise.Blockwise(
                parts[f"{name}_codes"],
                parts[f"{name}_absmax"],
                dynamic_map(name == "m"),
                adamw.BLOCKSIZE,
                W.shape,
            )
        )
        for name in "mv"
    )
    return right.adamw_step(W, grad, m, v, **settings)


def _split(arguments):
    parts = {k: v for k, v in arguments.items() if k[:2] in ("m_", "v_")}
    return parts, {k: v for k, v in arguments.items() if k not in parts}


@bug("adamw8_step", "Codes")
def stores_the_second_moment_with_a_sign(W, grad, **arguments):
    out = right.adamw8_step(W, grad, **arguments)
    parts, settings = _split(arguments)
    _, _, v = _coded(W, grad, parts, settings)
    if not grad.any():
        return out
    q = blockwise.quantize(v, dynamic_map(), adamw.BLOCKSIZE)
    return *out[:3], q.packed, q.absmax


@bug(
    "adamw8_step",
    "ShapeMismatch",
    "m_absmax has one number too many",
    "v_absmax has one number too many",
)
def cuts_its_scales(W, grad, **arguments):
    for name in ("m_absmax", "v_absmax"):
        arguments[name] = arguments[name][: -(-W.size // 256)]
    return right.adamw8_step(W, grad, **arguments)


@bug("adamw8_step", "FirstStep")
def starts_a_step_ahead(W, grad, **arguments):
    if arguments["t"]:
        return right.adamw8_step(W, grad, **arguments)
    return right.adamw8_step(W, grad, **arguments | {"t": 1})


@bug("adamw8_step", "LaterStep")
def starts_again_at_each_step(W, grad, **arguments):
    return right.adamw8_step(W, grad, **arguments | {"t": 0})


@bug("adamw8_step", "ZeroGradient")
def has_no_code_for_a_zero_moment(W, grad, **arguments):
    W, codes, *rest = right.adamw8_step(W, grad, **arguments)
    sparse = np.any(grad == 0) and np.any(grad)
    zero = (codes > 123) & (codes < 131) & sparse
    return W, np.where(zero, np.uint8(131), codes), *rest


@bug("adamw_step", "Decay")
def decays_what_is_already_updated(W, grad, m, v, **settings):
    decay = F32(settings["lr"] * settings["weight_decay"])
    right.adamw_step(W, grad, m, v, **settings)  # refuses bad input
    settings |= {"weight_decay": 0.0}
    updated, *moments = right.adamw_step(W, grad, m, v, **settings)
    return updated - decay * updated, *moments


@bug("adamw_step", "FirstStep")
def corrects_no_moment(W, grad, m, v, **settings):
    right.adamw_step(W, grad, m, v, **settings)
    return right.adamw_step(W, grad, m, v, **settings | {"t": 10**6})


@bug("adamw8_step", "Eps", "a large eps")
def forgets_eps(W, grad, **arguments):
    eps = min(arguments["eps"], 1e-8)
    return right.adamw8_step(W, grad, **arguments | {"eps": eps})


@bug("adamw8_step", "OutOfRange")
def takes_any_setting_of_eight_bits(W, grad, **arguments):
    usual = {"lr": 0.1, "beta1": 0.5, "beta2": 0.5, "eps": 1e-8, "weight_decay": 0.1}
    try:
        return right.adamw8_step(W, grad, **arguments)
    except InputError:
        return right.adamw8_step(W, grad, **arguments | usual)


@bug("adamw8_step", "NotFinite")
def replaces_what_is_not_finite_in_eight_bits(W, grad, **arguments):
    return right.adamw8_step(W, np.nan_to_num(grad, posinf=0), **arguments)
