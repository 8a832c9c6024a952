"""The frozen layer that every adapter wraps: where its weight lies, how it is merged.

The reference writes W `(out_features, in_features)` and x `(..., in_features)`. Layers
store W in several ways; a `Layout` says how one of them reads in the reference's terms,
so that a method is written once for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatch
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped

Adapter = TypeVar("Adapter", bound=nn.Module)


class Form(NamedTuple):
    """What W looks like, without reading it: a 4-bit weight would be decoded first."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    device: torch.device


class Layout:
    """How a layer stores W and takes x; this one is of `nn.Linear`: W as it stands."""

    def form(self, layer: Any) -> Form:
        """Return the shape, dtype and device of W."""
        W = self.turn(layer.weight)
        return Form(W.shape[0], W.shape[1], W.dtype, W.device)

    def turn(self, weight: Shaped[Tensor, "a b"]) -> Shaped[Tensor, "c d"]:
        """Read the stored weight as W, or W as the stored weight."""
        return weight

    def forward(
        self, layer: Any, x: Tensor, W: Shaped[Tensor, "out_features in_features"]
    ) -> Tensor:
        """Compute what the layer computes, with W in place of its own weight."""
        return linear(x, W, layer.bias)

    def project(
        self, layer: Any, x: Tensor, A: Shaped[Tensor, "r in_features"], p: float
    ) -> Shaped[Tensor, "... r"]:
        """Return $x A^T$ in the dtype of A, each entry of x dropped with chance p."""
        if x.dtype.itemsize < A.dtype.itemsize and not p and _eager(x):
            return cast(Tensor, _Widened.apply(x, A))  # type: ignore[no-untyped-call]
        x = x.to(A.dtype)
        return linear(dropout(x, p) if p else x, A)

    def plain(
        self, layer: Any, W: Shaped[Tensor, "out_features in_features"]
    ) -> nn.Module:
        """Return the plain layer whose weight is W."""
        weight = self.turn(W).contiguous()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return cast(nn.Module, layer)


class Transposed(Layout):
    """GPT-2's `Conv1D`: a linear layer that stores the transpose of W."""

    def turn(self, weight: Shaped[Tensor, "a b"]) -> Shaped[Tensor, "c d"]:
        """Transpose."""
        return weight.T


class Lookup(Transposed):
    """`nn.Embedding`: x is one-hot and given by its index; row i is column i of W."""

    def forward(
        self, layer: Any, x: Tensor, W: Shaped[Tensor, "out_features in_features"]
    ) -> Tensor:
        """Look up the columns of W."""
        return embedding(x, W.T, layer.padding_idx)

    def project(
        self, layer: Any, x: Tensor, A: Shaped[Tensor, "r in_features"], p: float
    ) -> Shaped[Tensor, "... r"]:
        """Look up the columns of A; to drop the one entry of x is to drop the token."""
        h = embedding(x, A.T, layer.padding_idx)
        return h * dropout(torch.ones_like(h[..., :1]), p) if p else h


