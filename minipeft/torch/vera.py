"""VeRA: one frozen random pair for all layers, and two trained vectors per layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.linear import (
    Form,
    Output,
    Product,
    Weight,
    check_shape,
    rows_of,
    weight_view,
)
from minipeft.torch.lora import MatrixA, MatrixB, check_dropout
from minipeft.torch.operands import check_tensors, has_values
from minipeft.values import check_integer, check_kind, check_number


class Projections(nn.Module):
    """The frozen pair, as large as the largest layer; all layers share this one object.

    Four whole numbers determine the pair, so each `VeRA` saves only these.

    Args:
        seed: 0 to 2**32 - 1.
        r: directions.
        in_features: columns of the widest weight.
        out_features: rows of the tallest weight.
    """

    A: MatrixA
    B: MatrixB

    def __init__(self, seed: int, r: int, in_features: int, out_features: int):
        super().__init__()
        self.drawn = (seed, r, in_features, out_features)
        A, B = projections(*self.drawn)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    @classmethod
    def given(cls, A: MatrixA, B: MatrixB) -> "Projections":
        """Hold a pair that another program drew; the seed -1 marks such a pair.

        Raises:
            InputError: if the two matrices have different r.
        """
        check_shape("B", B, len(B), len(A))
        pair = cls.__new__(cls)
        nn.Module.__init__(pair)
        pair.drawn = (-1, len(A), A.shape[1], len(B))
        pair.register_buffer("A", A, persistent=False)
        pair.register_buffer("B", B, persistent=False)
        return pair

    def forward(self, in_features: int, out_features: int) -> tuple[MatrixA, MatrixB]:
        """Return the top left corners of the pair, which a smaller layer uses."""
        return self.A[:, :in_features], self.B[:out_features]

    def draw(self, numbers: tuple[int, int, int, int], device: torch.device) -> None:
        """Draw the pair again for other numbers, or on another device."""
        A, B = projections(*numbers)
        self.A, self.B = A.to(device, self.A.dtype), B.to(device, self.B.dtype)
        self.drawn = numbers

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "Projections":
        probe = torch.arange(1.0, 9.0, dtype=self.A.dtype, device=self.A.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.A.is_meta:
            moved = fn(probe)
            # `to_empty` does not copy values.
            if probe.is_meta or not torch.equal(moved, probe.to(moved)):
                self.draw(self.drawn, self.A.device)
        return self


class VeRA(nn.Module):
    """The trained parts of one layer: d scales the r directions, b the outputs.

    The state dict holds d, b, and the four numbers of the pair. When a state dict with
    other numbers is loaded, the pair is drawn again for all layers that share it.

    Args:
        d: the scale of each direction.
        b: the scale of each output.
        pair: frozen and shared.
        dropout: the probability, in training, that an entry of x is dropped before A.
    """

    d: Float[Tensor, " r"]
    b: Float[Tensor, " out_features"]
    drawn: Shaped[Tensor, " four"]

    def __init__(
        self,
        d: Float[Tensor, " r"],
        b: Float[Tensor, " out_features"],
        pair: Projections,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_kind("the pair", pair, Projections)
        _check_pair(pair)
        check_tensors({"d": (d, "r"), "b": (b, "out_features")})
        check_dropout(dropout)
        self.d, self.b = nn.Parameter(d), nn.Parameter(b)
        drawn = torch.tensor(pair.drawn, dtype=torch.int64, device="cpu")
        self.register_buffer("drawn", drawn.to(d.device))
        self.projections = pair
        self.dropout = dropout
        self.register_load_state_dict_post_hook(_draw_what_was_loaded)  # type: ignore[no-untyped-call]

    def forward(self, product: Product) -> Output:
        r"""Return the change of the output, $b \odot ((d \odot x A^T) B^T)$."""
        check_fits(product.form, self)
        A, B = self.projections(product.form.in_features, product.form.out_features)
        h = product.project(A, self.dropout)
        return linear(self.d * h, B) * self.b


def _draw_what_was_loaded(adapter: VeRA, keys: object) -> None:
    pair, device = adapter.projections, adapter.drawn.device
    drawn = adapter.drawn.clone()  # in a FakeTensorMode the numbers cannot be read
    if not has_values(drawn):
        return
    seed, r, k, d = (int(number) for number in drawn)
    if pair.drawn != (seed, r, k, d) or pair.A.is_meta:
        pair.draw((seed, r, k, d), device)


def projections(
    seed: int, r: int, in_features: int, out_features: int
) -> tuple[MatrixA, MatrixB]:
    r"""Draw A, then B, each $U(-\sqrt{6/n}, \sqrt{6/n})$ with n its number of columns.

    Arguments: `reference.vera.projections`. The pair is always drawn on the CPU: its
    generator gives the same bits on every machine, the same as peft's for this seed.

    Raises:
        InputError: if the seed or r is out of range.

    Source: VeRA (arXiv:2310.11454), sections 3.2 and 3.3.
    """
    check_integer("seed", seed, 0, 2**32 - 1)
    check_integer("r", r, 1)
    check_integer("in_features", in_features, 1)
    check_integer("out_features", out_features, 1)
    stream = torch.Generator("cpu").manual_seed(seed)
    A = kaiming_uniform(stream, r, in_features)
    return A, kaiming_uniform(stream, out_features, r)


def kaiming_uniform(
    stream: torch.Generator, rows: int, columns: int
) -> Float[Tensor, "rows columns"]:
    """Draw one matrix, in float32."""
    bound = sqrt(6 / columns)
    empty = torch.empty(rows, columns, dtype=torch.float32, device="cpu")
    return empty.uniform_(-bound, bound, generator=stream)


def init(pair: Projections, out_features: int, d_initial: float = 0.1) -> VeRA:
    """Start at zero update: every d is `d_initial`, every b is zero.

    Source: VeRA (arXiv:2310.11454), section 3.3.
    """
    check_kind("the pair", pair, Projections)
    check_integer("out_features", out_features, 0)
    check_number("d_initial", d_initial)
    d = pair.A.new_full((rows_of(pair.A),), d_initial)
    return VeRA(d, pair.A.new_zeros(out_features), pair)


def delta(adapter: VeRA, in_features: int) -> Weight:
    r"""Return the update: $\Delta W = \Lambda_b B \Lambda_d A$, diagonal Lambdas."""
    check_kind("adapter", adapter, VeRA)
    check_integer("in_features", in_features, 0)
    check_tensors({"b": (adapter.b, "out_features")})
    form = Form(len(adapter.b), in_features, adapter.b.dtype, adapter.b.device)
    check_fits(form, adapter)
    A, B = adapter.projections(in_features, len(adapter.b))
    return (adapter.b[:, None] * B * adapter.d) @ A


def check_fits(form: Form, adapter: VeRA) -> None:
    """Refuse vectors of another layer; torch would broadcast a single number."""
    check_kind("adapter", adapter, VeRA)
    check_shape("b", adapter.b, form.out_features)
    _check_pair(adapter.projections)
    _, r, widest, tallest = adapter.projections.drawn
    check_shape("d", adapter.d, r)
    if form.in_features > widest or form.out_features > tallest:
        raise InputError(
            f"the projections serve weights up to ({tallest}, {widest}); draw them for "
            f"the largest layer, here {form.shape}."
        )


def _check_drawn(drawn: Sequence[int], now: Sequence[int], form: Form, r: int) -> None:
    if list(drawn) != list(now):
        seed, directions, widest, tallest = drawn
        check_integer("the seed", seed, 0, 2**32 - 1)
        check_integer("r", directions, r, r)
        check_integer("in_features", widest, form.in_features)
        check_integer("out_features", tallest, form.out_features)


def _check_pair(pair: Projections) -> None:
    _, r, widest, tallest = pair.drawn
    check_shape("A of the pair", pair.A, r, widest)
    check_shape("B of the pair", pair.B, tallest, r)


class VeRALinear(Adapted[VeRA]):
    r"""A frozen layer and its update: $y = x W^T + b_0 + b \odot ((d \odot xA^T) B^T)$.

    Source: VeRA (arXiv:2310.11454), equation 2.
    """

    check_fits = staticmethod(check_fits)

    def check_load(self, state: Mapping[str, Any], prefix: str, assign: bool) -> None:
        """Refuse also four numbers of which no pair for this layer can be drawn.

        Args:
            state: of `load_state_dict`.
            prefix: of the layer's names in the state.
            assign: whether the tensors replace those of the layer.
        """
        for name, adapter in cast(Mapping[str, VeRA], self.adapters).items():
            drawn = state.get(f"{prefix}adapters.{name}.drawn")
            if drawn is not None and has_values(drawn):
                form, r = self.view.form(self.base), rows_of(adapter.d)
                with naming(f"{prefix}adapters.{name}.drawn"):
                    _check_drawn(drawn.tolist(), adapter.projections.drawn, form, r)
        super().check_load(state, prefix, assign)

    def change(self, adapter: VeRA, W: Weight) -> Weight:
        r"""Return $\Delta W = \Lambda_b B \Lambda_d A$."""
        return delta(adapter, W.shape[1])


@dataclass(frozen=True)
class VeRAConfig:
    """VeRA for the layers of a model; one pair, as large as the largest layer."""

    r: int = 256
    seed: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[VeRA]]] = VeRALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, VeRA]:
        """Return a new adapter for each layer; the layers on one device share one pair.

        Args:
            layers: by name.
            generator: not used: `seed` alone decides, so others can draw the same.

        Raises:
            InputError: if r, the seed or dropout is out of range.
        """
        check_dropout(self.dropout)
        forms = {name: weight_view(layers[name]).form(layers[name]) for name in layers}
        widest = max(form.in_features for form in forms.values())
        tallest = max(form.out_features for form in forms.values())
        pairs: dict[tuple[torch.device, torch.dtype], Projections] = {}
        adapters = {}
        for name, form in forms.items():
            place = form.device, form.wide
            if place not in pairs:
                pair = Projections(self.seed, self.r, widest, tallest)
                pairs[place] = pair.to(*place)
            adapters[name] = init(pairs[place], form.out_features, self.d_initial)
            adapters[name].dropout = self.dropout
        return adapters
