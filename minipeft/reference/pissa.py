"""PiSSA: train the principal part of the weight and freeze the residual."""

from dataclasses import dataclass

import numpy as np
from numpy.linalg import qr, svd

from minipeft.errors import InputError
from minipeft.reference import linear, lora
from minipeft.reference.lora import LoRA
from minipeft.shapes import Float, Shaped, check_scaling, check_shapes
from minipeft.values import check_integer, check_kind, check_number

Weight = Float[np.ndarray, "out_features in_features"]


@dataclass(frozen=True)
class Sketch:
    """The settings of the randomized SVD; equal settings give equal results."""

    seed: int = 0
    oversampling: int = 4  # directions beyond r, in each block
    iterations: int = 2  # products with W W^T; each adds a block to Q

    def __post_init__(self) -> None:
        """Refuse what is no number of anything."""
        for name in ("seed", "oversampling", "iterations"):
            check_integer(name, getattr(self, name), 0)


SKETCH = Sketch()


def init(W: Weight, r: int, alpha: float) -> tuple[Weight, LoRA]:
    r"""Split the weight into a frozen residual and a trained principal part.

    $W = U S V^T$, $A = \sqrt{S_r / s}\, V_r^T$, $B = U_r \sqrt{S_r / s}$ and
    $W_{res} = W - s B A$, so that $W_{res} + s B A = W$ at any scaling.

    The residual is rounded, so residual plus adapter give W back only up to rounding.
    Keep W: `to_lora` writes the trained change as an update of W.

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
    """Split the weight as `init` does, with the faster randomized SVD.

    The singular values of the adapter are slightly smaller than the exact ones. The
    residual holds the difference, so the two parts still sum to W.

    Source: PiSSA (arXiv:2404.02948), initialization with a fast SVD.
    """
    initial = principal_randomized(W, r, checked_scaling(W, r, alpha), sketch)
    return residual(W, initial), initial


def residual(
    W: Shaped[np.ndarray, "out_features in_features"], initial: LoRA
) -> Shaped[np.ndarray, "out_features in_features"]:
    """Return the weight without the adapter's part: $W_{res} = W - s B A$.

    Raises:
        InputError: if the adapter has another layer's shape.
    """
    lora.check_fits(W, initial)
    return W - lora.delta(initial)


def to_lora(trained: LoRA, initial: LoRA) -> LoRA:
    r"""Write the trained change as a plain LoRA of rank 2r on the original weight.

    $s (B_t A_t - B_0 A_0) = s [B_t, -B_0] [A_t; A_0]$. A program that loads the LoRA
    needs neither the residual nor an SVD with the same result.

    Args:
        trained: the adapter after training.
        initial: the adapter that `init` returned, with the same scaling.

    Raises:
        InputError: if the two differ in scaling, or in the shape of their update.

    Source: PiSSA (arXiv:2404.02948), conversion to LoRA.
    """
    for name, adapter in (("trained", trained), ("initial", initial)):
        check_kind(name, adapter, LoRA)
    check_shapes(
        {
            "A after training": (trained.A, "r in_features"),
            "B after training": (trained.B, "out_features r"),
            "A before training": (initial.A, "r_initial in_features"),
            "B before training": (initial.B, "out_features r_initial"),
        }
    )
    for adapter in (trained, initial):
        check_scaling(adapter.scaling, adapter.A)
    if trained.scaling != initial.scaling:
        raise InputError(
            f"scaling is {trained.scaling} after training and {initial.scaling} "
            "before; give the adapter that the training started from."
        )
    A = np.concatenate([trained.A, initial.A])
    B = np.concatenate([trained.B, -initial.B], axis=1)
    return LoRA(A, B, trained.scaling)


def principal(W: Weight, r: int, scaling: float) -> LoRA:
    r"""Return the adapter of rank r nearest to W, from its largest singular values.

    No matrix of rank r is nearer, in the Frobenius, nuclear or spectral norm
    (Eckart, Young, Mirsky). A and B each get the root $\sqrt{S_r / s}$ as a factor.

    Raises:
        InputError: if r or the scaling is out of range, or a value of W is not finite.
    """
    _check_split(W, r, scaling)
    # NumPy has no SVD for 16-bit floats.
    U, S, Vt = svd(W.astype(np.result_type(W, np.float32)), False)
    root = np.sqrt(S[:r] / scaling)
    return LoRA(root[:, None] * Vt[:r], U[:, :r] * root, scaling)


def principal_randomized(
    W: Weight, r: int, scaling: float, sketch: Sketch = SKETCH
) -> LoRA:
    r"""Return nearly the nearest adapter: the SVD of $Q^T W$ for a thin Q.

    The columns of Q span the block Krylov space $[W \Omega, (W W^T) W \Omega, …]$ with
    Gaussian $\Omega$. $s B A = Q (Q^T W)_r$ is a projection of W for every $\Omega$.

    Raises:
        InputError: if r or the scaling is out of range, or a value of W is not finite.

    Source: Musco, Musco (arXiv:1504.05477), algorithm 2.
    """
    _check_split(W, r, scaling)
    check_kind("the sketch", sketch, Sketch)
    W = W.astype(np.result_type(W, np.float32))
    rng = np.random.default_rng(sketch.seed)
    columns = min(r + sketch.oversampling, *W.shape)
    Omega = rng.standard_normal((W.shape[1], columns)).astype(W.dtype)
    blocks = [qr(W @ Omega).Q]
    for _ in range(sketch.iterations):
        # One QR after each product: otherwise all columns approach the largest singular
        # vector.
        blocks.append(qr(W @ (W.T @ blocks[-1])).Q)
    Q = qr(np.concatenate(blocks, axis=1)).Q
    small = principal(Q.T @ W, r, scaling)
    return LoRA(small.A, Q @ small.B, scaling)


def checked_scaling(W: Weight, r: int, alpha: float) -> float:
    """Return alpha / r; refuse a weight, rank or alpha that allows no split."""
    check_number("alpha", alpha)
    if not alpha > 0:
        raise InputError(f"alpha is {alpha}; a split of W needs a positive one.")
    _check_split(W, r, alpha)
    return lora.scaling(alpha, r)


def _check_split(W: Weight, r: int, scaling: float) -> None:
    """Refuse a weight, rank or scaling that allows no split."""
    linear.check_fits(W, {})
    lora.check_rank(r, W.shape[1], W.shape[0])
    check_number("scaling", scaling)
    if not scaling > 0:
        raise InputError(f"scaling is {scaling}; a split of W needs a positive one.")
    bad = np.argwhere(~np.isfinite(W))
    if len(bad):
        i, j = (int(index) for index in bad[0])
        raise InputError(f"W[{i}, {j}] is {W[i, j]}; repair it before taking an SVD.")
