"""VeRA: one frozen random pair for every layer, and two trained vectors for each."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from minipeft.errors import InputError
from minipeft.shapes import Float, Shaped
from minipeft.torch.linear import Adapted, layout
from minipeft.torch.lora import check_dropout


class Projections(nn.Module):
    """The frozen pair, as large as the largest layer; all layers share this one object.

    A state dict holds four whole numbers in its place: seed, r, in_features and
    out_features. Where others are loaded, the pair is drawn again.
    """

    A: Float[Tensor, "r in_features"]
    B: Float[Tensor, "out_features r"]
    drawn: Shaped[Tensor, " four"]

    def __init__(self, seed: int, r: int, in_features: int, out_features: int):
        super().__init__()
        self.register_buffer(
            "drawn", torch.tensor([seed, r, in_features, out_features])
        )
        A, B = projections(seed, r, in_features, out_features)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self._seen = (id(self.drawn), self.drawn._version)

    def fit(
        self, in_features: int, out_features: int
    ) -> tuple[Float[Tensor, "r in_features"], Float[Tensor, "out_features r"]]:
        """Return the part of the pair that a smaller layer uses: the top left corners.

        Raises:
            InputError: if the layer is larger than the pair.
        """
        if not torch.compiler.is_compiling():
            self._draw_what_was_loaded()
        widest, tallest = self.A.shape[1], self.B.shape[0]
        if in_features > widest or out_features > tallest:
            raise InputError(
                f"the projections serve weights up to ({tallest}, {widest}); draw them "
                f"for the largest layer, here ({out_features}, {in_features})."
            )
        return self.A[:, :in_features], self.B[:out_features]

    def _draw_what_was_loaded(self) -> None:
        seen = (id(self.drawn), self.drawn._version)
        if seen == self._seen:
            return
        A, B = projections(*(int(number) for number in self.drawn))
        self.A, self.B = A.to(self.A), B.to(self.B)
        self._seen = seen


class VeRA(nn.Module):
    """The trained parts of one layer: d scales the r directions, b the outputs."""

    d: Float[Tensor, " r"]
    b: Float[Tensor, " out_features"]

    def __init__(
        self,
        d: Float[Tensor, " r"],
        b: Float[Tensor, " out_features"],
        projections: Projections,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.d, self.b = nn.Parameter(d), nn.Parameter(b)
        self.projections = projections
        self.dropout = dropout


def projections(
    seed: int, r: int, in_features: int, out_features: int
) -> tuple[Float[Tensor, "r in_features"], Float[Tensor, "out_features r"]]:
    r"""Draw A, then B, each $U(-\sqrt{6/n}, \sqrt{6/n})$ with n its number of columns.

    Always on the CPU, whose generator gives the same bits on every machine, and gives
    peft's for the same seed.

    Args:
        seed: 0 to 2**32 - 1.
        r: directions, the length of d.
        in_features: columns of the widest weight.
        out_features: rows of the tallest weight.

    Raises:
        InputError: if the seed or r is out of range.

    Source: VeRA (arXiv:2310.11454), section 3.2.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; choose 0 to {2**32 - 1}.")
    if r < 1:
        raise InputError(f"r is {r}; choose 1 or more.")
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

    Source: VeRA (arXiv:2310.11454), section 3.2.
    """
    d = pair.A.new_full((len(pair.A),), d_initial)
    return VeRA(d, pair.A.new_zeros(out_features), pair)


def delta(vera: VeRA, in_features: int) -> Float[Tensor, "out_features in_features"]:
    r"""Return the update: $\Delta W = \Lambda_b B \Lambda_d A$, diagonal Lambdas."""
    A, B = vera.projections.fit(in_features, len(vera.b))
    return (vera.b[:, None] * B * vera.d) @ A


class VeRALinear(Adapted[VeRA]):
    r"""A frozen layer and its update: $y = x W^T + b_0 + b \odot ((d \odot xA^T) B^T)$.

    Source: VeRA (arXiv:2310.11454), equation 2.
    """

    def forward(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "... out_features"]:
        """Apply the adapted layer."""
        if self.merged_weight is not None:
            return self.layout.forward(self.base, x, self.merged_weight)
        y = total = self.base(x)
        in_features = self.layout.form(self.base).in_features
        for share, vera in self.shares():
            A, B = vera.projections.fit(in_features, len(vera.b))
            p = vera.dropout if self.training else 0.0
            h = self.layout.project(self.base, x, A, p)
            total = torch.addcmul(total, linear(vera.d * h, B), vera.b, value=share)
        return cast(Tensor, total.to(y.dtype))

    def merged(self) -> Float[Tensor, "out_features in_features"]:
        """Return W', rounded once to the dtype of W."""
        total = W = self.W
        for share, vera in self.shares():
            total = total + share * delta(vera, W.shape[1])
        return total.to(W.dtype)


@dataclass(frozen=True)
class VeRAConfig:
    """VeRA for the layers of a model: the pair is drawn once, for the largest."""

    r: int = 256
    seed: int = 0
    d_initial: float = 0.1
    dropout: float = 0.0

    wrapper: ClassVar[type[Adapted[VeRA]]] = VeRALinear

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, VeRA]:
        """Return a new adapter for each layer; those on one device share one pair.

        Args:
            layers: by name.
            generator: not used: `seed` alone decides, so that others can draw the same.

        Raises:
            InputError: if r, the seed or dropout is out of range.
        """
        forms = {name: layout(layer).form(layer) for name, layer in layers.items()}
        widest = max(form.in_features for form in forms.values())
        tallest = max(form.out_features for form in forms.values())
        check_dropout(self.dropout)
        pairs: dict[tuple[torch.device, torch.dtype], Projections] = {}
        adapters = {}
        for name, (d, _, dtype, device) in forms.items():
            place = device, torch.promote_types(dtype, torch.float32)
            if place not in pairs:
                pair = Projections(self.seed, self.r, widest, tallest)
                pairs[place] = pair.to(*place)
            adapters[name] = init(pairs[place], d, self.d_initial)
            adapters[name].dropout = self.dropout
        return adapters
