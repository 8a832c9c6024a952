"""PiSSA: train the principal part of the weight and freeze the residual."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.linalg import eigh, qr, svd
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Inexact, Shaped
from minipeft.torch import lora
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.linear import (
    Form,
    Output,
    Product,
    Weight,
    check_shape,
    full_precision,
    rows_of,
    weight_of,
)
from minipeft.torch.lora import LoRA, check_dropout
from minipeft.torch.operands import check_tensors, has_values
from minipeft.values import check_integer, check_kind, check_number


@dataclass(frozen=True)
class Sketch:
    """The settings of the randomized SVD; equal settings give equal results."""

    seed: int = 0
    oversampling: int = 4  # directions beyond r, in each block
    iterations: int = 2  # products with W W^T; each adds a block to Q

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, -(2**63), 2**63 - 1)  # as torch takes it
        check_integer("oversampling", self.oversampling, 0)
        check_integer("iterations", self.iterations, 0)


SKETCH = Sketch()


def init(
    W: Inexact[Tensor, "out_features in_features"], r: int, alpha: float
) -> tuple[Inexact[Tensor, "out_features in_features"], LoRA]:
    """Split the weight into a frozen residual and a trained principal part.

    Formula and arguments: `reference.pissa.init`. The residual is rounded, so residual
    plus adapter give W back only up to rounding. This function does not change W.
    `PiSSALinear` stores W and never the residual, so its first output is exact.

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
    """Split the weight as `init` does, with the faster randomized SVD.

    Accuracy: `reference.pissa.init_randomized`. Here the SVD works in float32 or wider.

    Source: PiSSA (arXiv:2404.02948), initialization with a fast SVD.
    """
    check_kind("sketch", sketch, Sketch)
    initial = principal_randomized(W, r, checked_scaling(W, r, alpha), sketch)
    return residual(W, initial), initial


@torch.no_grad()
def residual(
    W: Shaped[Tensor, "out_features in_features"], initial: LoRA
) -> Shaped[Tensor, "out_features in_features"]:
    """Return the weight without the adapter's part: $W_{res} = W - s B A$.

    Raises:
        InputError: if the adapter belongs to another layer.
    """
    check_kind("initial", initial, LoRA)
    check_tensors(
        {
            "W": (W, "out_features in_features"),
            "B": (initial.B, "out_features r"),
            "A": (initial.A, "r in_features"),
        }
    )
    # A weight of 16 bits has an adapter of 32: the residual keeps what both hold.
    wide = torch.promote_types(W.dtype, initial.B.dtype)
    A, B = initial.A.to(wide), initial.B.to(wide)
    return torch.addmm(W.to(wide), B, A, alpha=-initial.scaling)


