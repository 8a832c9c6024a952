"""PiSSA: train the principal part of the weight, freeze what is left of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.linalg import eigh, qr, svd
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Inexact, Shaped, check_shapes
from minipeft.torch import lora
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.linear import (
    Form,
    Output,
    Product,
    Weight,
    full_precision,
    weight_of,
)
from minipeft.torch.lora import LoRA, check_dropout


@dataclass(frozen=True)
class Sketch:
    """How the randomized SVD looks at a matrix; the same sketch, the same answer."""

    seed: int = 0
    oversampling: int = 4  # directions beyond r, in each block
    iterations: int = 2  # passes of W and its transpose; each adds a block


SKETCH = Sketch()


def init(
    W: Inexact[Tensor, "out_features in_features"], r: int, alpha: float
) -> tuple[Inexact[Tensor, "out_features in_features"], LoRA]:
    r"""Split the weight into a frozen residual and a trained principal part.

    $W = U S V^T$, $A = \sqrt{S_r / s}\, V_r^T$, $B = U_r \sqrt{S_r / s}$ and
    $W_{res} = W - s B A$, so that $W_{res} + s B A = W$ at any scaling.

    The residual is rounded: it and the adapter do not give W back bit for bit. W is
    left alone; `PiSSALinear` keeps it, and not the residual.

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
    W: Inexact[Tensor, "out_features in_features"],
    r: int,
    alpha: float,
    sketch: Sketch = SKETCH,
) -> tuple[Inexact[Tensor, "out_features in_features"], LoRA]:
    """Do as `init` with a randomized SVD: faster, and W is still split exactly.

    A part of the r largest singular values stays in the residual.

    Source: PiSSA (arXiv:2404.02948), initialization with a fast SVD.
    """
    initial = principal_randomized(W, r, checked_scaling(W, r, alpha), sketch)
    return residual(W, initial), initial


@torch.no_grad()
def residual(
    W: Shaped[Tensor, "out_features in_features"], initial: LoRA
) -> Shaped[Tensor, "out_features in_features"]:
    """Return what the adapter leaves of the weight: $W_{res} = W - s B A$.

    Raises:
        InputError: if the adapter is of another layer.
    """
    check_shapes(
        {
            "W": (W, "out_features in_features"),
            "B": (initial.B, "out_features r"),
            "A": (initial.A, "r in_features"),
        }
    )
    return torch.addmm(W, initial.B, initial.A, alpha=-initial.scaling)


