"""PiSSA: train the principal part of the weight, freeze what is left of it."""

from dataclasses import dataclass

import numpy as np
from numpy.linalg import qr, svd

from minipeft.errors import InputError
from minipeft.reference import linear, lora
from minipeft.reference.lora import LoRA
from minipeft.shapes import Float, Shaped, check_shapes

Weight = Float[np.ndarray, "out_features in_features"]


@dataclass(frozen=True)
class Sketch:
    """How the randomized SVD looks at a matrix; the same sketch, the same answer."""

    seed: int = 0
    oversampling: int = 4  # directions beyond r, in each block
    iterations: int = 2  # passes of W and its transpose; each adds a block


SKETCH = Sketch()


def init(W: Weight, r: int, alpha: float) -> tuple[Weight, LoRA]:
    r"""Split the weight into a frozen residual and a trained principal part.

    $W = U S V^T$, $A = \sqrt{S_r / s}\, V_r^T$, $B = U_r \sqrt{S_r / s}$ and
    $W_{res} = W - s B A$, so that $W_{res} + s B A = W$ at any scaling.

    The residual is rounded: it and the adapter do not give the bits of W back. Keep W;
    `to_lora` puts what was learned on top of it.

    Args:
        W: the weight, every value finite.
        r: rank of the trained part, 1 to min(in_features, out_features).
        alpha: numerator of the scaling $s = \alpha / r$, positive.

    Returns:
        The frozen base and the adapter to train; from here on it is LoRA.

    Raises:
        InputError: if r or alpha is out of range, or a value of W is not finite.

    Source: PiSSA (arXiv:2404.02948), section 3.
    """
    initial = principal(W, r, checked_scaling(W, r, alpha))
    return residual(W, initial), initial


def init_randomized(
    W: Weight, r: int, alpha: float, sketch: Sketch = SKETCH
) -> tuple[Weight, LoRA]:
    """Do as `init` with a randomized SVD: faster, and W is still split exactly.

    A part of the r largest singular values stays in the residual.

    Source: PiSSA (arXiv:2404.02948), initialization with a fast SVD.
    """
    initial = principal_randomized(W, r, checked_scaling(W, r, alpha), sketch)
    return residual(W, initial), initial


def residual(
    W: Shaped[np.ndarray, "out_features in_features"], initial: LoRA
) -> Shaped[np.ndarray, "out_features in_features"]:
    """Return what the adapter leaves of the weight: $W_{res} = W - s B A$.

    Raises:
        InputError: if the adapter has another layer's shape.
    """
    lora.check_fits(W, initial)
    return W - lora.delta(initial)


def to_lora(trained: LoRA, initial: LoRA) -> LoRA:
    r"""Write what was learned as a plain LoRA of rank 2r on the original weight.

    $s (B_t A_t - B_0 A_0) = s [B_t, -B_0] [A_t; A_0]$, so nobody who loads it needs
    the residual, or an SVD that comes out the same again.

    Args:
        trained: the adapter after training.
        initial: the adapter that `init` returned, with the same scaling.

    Raises:
        InputError: if the two differ in scaling, or in the shape of their update.

    Source: PiSSA (arXiv:2404.02948), conversion to LoRA.
    """
    check_shapes(
        {
            "A after training": (trained.A, "r in_features"),
            "B after training": (trained.B, "out_features r"),
            "A before training": (initial.A, "r_initial in_features"),
            "B before training": (initial.B, "out_features r_initial"),
        }
    )
    if trained.scaling != initial.scaling:
        raise InputError(
            f"scaling is {trained.scaling} after training and {initial.scaling} "
            "before; give the adapter that the training started from."
        )
    A = np.concatenate([trained.A, initial.A])
    B = np.concatenate([trained.B, -initial.B], axis=1)
    return LoRA(A, B, trained.scaling)


def principal(W: Weight, r: int, scaling: float) -> LoRA:
    r"""Return the adapter nearest to W: the r largest singular values and vectors.

    No matrix of rank r is nearer, in the Frobenius, nuclear or spectral norm
    (Eckart, Young, Mirsky). The roots share $S_r / s$ evenly between A and B.

    Raises:
        InputError: if r or the scaling is out of range, or a value of W is not finite.
    """
    _check_split(W, r, scaling)
    # No SVD is written for 16 bits.
    U, S, Vt = svd(W.astype(np.result_type(W, np.float32)), False)
    root = np.sqrt(S[:r] / scaling)
    return LoRA(root[:, None] * Vt[:r], U[:, :r] * root, scaling)


def principal_randomized(
    W: Weight, r: int, scaling: float, sketch: Sketch = SKETCH
) -> LoRA:
    r"""Return nearly the nearest adapter: the SVD of $Q^T W$ for a thin Q.

    Q spans the block Krylov space $[W \Omega, (W W^T) W \Omega, …]$ with Gaussian
    $\Omega$; so $s B A = Q (Q^T W)_r$ is a projection of W, whatever was drawn.

    Raises:
        InputError: if r or the scaling is out of range, or a value of W is not finite.

    Source: Musco, Musco (arXiv:1504.05477), algorithm 2.
    """
    _check_split(W, r, scaling)
    W = W.astype(np.result_type(W, np.float32))
    rng = np.random.default_rng(sketch.seed)
    columns = min(r + sketch.oversampling, *W.shape)
    Omega = rng.standard_normal((W.shape[1], columns)).astype(W.dtype)
    blocks = [qr(W @ Omega).Q]
    for _ in range(sketch.iterations):
        # A QR at every pass: else all columns turn to the largest singular vector.
        blocks.append(qr(W @ (W.T @ blocks[-1])).Q)
    Q = qr(np.concatenate(blocks, axis=1)).Q
    small = principal(Q.T @ W, r, scaling)
    return LoRA(small.A, Q @ small.B, scaling)


def checked_scaling(W: Weight, r: int, alpha: float) -> float:
    """Return alpha / r, or refuse what no split can be made of."""
    if not 0 < alpha < np.inf:
        raise InputError(f"alpha is {alpha}; a split of W needs a positive one.")
    _check_split(W, r, alpha)
    return lora.scaling(alpha, r)


def _check_split(W: Weight, r: int, scaling: float) -> None:
    """Refuse a weight, rank or scaling that no split can be made of."""
    linear.check_fits(W)
    lora.check_rank(r, W.shape[1], W.shape[0])
    if not 0 < scaling < np.inf:
        raise InputError(f"scaling is {scaling}; a split of W needs a positive one.")
    bad = np.argwhere(~np.isfinite(W))
    if len(bad):
        i, j = (int(index) for index in bad[0])
        raise InputError(f"W[{i}, {j}] is {W[i, j]}; repair it before taking an SVD.")
