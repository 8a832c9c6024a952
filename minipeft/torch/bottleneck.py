"""Bottleneck adapters: a small two-layer network beside or behind a frozen layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from minipeft.errors import InputError
from minipeft.shapes import Float
from minipeft.torch import loading, saving
from minipeft.torch.adapted import Adapted, freeze_all_but_adapters, naming
from minipeft.torch.linear import (
    Form,
    Output,
    Product,
    Weight,
    check_shape,
    rows_of,
    weight_view,
)
from minipeft.torch.operands import (
    check_generator,
    check_in_memory,
    check_tensors,
)
from minipeft.torch.targets import check_names, chosen, replace
from minipeft.values import check_integer, check_kind, check_number

Model = TypeVar("Model", bound=nn.Module)
REMEDY = (
    "the model holds adapters beside its modules, which from_pretrained does not know; "
    "save model.state_dict()."
)

Stream = Float[Tensor, "... features"]
Down = Float[Tensor, "bottleneck features"]
DownBias = Float[Tensor, " bottleneck"]
Up = Float[Tensor, "features bottleneck"]
UpBias = Float[Tensor, " features"]


class Bottleneck(nn.Module):
    """A projection to few features, a ReLU, and a projection back."""

    down: Down
    up: Up
    down_bias: DownBias
    up_bias: UpBias

    def __init__(
        self,
        down: Down,
        up: Up,
        scaling: float = 1.0,
        down_bias: DownBias | None = None,
        up_bias: UpBias | None = None,
    ):
        super().__init__()
        check_number("scaling", scaling)
        check_tensors(
            {
                "down": (down, "bottleneck features"),
                "down_bias": (down_bias, "? bottleneck"),
                "up": (up, "features bottleneck"),
                "up_bias": (up_bias, "? features"),
            }
        )
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        zeros = down.new_zeros(len(down)) if down_bias is None else down_bias
        self.down_bias = nn.Parameter(zeros)
        self.up_bias = nn.Parameter(
            up.new_zeros(len(up)) if up_bias is None else up_bias
        )
        self.scaling = scaling

    def forward(self, x: Stream) -> Stream:
        r"""Return the change of the output: $s\,(\mathrm{ReLU}(x D^T + c)\,U^T + e)$.

        The result has the dtype of the adapter, for every dtype of x.

        Raises:
            InputError: if an operand has another adapter's shape, or no float dtype.
        """
        self.check_fits(x)
        h = relu(linear(x.to(self.down.dtype), self.down, self.down_bias))
        return self.scaling * linear(h, self.up, self.up_bias)

    def check_fits(self, x: Stream | None = None) -> None:
        """Refuse an input or a part of another adapter; torch would broadcast it."""
        check_tensors(
            {
                "down": (self.down, "bottleneck features"),
                "down_bias": (self.down_bias, "bottleneck"),
                "up": (self.up, "features bottleneck"),
                "up_bias": (self.up_bias, "features"),
                "x": (x, "? ... features"),
            }
        )


@torch.inference_mode(False)  # parameters made in inference mode cannot be trained
def init(
    generator: torch.Generator | None,
    features: int,
    bottleneck: int,
    scaling: float = 1.0,
) -> Bottleneck:
    """Start without a change of the output, in float32 on the CPU.

    Torch's default dtype and device have no effect.

    Raises:
        InputError: if the bottleneck is empty, or the scaling not finite.
    """
    check_generator(generator)
    check_integer("features", features, 0)
    check_integer("bottleneck", bottleneck, 1)
    down = torch.empty(bottleneck, features, dtype=torch.float32, device="cpu")
    down.normal_(0, 0.02, generator=generator)
    up = torch.zeros(features, bottleneck, dtype=torch.float32, device="cpu")
    return Bottleneck(down, up, scaling)


class Serial(Adapted[Bottleneck]):
    """A frozen layer with adapters behind it: h + f(h), where h is the layer's output.

    The last part of a sublayer is a linear layer, so an adapter behind that layer is an
    adapter behind the sublayer.
    """

    @staticmethod
    def check_fits(form: Form, adapter: Bottleneck) -> None:
        """Refuse a network of another width."""
        check_kind("adapter", adapter, Bottleneck)
        bottleneck = rows_of(adapter.down)
        check_shape("down", adapter.down, bottleneck, form.out_features)
        check_shape("up", adapter.up, form.out_features, bottleneck)
        check_shape("down_bias", adapter.down_bias, bottleneck)
        check_shape("up_bias", adapter.up_bias, form.out_features)

    def adapt(self, product: Product) -> Output:
        """Return h plus the output of each adapter times its share."""
        h = total = product.y
        for share, adapter in self.shares():
            total = total + share * adapter(h)
        return total.to(h.dtype)

    def change(self, adapter: Bottleneck, W: Weight) -> Weight:
        """Refuse: no change of the weight has the effect of this adapter.

        Raises:
            InputError: always; the message gives the reason.
        """
        raise InputError(
            "a bottleneck adapter bends at its ReLU, and no weight matrix does that: "
            "there is nothing to merge; keep the adapter, at the cost of its latency."
        )

    def _effective(self, held: Any) -> Any:
        raise InputError(
            "the model reads the weight of this layer and does not call the layer, so "
            "a bottleneck behind it would have no effect; leave it out of the targets."
        )


@dataclass(frozen=True)
class BottleneckConfig:
    """Serial adapters: Houlsby's behind both sublayers, Pfeiffer's behind one.

    The targets select the variant: in a Llama `["o_proj", "down_proj"]` gives Houlsby's
    and `["down_proj"]` Pfeiffer's.
    """

    bottleneck: int
    scaling: float = 1.0

    wrapper: ClassVar[type[Adapted[Bottleneck]]] = Serial

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> dict[str, Bottleneck]:
        """Return a new adapter for each layer, on the device of the layer.

        Raises:
            InputError: if the bottleneck is empty.
        """
        adapters = {}
        for name, layer in layers.items():
            form = weight_view(layer).form(layer)
            with naming(name):
                adapter = init(
                    generator, form.out_features, self.bottleneck, self.scaling
                )
            adapters[name] = adapter.to(form.device, form.wide)
        return adapters


class Parallel(nn.Module):
    """A frozen sublayer and an adapter: both read x, and their outputs are added.

    The adapter reads the input of the module. In a model that normalizes before each
    sublayer, the adapter reads the normalized x.

    Source: He et al. (arXiv:2110.04366), section 3.3.
    """

    def __init__(self, base: nn.Module, adapter: Bottleneck):
        super().__init__()
        check_kind("base", base, nn.Module)
        check_kind("adapter", adapter, Bottleneck)
        adapter.check_fits()
        freeze_all_but_adapters(base)
        self.base = base
        self.adapter = adapter
        loading.watch(self)
        self.train(base.training)

    def forward(self, x: Stream) -> Stream:
        """Return the output of the sublayer plus the output of the adapter.

        Raises:
            InputError: if the two outputs have different widths.
        """
        h, change = self.base(x), self.adapter(x)
        if h.shape != change.shape:
            raise InputError(
                f"the sublayer returns shape {tuple(h.shape)}, and the adapter beside "
                f"it {tuple(change.shape)}; place it beside a module that reads and "
                "writes one width."
            )
        return cast(Tensor, (h + change).to(h.dtype))

    def own_parameters(self) -> list[nn.Parameter]:
        """Return what is trained here."""
        return list(self.adapter.parameters())

    def check_load(self, state: Mapping[str, Any], prefix: str, assign: bool) -> None:
        """Refuse tensors of the adapter that are not finite.

        Args:
            state: of `load_state_dict`.
            prefix: of the module's names in the state.
            assign: whether the tensors replace those of the layer.
        """
        at = f"{prefix}adapter."
        loading.check_values(self.adapter, state, at, assign=assign)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the sublayer; refuse its weights, without f."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_") or name in base._parameters:
                raise
            return getattr(base, name)


@torch.inference_mode(False)
def place_beside(
    model: Model,
    config: BottleneckConfig,
    targets: Sequence[str],
    features: int,
    generator: torch.Generator | None = None,
) -> Model:
    """Freeze the model and put a trained adapter beside each target module.

    Args:
        model: changed in place.
        config: of the adapters.
        targets: full names, last parts of names, such as `["mlp"]`, or patterns.
        features: width of the inputs and outputs of the modules.
        generator: for the random start; None for torch's own.

    Raises:
        InputError: if a target matches nothing, or a matched module has an adapter.
    """
    check_kind("model", model, nn.Module)
    check_kind("config", config, BottleneckConfig)
    check_names("targets", targets)
    modules = {name: module for name, module in model.named_modules() if name}
    found = {name: modules[name] for name in chosen(modules, targets)}
    tensors = ((name, next(one.parameters(), None)) for name, one in found.items())
    check_in_memory(model, ((n, p.device) for n, p in tensors if p is not None))
    adapters = {}
    for name, module in found.items():
        with naming(name):
            if isinstance(module, Parallel):
                raise InputError("has an adapter beside it already; choose another.")
            adapter = init(generator, features, config.bottleneck, config.scaling)
        adapters[name] = _where_it_lives(adapter, module)
    beside = {id(found[name]): Parallel(found[name], adapters[name]) for name in found}
    replace(model, beside)
    freeze_all_but_adapters(model)
    saving.refuse(model, REMEDY)
    loading.watch(model)
    return model


def _where_it_lives(adapter: Bottleneck, module: nn.Module) -> Bottleneck:
    for parameter in module.parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        return adapter.to(parameter.device, wide)
    return adapter