def to_lora(trained: LoRA, initial: LoRA) -> LoRA:
    """Write the trained change as a plain LoRA of rank 2r on the original weight.

    Formula and arguments: `reference.pissa.to_lora`.

    Raises:
        InputError: if the two adapters differ in scaling or in shape.

    Source: PiSSA (arXiv:2404.02948), conversion to LoRA.
    """
    check_kind("trained", trained, LoRA)
    check_kind("initial", initial, LoRA)
    check_tensors(
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
    """Return the adapter of rank r nearest to W: `reference.pissa.principal`."""
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

    The columns of Q span the block Krylov space $[W \Omega, (W W^T) W \Omega, …]$ with
    Gaussian $\Omega$. P is the best choice of r columns in the span of Q.

    Source: Musco, Musco (arXiv:1504.05477), algorithm 2.
    """
    W = _wide(W)
    Q = _krylov(W, r, sketch)
    small = Q.T @ W
    # Q^T W is thin: the eigenvectors of its Gram matrix cost a fraction of its
    # SVD. The Gram matrix squares the condition number, and P becomes less exact.
    # But P P^T W is a projection of W for every P with orthonormal columns.
    U = eigh(small @ small.T).eigenvectors[:, -r:].flip(1)
    SVt = U.T @ small
    S = SVt.norm(dim=1, keepdim=True)
    root = (S / scaling).sqrt()
    A = SVt / torch.where(S > 0, root * scaling, 1)
    return LoRA(A, (Q @ U) * root.T, scaling)


class PiSSA(LoRA):
    """The trained adapter, and the adapter with which training started.

    Args:
        initial: the adapter that `init` returned; training starts from its values.
        dropout: the probability that an entry of x is dropped before it meets A.
    """

    A_0: Tensor
    B_0: Tensor

    def __init__(self, initial: LoRA, dropout: float = 0.0):
        check_kind("initial", initial, LoRA)
        A, B = initial.A.detach(), initial.B.detach()
        super().__init__(A.clone(), B.clone(), initial.scaling, dropout)
        self.register_buffer("A_0", A)
        self.register_buffer("B_0", B)

    def forward(self, product: Product) -> Output:  # type: ignore[override]
        """Return the change of the output, computed with four thin products."""
        check_fits(product.form, self)
        h_0 = product.project(self.A_0)
        return super().forward(product) - linear(self.scaling * h_0, self.B_0)

    @property
    def initial(self) -> LoRA:
        """The adapter before training; it is frozen."""
        return LoRA(self.A_0, self.B_0, self.scaling).requires_grad_(False)


def check_fits(form: Form, adapter: PiSSA) -> None:
    """Refuse matrices of another layer; torch would broadcast a single row."""
    check_kind("adapter", adapter, PiSSA)
    lora.check_fits(form, adapter)
    r = rows_of(adapter.A_0)
    check_shape("A_0", adapter.A_0, r, form.in_features)
    check_shape("B_0", adapter.B_0, form.out_features, r)


class PiSSALinear(Adapted[PiSSA]):
    """A layer with its residual: $y = x W^T + b + s (x A^T) B^T - s (x A_0^T) B_0^T$.

    This equals $x W_{res}^T + b + s (x A^T) B^T$, but $W_{res}$ is never formed. The
    base keeps its bits, at the cost of two more thin products. Without dropout, a new
    adapter changes no bit of the output. The subtracted part belongs to the base, so it
    gets no dropout.
    """

    check_fits = staticmethod(check_fits)

    def change(self, adapter: PiSSA, W: Weight) -> Weight:
        r"""Return $s (B A - B_0 A_0)$."""
        return lora.delta(adapter) - lora.delta(adapter.initial)


@dataclass(frozen=True)
class PiSSAConfig:
    """PiSSA for the layers of a model; the arguments are those of `init` and `PiSSA`.

    sketch: the settings of the randomized SVD; None selects the exact SVD.
    """

    r: int
    alpha: float
    sketch: Sketch | None = SKETCH
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[PiSSA]]] = PiSSALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, PiSSA]:
        """Return a new adapter for each layer, on the device of the layer.

        Raises:
            InputError: if r, alpha or dropout is out of range, or a weight is not
                finite; the message names the layer.
        """
        adapters = {}
        for name, layer in layers.items():
            with naming(name):
                adapters[name] = self._adapter(layer)
        return adapters

    def _adapter(self, layer: nn.Module) -> PiSSA:
        check_dropout(self.dropout)
        if self.sketch is not None:
            check_kind("sketch", self.sketch, Sketch)
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
    """Return alpha / r; refuse a weight, rank or alpha that allows no split."""
    check_tensors({"W": (W, "out_features in_features")})
    lora.check_rank(r, W.shape[1], W.shape[0])
    check_number("alpha", alpha)
    if not alpha > 0:
        raise InputError(f"alpha is {alpha}; a split of W needs a positive one.")
    if not has_values(W):
        raise InputError(
            "W is on the device meta, and has no values to split; load the model first."
        )
    if not torch.isfinite(W).all():
        i, j = (int(index) for index in torch.nonzero(~torch.isfinite(W))[0])
        raise InputError(
            f"W[{i}, {j}] is {W[i, j].item()}; repair it before taking an SVD."
        )
    return lora.scaling(alpha, r)


def _krylov(
    W: Inexact[Tensor, "out_features in_features"], r: int, sketch: Sketch
) -> Inexact[Tensor, "out_features columns"]:
    # Drawn on the CPU, so that a seed gives the same numbers on every device.
    generator = torch.Generator("cpu").manual_seed(sketch.seed)
    columns = min(r + sketch.oversampling, *W.shape)
    Omega = torch.empty(W.shape[1], columns, dtype=torch.float32, device="cpu")
    Omega.normal_(generator=generator)
    blocks = [qr(W @ Omega.to(W)).Q]
    for _ in range(sketch.iterations):
        # One QR after each product: otherwise all columns approach the largest singular
        # vector.
        blocks.append(qr(W @ (W.T @ blocks[-1])).Q)
    return qr(torch.cat(blocks, dim=1)).Q


def _wide(W: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
    # torch has no SVD for 16-bit floats.
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))
