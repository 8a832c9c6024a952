"""AdamW in optax. Packages: optax==0.2.8 jax==0.10.2."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minipeft.golden.tensors import Array

jax.config.update("jax_platforms", "cpu")


def adamw_step(
    W: Array,
    grad: Array,
    m: Array,
    v: Array,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Array, Array, Array]:
    """One step of `optax.adamw` from a state that is handed in."""
    optimizer = optax.adamw(lr, beta1, beta2, eps, weight_decay=weight_decay)
    weight = jnp.asarray(W)
    first, *rest = optimizer.init(weight)
    moments = {"mu": jnp.asarray(m), "nu": jnp.asarray(v)}
    held = first._replace(count=jnp.asarray(t, jnp.int32), **moments)
    updates, state = optimizer.update(jnp.asarray(grad), (held, *rest), weight)
    updated = optax.apply_updates(weight, updates)
    return np.asarray(updated), np.asarray(state[0].mu), np.asarray(state[0].nu)