def to_lora(trained: LoRA, initial: LoRA) -> LoRA:
    r"""Write what was learned as a plain LoRA of rank 2r on the original weight.

    $s (B_t A_t - B_0 A_0) = s [B_t, -B_0] [A_t; A_0]$, so nobody who loads it needs
    the residual, or an SVD that comes out the same again.

    Args:
        trained: the adapter after training.
        initial: the adapter that `init` returned, with the same scaling.

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
    A = torch.cat([trained.A, initial.A]).detach()
    B = torch.cat([trained.B, -initial.B], dim=1).detach()
    return LoRA(A, B, trained.scaling, trained.dropout)


def principal(
    W: Inexact[Tensor, "out_features in_features"], r: int, scaling: float
) -> LoRA:
    r"""Return the adapter nearest to W: the r largest singular values and vectors.

    No matrix of rank r is nearer, in the Frobenius, nuclear or spectral norm
    (Eckart, Young, Mirsky). The roots share $S_r / s$ evenly between A and B.
    """
    U, S, Vt = svd(_wide(W), full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return LoRA(root[:, None] * Vt[:r], U[:, :r] * root, scaling)


def principal_randomized(
    W: Inexact[Tensor, "out_features in_features"],
    r: int,
    scaling: float,
    sketch: Sketch = SKETCH,
) -> LoRA:
    r"""Return nearly the nearest adapter: $P P^T W$ for r orthonormal columns P.

    P is the best choice within Q, which spans the block Krylov space
    $[W \Omega, (W W^T) W \Omega, …]$ with Gaussian $\Omega$.

    Source: Musco, Musco (arXiv:1504.05477), algorithm 2.
    """
    W = _wide(W)
    Q = _krylov(W, r, sketch)
    small = Q.T @ W
    # Of a matrix this thin, the eigenvectors of its Gram matrix cost a fraction of its
    # SVD. That squares its condition, but P P^T W is a projection for any such P.
    U = eigh(small @ small.T).eigenvectors[:, -r:].flip(1)
    SVt = U.T @ small
    S = SVt.norm(dim=1, keepdim=True)
    root = (S / scaling).sqrt()
    A = SVt / torch.where(S > 0, root * scaling, 1)
    return LoRA(A, (Q @ U) * root.T, scaling)


class PiSSA(LoRA):
    """What is trained, and what it started from.

    Args:
        initial: the adapter that `init` returned; its values are where training starts.
        dropout: the chance, in training, that an entry of x is dropped on the way to A.
    """

    A_0: Tensor
    B_0: Tensor

    def __init__(self, initial: LoRA, dropout: float = 0.0):
        A, B = initial.A.detach(), initial.B.detach()
        super().__init__(A.clone(), B.clone(), initial.scaling, dropout)
        self.register_buffer("A_0", A)
        self.register_buffer("B_0", B)

    def forward(self, product: Product) -> Output:
        """Return what is added to the output; four thin products in all."""
        h_0 = product.project(self.A_0)
        return super().forward(product) - linear(self.scaling * h_0, self.B_0)

    @property
    def initial(self) -> LoRA:
        """The adapter before training, frozen."""
        return LoRA(self.A_0, self.B_0, self.scaling).requires_grad_(False)


def check_fits(form: Form, adapter: PiSSA) -> None:
    """Refuse matrices of another layer: one row would broadcast."""
    lora.check_fits(form, adapter)
    lora.check_fits(form, adapter.initial)


class PiSSALinear(Adapted[PiSSA]):
    r"""A layer on its residual: $y = x W^T + b + s (x A^T) B^T - s (x A_0^T) B_0^T$.

    That is $x W_{res}^T + b + s (x A^T) B^T$ without ever forming $W_{res}$: the base
    stays what it was, bit for bit, at the price of two more thin products. A new
    adapter changes nothing, not even the last bit. The part that is subtracted belongs
    to the base, so dropout leaves it alone.
    """

    check_fits = staticmethod(check_fits)

    def change(self, adapter: PiSSA, W: Weight) -> Weight:
        r"""Return $s (B A - B_0 A_0)$."""
        return lora.delta(adapter) - lora.delta(adapter.initial)


@dataclass(frozen=True)
class PiSSAConfig:
    """PiSSA for the layers of a model; the arguments are those of `init` and `PiSSA`.

    sketch: None for the exact SVD.
    """

    r: int
    alpha: float
    sketch: Sketch | None = SKETCH
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[PiSSA]]] = PiSSALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, PiSSA]:
        """Return a new adapter for each layer, where the layer lives.

        Raises:
            InputError: if r, alpha or dropout is out of range, or a weight is not
                finite; the sentence names the layer.
        """
        adapters = {}
        for name, layer in layers.items():
            with naming(name):
                adapters[name] = self._adapter(layer)
        return adapters

    def _adapter(self, layer: nn.Module) -> PiSSA:
        check_dropout(self.dropout)
        W = weight_of(layer).detach()
        s = checked_scaling(W, self.r, self.alpha)
        with full_precision(W.device):
            if self.sketch is None:
                initial = principal(W, self.r, s)
            else:
                initial = principal_randomized(W, self.r, s, self.sketch)
        return PiSSA(initial, self.dropout)


def checked_scaling(
    W: Inexact[Tensor, "out_features in_features"], r: int, alpha: float
) -> float:
    """Return alpha / r, or refuse what no split can be made of."""
    lora.check_rank(r, W.shape[1], W.shape[0])
    if not 0 < alpha < inf:
        raise InputError(f"alpha is {alpha}; a split of W needs a positive one.")
    if not torch.isfinite(W).all():
        i, j = (int(index) for index in torch.nonzero(~torch.isfinite(W))[0])
        raise InputError(
            f"W[{i}, {j}] is {W[i, j].item()}; repair it before taking an SVD."
        )
    return lora.scaling(alpha, r)


def _krylov(
    W: Inexact[Tensor, "out_features in_features"], r: int, sketch: Sketch
) -> Inexact[Tensor, "out_features columns"]:
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator("cpu").manual_seed(sketch.seed)
    columns = min(r + sketch.oversampling, *W.shape)
    Omega = torch.empty(W.shape[1], columns, dtype=torch.float32, device="cpu")
    Omega.normal_(generator=generator)
    blocks = [qr(W @ Omega.to(W)).Q]
    for _ in range(sketch.iterations):
        # A QR at every pass: else all columns turn to the largest singular vector.
        blocks.append(qr(W @ (W.T @ blocks[-1])).Q)
    return qr(torch.cat(blocks, dim=1)).Q


def _wide(W: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
    # No SVD is written for 16 bits.
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))