class _Widened(torch.autograd.Function):
    """$x A^T$ in the dtype of A, with x remembered as it came.

    Autograd would keep the x that it multiplied: over a base of 16 bits a copy of twice
    the size, and another one for each layer that reads the same x. Not offered: forward
    mode.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, A: Tensor) -> Tensor:
        return linear(x.to(A.dtype), A)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, A = ctx.saved_tensors
        grad_x = (grad_h @ A).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        rows, G = x[None].flatten(0, -2), grad_h[None].flatten(0, -2)
        return grad_x, G.T @ rows.to(A.dtype)


def _eager(x: Tensor) -> bool:
    # A compiler decides for itself what to keep, autocast what to compute in.
    compiling = torch.compiler.is_compiling()
    return not compiling and not torch.is_autocast_enabled(x.device.type)


@singledispatch
def layout(layer: nn.Module) -> Layout:
    """Return how this layer stores its weight; other modules may register theirs.

    Raises:
        InputError: for a layer that no adapter can wrap and merge faithfully.
    """
    # Known by its name: importing transformers for one class would cost seconds.
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return Transposed()
    raise InputError(
        f"{type(layer).__name__} has no weight matrix that an adapter could change; "
        "choose linear layers, Conv1D or embeddings."
    )


@layout.register
def _(layer: nn.Linear) -> Layout:
    _check_forward(layer, nn.Linear)
    return Layout()


@layout.register
def _(layer: nn.Embedding) -> Layout:
    _check_forward(layer, nn.Embedding)
    if layer.max_norm is not None:
        raise InputError(
            f"the embedding has max_norm {layer.max_norm}, which rewrites its frozen "
            "weight in every forward pass; set max_norm to None."
        )
    return Lookup()


class Adapted(nn.Module, ABC, Generic[Adapter]):
    """A frozen layer with named adapters, of which any weighted sum is active.

    The base is never written to. Merging puts $W'$ beside it and computes with that, so
    unmerging is exact by construction, in every dtype, and a state dict saved while
    merged holds the base and the adapters as they are. The price: while merged, the
    weight is in memory twice.

    A row derives its own class and says what `forward` and `merged` are.

    Args:
        base: the layer to wrap; it is frozen.
        adapter: the trained part.
        name: what to call it.
    """

    merged_weight: Float[Tensor, "out_features in_features"] | None

    def __init__(self, base: nn.Module, adapter: Adapter, name: str = "default"):
        super().__init__()
        self.layout = layout(base)
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_load_state_dict_post_hook(_merge_again)  # type: ignore[no-untyped-call]
        self.base = base
        self.add(name, adapter)
        self.activate({name: 1.0})
        base.requires_grad_(False)

    @property
    def W(self) -> Float[Tensor, "out_features in_features"]:
        """The frozen weight, whichever way the layer stores it."""
        return self.layout.turn(cast(Tensor, self.base.weight))

    @property
    def weight(self) -> Float[Tensor, "a b"]:
        """The effective weight, the way the base would store it.

        For code that reads `layer.weight` instead of calling the layer, as
        `nn.MultiheadAttention` does: it meets the adapted weight, with its gradients.
        """
        W = self.merged() if self.merged_weight is None else self.merged_weight
        return self.layout.turn(W)

    @property
    def bias(self) -> Float[Tensor, " out_features"] | None:
        """The bias of the base; adapters leave it alone."""
        return cast(Tensor | None, getattr(self.base, "bias", None))

    @abstractmethod
    def merged(self) -> Float[Tensor, "out_features in_features"]:
        """Return $W'$, the weight of the plain layer that does the same."""

    def merge(self) -> "Adapted[Adapter]":
        """Compute with $W'$ from now on; merging again starts from the base again."""
        with torch.no_grad():
            self.merged_weight = self.merged().detach()
        return self

    def unmerge(self) -> "Adapted[Adapter]":
        """Compute with the base and the adapters again; the base was never touched."""
        self.merged_weight = None
        return self

    def unload(self) -> nn.Module:
        """Return a plain layer: with $W'$ if merged, else as it was before."""
        if self.merged_weight is None:
            return self.base
        return self.layout.plain(self.base, self.merged_weight)

    def add(self, name: str, adapter: Adapter) -> None:
        """Hold another adapter, inactive at first.

        Raises:
            InputError: if the name is taken, or cannot be part of a state dict's key.
        """
        self.check_new(name)
        self.adapters[name] = adapter

    def check_new(self, name: str) -> None:
        """Refuse a name that no new adapter can have."""
        if not name or "." in name or hasattr(self.adapters, name):
            raise InputError(
                f"the adapter name {name!r} cannot be used here; choose one without a "
                f"dot, other than {_listed(self.adapters)}."
            )

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._check_known(name)
        self.activate({n: share for n, share in self.active.items() if n != name})
        del self.adapters[name]

    def activate(self, shares: Mapping[str, float]) -> None:
        """Use the adapters named, each times its share; none leaves the base alone.

        Raises:
            InputError: for a name that the layer does not hold.
        """
        for name in shares:
            self._check_known(name)
        self.active = dict(shares)
        _merge_again(self)

    def shares(self) -> list[tuple[float, Adapter]]:
        """Return the active adapters, each behind its share."""
        return [(s, cast(Adapter, self.adapters[n])) for n, s in self.active.items()]

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            raise InputError(
                f"there is no adapter {name!r}; choose from {_listed(self.adapters)}."
            )


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put the layer's name in front of what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{layer}: {error}") from None


def _merge_again(layer: Any, keys: object = None) -> None:
    # After new values or another choice, what was merged before is out of date.
    if layer.merged_weight is not None:
        layer.merge()


def _check_forward(layer: nn.Module, kind: type[nn.Module]) -> None:
    if type(layer).forward is not kind.forward:
        raise InputError(
            f"{type(layer).__name__} is a {kind.__name__} with a forward of its own, "
            "which a merged weight would not reproduce; leave it out of the targets."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
