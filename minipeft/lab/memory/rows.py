"""What each method trains, and what it makes autograd keep besides the frozen model."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from minipeft.errors import InputError
from minipeft.lab.memory.shapes import GPT2, LINEARS, READS, Architecture

SCALED = ("k_proj", "v_proj", "down_proj")
ENDS = ("o_proj", "down_proj", "attn.c_proj", "mlp.c_proj")


class Target(NamedTuple):
    """One linear layer of a block, by its last name, and the rank beside it."""

    name: str
    out_features: int
    in_features: int
    r: int


class Kept(NamedTuple):
    """What autograd keeps for one adapted layer.

    Attributes:
        reads: whether the layer's input stays; layers that read one stream share it.
        stream: values a token besides, in the dtype of the activations.
        adapter: values a token besides, in float32.
        fixed: values besides, in float32, whatever the number of tokens.
    """

    reads: bool = False
    stream: int = 0
    adapter: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class Row:
    """A method of the kind that changes a linear layer.

    Attributes:
        trained: parameters of one target.
        kept: of one target, by the bytes of an activation.
        places: where it stands; None: on every linear layer.
        frozen: float32 numbers that one target keeps besides the base.
    """

    trained: Callable[[Target], int]
    kept: Callable[[Target, int], Kept]
    places: tuple[str, ...] | None = None
    frozen: Callable[[Target], int] = lambda _: 0


def _thin(t: Target) -> int:
    return t.r * (t.in_features + t.out_features)


def _lora(t: Target, e: int) -> Kept:
    return Kept(reads=True, adapter=t.r)


def _dora(t: Target, e: int) -> Kept:
    # The output, where nothing else keeps it: attention keeps the values alone, the
    # gate and its partner are factors. Norm and gain, of each row.
    kept_anyway = ("v_proj", "gate_proj", "up_proj")
    output = 0 if t.name in kept_anyway else t.out_features
    return Kept(reads=True, stream=output, adapter=t.r, fixed=2 * t.out_features)


def _hira(t: Target, e: int) -> Kept:
    # The update, and over a base of 16 bits the weight in float32 too.
    matrices = 1 if e == 4 else 2
    return Kept(reads=True, fixed=matrices * t.out_features * t.in_features)


def _vera(t: Target, e: int) -> Kept:
    return Kept(adapter=t.r + t.out_features)


def _ia3(t: Target, e: int) -> Kept:
    scaled = t.in_features if t.name.endswith("down_proj") else t.out_features
    return Kept(stream=scaled)


def _miss(t: Target, e: int) -> Kept:
    return Kept(adapter=t.r, fixed=t.r * t.in_features)


def _bottleneck(t: Target, e: int) -> Kept:
    return Kept(adapter=t.out_features + t.r)


ROWS: Mapping[str, Row] = {
    "lora": Row(_thin, _lora),
    "rslora": Row(_thin, _lora),
    "pissa": Row(_thin, _lora, frozen=_thin),
    "loftq": Row(_thin, _lora),
    "dora": Row(lambda t: _thin(t) + t.out_features, _dora),
    "hira": Row(_thin, _hira),
    "miss": Row(lambda t: t.r * t.out_features, _miss),
    "vera": Row(lambda t: t.r + t.out_features, _vera),
    "ia3": Row(
        lambda t: t.in_features if t.name.endswith("down_proj") else t.out_features,
        _ia3,
        SCALED,
    ),
    "bottleneck": Row(
        lambda t: 2 * t.r * t.out_features + t.r + t.out_features, _bottleneck, ENDS
    ),
}
"""The methods that stand on linear layers, by the names of the map; QLoRA is LoRA."""

VIRTUAL = ("prefix", "prompt")
"""The methods of virtual tokens; their r is the number of these."""

RANKED = ("lora", "rslora", "pissa", "loftq", "dora", "hira")
"""The methods whose update has no higher rank than the layer."""

METHODS = ("full", *ROWS, *VIRTUAL)
EXPERTS = {"experts", "gate_up_proj", "w1", "w2", "w3"}
"""What configurations and files call the experts of a block, and their stacks."""


@dataclass(frozen=True)
class Adapter:
    """Which method, of which rank, on which linear layers of every block.

    Attributes:
        r: the rank; of a bottleneck its width, of virtual tokens their number.
        targets: last parts of names; None: where the method stands by default.
        method: one of `METHODS`, but `full`.
        experts: whether LoRA stands on every expert too.
    """

    r: int
    targets: Collection[str] | None = None
    method: str = "lora"
    experts: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS[1:]:
            raise InputError(
                f"there is no method {self.method!r}; choose from {', '.join(METHODS)}"
            )
        known = (*LINEARS, *GPT2)
        wanted = known if self.targets is None else self.targets
        if {*wanted} & EXPERTS:
            raise InputError(
                f"targets are {[*wanted]}, and experts are no linear layer; leave them "
                "out, and put LoRA on every expert by adapt_experts (--adapt-experts)"
            )
        if not wanted or set(wanted) - set(known):
            raise InputError(
                f"targets are {[*wanted]}; choose from {', '.join(LINEARS)}, or in "
                f"GPT-2 from {', '.join(GPT2)}"
            )
        if self.r < 1:
            raise InputError(f"the rank is {self.r}; it must be at least 1")
        if self.experts and self.method not in ("lora", "rslora"):
            raise InputError(f"{self.method} does not adapt experts; choose lora")

    def names(self, model: Architecture) -> tuple[str, ...]:
        """Return the adapted linear layers of a block.

        Raises:
            InputError: the model has no such layers.
        """
        if self.method in VIRTUAL:
            return ()
        places = self.targets or ROWS[self.method].places or tuple(model.linears)
        found = tuple(name for name in model.linears if name in places)
        if self.targets and set(self.targets) - set(found):
            raise InputError(
                f"targets are {[*self.targets]}; this model has "
                f"{', '.join(model.linears)}"
            )
        return found or tuple(model.linears)

    def check(self, model: Architecture) -> None:
        """Refuse what does not fit a model.

        Raises:
            InputError: a target stands nowhere in it, a rank is above that of a layer,
                or it has no experts to adapt.
        """
        if self.experts and model.experts is None:
            raise InputError(
                "this model has no experts to adapt; leave adapt_experts "
                "(--adapt-experts) out"
            )
        placed = model.placed(self.names(model))
        for name in self.targets or ():
            if not {name, f"shared_expert.{name}"} & set(placed):
                raise InputError(
                    f"the target {name} stands only inside experts here, where it "
                    "matches nothing; leave it out, or choose adapt_experts "
                    "(--adapt-experts) for them"
                )
        for name, (_, o, i) in placed.items():
            if self.method in RANKED and self.r > min(o, i):
                raise InputError(
                    f"the rank is {self.r}; choose 1 to {min(o, i)} for {name} of "
                    f"shape ({o}, {i})"
                )

    def reads(self, model: Architecture, stream: str) -> bool:
        """Tell whether an adapted layer of a block keeps this stream."""
        if self.method in VIRTUAL:
            return False
        kept = ROWS[self.method].kept(Target("", 1, 1, self.r), 4)
        return kept.reads and stream in {READS[name] for name in self.names(model)}

    def targets_of(self, model: Architecture) -> list[tuple[int, Target]]:
        """Return how often each adapted layer stands in the model, and the layer."""
        places = model.placed(self.names(model))
        return [(n, Target(name, o, i, self.r)) for name, (n, o, i) in places.items()]


def adapter_parameters(model: Architecture, adapter: Adapter) -> int:
    r"""Return what a method trains: the sum over its targets, or its virtual tokens.

    For a layer of shape (d_out, d_in), LoRA and its kin train r (d_in + d_out); DoRA
    d_out besides; HiRA as LoRA; MiSS r d_out; VeRA r + d_out; IA3 d_out, or d_in of the
    feed-forward's last layer; a bottleneck of width m 2 m d + m + d. A prompt trains
    n d, a prefix 2 n d_kv in each layer. On E experts LoRA trains E times an expert's,
    where gate and up are one matrix.
    """
    if adapter.method == "prompt":
        return adapter.r * model.width
    if adapter.method == "prefix":
        return 2 * adapter.r * model.layers * model.key_value_heads * model.head
    row = ROWS[adapter.method]
    trained = sum(often * row.trained(t) for often, t in adapter.targets_of(model))
    if adapter.experts and model.experts:
        wide, d = model.experts.width, model.width
        one = adapter.r * ((2 * wide + d) + (d + wide))
        trained += model.experts.layers * model.experts.count * one
    return trained


def frozen_values(model: Architecture, adapter: Adapter) -> int:
    """Return float32 numbers that a method keeps without training them.

    PiSSA keeps its start; VeRA one pair of matrices, as large as the largest layer.
    """
    if adapter.method in VIRTUAL:
        return 0
    targets = [target for _, target in adapter.targets_of(model)]
    if adapter.method == "vera":
        wide = max(t.in_features for t in targets)
        return adapter.r * (wide + max(t.out_features for t in targets))
    frozen = ROWS[adapter.method].frozen
    return sum(often * frozen(t) for often, t in adapter.targets_of(model))


def kept_by(
    model: Architecture, adapter: Adapter, bytes_per_value: int
) -> tuple[int, int]:
    """Return the bytes that a block keeps for its adapters: a token, and besides.

    Args:
        model: the sizes.
        adapter: the method.
        bytes_per_value: of the activations.
    """
    if adapter.method in VIRTUAL:
        return 0, 0
    widths = {
        "attention input": model.width,
        "attention result": 0,  # attention keeps it anyway
        "feed-forward input": model.width,
        "feed-forward product": model.feedforward,
    }
    kept, streams = ROWS[adapter.method].kept, set()
    token = fixed = 0
    for name in adapter.names(model):
        one = kept(Target(name, *model.linears[name], adapter.r), bytes_per_value)
        streams |= {READS[name]} if one.reads else set()
        token += bytes_per_value * one.stream + 4 * one.adapter
        fixed += 4 * one.fixed
    return token + bytes_per_value * sum(widths[s] for s in streams), fixed
