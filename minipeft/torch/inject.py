"""Adapt the layers of a whole model: any `nn.Module`, nested as it likes.

    inject(model, LoRAConfig(r=8, alpha=16), ["q_proj", "v_proj"])
    optimizer = AdamW(trainable_parameters(model))
    ...
    unload(merge(model))

Models are changed in place and returned. A function that raises an error raises it
before it changes anything.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from numbers import Real
from typing import Any, ClassVar, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.torch import loading, saving
from minipeft.torch.adapted import (
    Adapted,
    check_no_hooks,
    check_plain,
    freeze_all_but_adapters,
    naming,
    training_as_before,
)
from minipeft.torch.experts import experts
from minipeft.torch.linear import Stacked, weight_view
from minipeft.torch.operands import (
    check_generator,
    check_has_values,
    check_in_memory,
    check_trains_in_memory,
    has_values,
)
from minipeft.torch.targets import (
    ALL_LINEAR,
    check_inside,
    outside_adapters,
    replace,
)
from minipeft.torch.targets import layers as layers_of
from minipeft.values import check_kind, check_number

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
REMEDY = (
    "the model holds adapters, under names that from_pretrained does not know; save "
    "adapter_state_dict(model), write peft's files with "
    "minipeft.interop.peft_model.save, or call unload(merge(model)) first."
)
Layer = Adapted[Any]

CONSTANTS = ("scaling", "side")
"""Attributes of adapters that are no tensors but change the output."""


@runtime_checkable
class Config(Protocol):
    """What a method gives to `inject`: the class of its layers, and new adapters."""

    wrapper: ClassVar[type[Layer]]

    def adapters(
        self, layers: Mapping[str, nn.Module], generator: torch.Generator | None = None
    ) -> Mapping[str, nn.Module]:
        """Return a new adapter for each layer; in some methods layers share tensors."""


def inject(
    model: Model,
    config: Config,
    targets: Sequence[str] | str,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> Model:
    """Freeze the model and wrap the target layers with new adapters, which are trained.

    Args:
        model: changed in place.
        config: the method and its hyperparameters, such as `LoRAConfig(r=8, alpha=16)`.
        targets: full names, last parts of names, patterns with `*`, `?`, `[]`, or
            `"all-linear"`: every linear layer except output heads and routers; where
            this leaves experts as they are, a logged warning counts them.
        name: of the new adapters.
        generator: for their random start, on the CPU; None for torch's own.

    Raises:
        InputError: if a target matches nothing, or a layer that cannot be adapted, is
            adapted already, shares its weight with another, or holds NaN; if `config`
            does not fit a layer.
    """
    _check_start(config, name, generator)
    found = layers_of(model, targets)
    for key, layer in found.items():
        with naming(key):
            _check_offered(config, layer)
    check_places(model, found)
    for key, layer in found.items():
        with naming(key):
            _check_no_nan(layer)
    with torch.inference_mode(False):
        adapters = config.adapters(found, generator)
    wrapped = {}
    with training_as_before(model):
        for key, layer in found.items():
            with naming(key):
                wrapped[key] = _wrapper(config, layer)(layer, adapters[key], name)
    freeze(model)
    left = _experts_left(model, targets, found)
    replace(model, {id(found[n]): wrapped[n] for n in found})
    if left:
        logger.warning(left)
    return model


def add(
    model: Model,
    config: Config,
    name: str,
    generator: torch.Generator | None = None,
) -> Model:
    """Give every adapted layer another adapter, inactive until `activate`.

    Raises:
        InputError: if the name is taken, or the layers are of another method.
    """
    _check_start(config, name, generator)
    layers = adapted(model)
    for key, layer in layers.items():
        if type(layer) is not _wrapper(config, layer.base):
            raise InputError(
                f"{key} is a {type(layer).__name__}, which cannot hold adapters for "
                f"{config.wrapper.__name__}; unload the model and inject again."
            )
        with naming(key):
            layer.check_new(name)
    bases = {key: layer.base for key, layer in layers.items()}
    check_places(model, bases)
    with torch.inference_mode(False):
        adapters = config.adapters(bases, generator)
    try:
        for key, adapter in adapters.items():
            with naming(key):
                layers[key].add(name, adapter)
    except InputError:
        for layer in layers.values():
            if name in layer.adapters:
                del layer.adapters[name]
        raise
    return model


def activate(model: Model, shares: str | Mapping[str, float]) -> Model:
    """Use one adapter by name, or the sum of several, each times its share.

    A layer that holds none of the named adapters computes its base alone. An empty
    mapping makes every layer compute its base alone.

    Raises:
        InputError: for a name that no layer holds; if a merged layer cannot be merged
            with these shares. No layer changes then.
    """
    check_kind("shares", shares, str, Mapping)
    wanted = {shares: 1.0} if isinstance(shares, str) else shares
    layers = adapted(model)
    _check_known(layers, wanted)
    for name, share in wanted.items():
        check_number(f"the share of {name!r} in shares", share)
    before = {key: layer.active for key, layer in layers.items()}
    try:
        for key, layer in layers.items():
            with naming(key):
                layer.activate({n: s for n, s in wanted.items() if n in layer.adapters})
    except InputError:
        for key, layer in layers.items():
            layer.activate(before[key])
        raise
    return model


def remove(model: Model, name: str) -> Model:
    """Remove an adapter; a layer that had no other becomes the plain layer again.

    Raises:
        InputError: if no layer holds an adapter of this name; if a layer that would
            become plain has hooks of its own.
    """
    layers = adapted(model)
    _check_known(layers, [name])
    for key, layer in layers.items():
        with naming(key):
            if list(layer.adapters) == [name]:
                check_no_hooks(layer)
    for layer in layers.values():
        if name in layer.adapters:
            layer.remove(name)
    bare = [layer for layer in layers.values() if not layer.adapters]
    replace(model, {id(layer): layer.unmerge().unload() for layer in bare})
    _allow_saving(model)
    return model


def merge(model: Model) -> Model:
    """Merge the active adapters of every layer; the layers keep the base weights.

    Raises:
        InputError: if one of them cannot be merged; none is then. If no layer of the
            model is adapted.
    """
    layers = adapted(model)
    if not layers:
        raise InputError(
            "the model has no adapters to merge; inject or load one first."
        )
    done: list[Layer] = []
    try:
        for key, layer in layers.items():
            before = layer.merged_weight
            with naming(key):
                layer.merge()
            if before is None:
                done.append(layer)
    except InputError:
        for layer in done:
            layer.unmerge()
        raise
    return model


def unmerge(model: Model) -> Model:
    """Undo `merge`: every weight is what it was, bit for bit."""
    for layer in adapted(model).values():
        layer.unmerge()
    return model


def unload(model: Model) -> Model:
    """Put plain layers back: merged ones after `merge`, else the original layers.

    The weights stay frozen; `model.requires_grad_(True)` makes them trainable again.

    Raises:
        InputError: if hooks or a forward were set on an adapted layer, for a base keeps
            its own; if a merged layer is offloaded or sharded. No layer changes then.
    """
    layers = adapted(model)
    check_inside(model, {id(layer) for layer in layers.values()})
    for key, layer in layers.items():
        with naming(key):
            check_no_hooks(layer)
            check_plain(layer)
    replace(model, {id(layer): layer.unload() for layer in layers.values()})
    _allow_saving(model)
    return model


def adapted(model: nn.Module) -> dict[str, Layer]:
    """Return the adapted layers by name."""
    check_kind("model", model, nn.Module)
    return {n: m for n, m in model.named_modules() if isinstance(m, Adapted)}


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, nn.Module]:
    """Return one adapter by the names of the layers that hold a part of it.

    Raises:
        InputError: if no layer holds an adapter of this name.
    """
    layers = adapted(model)
    _check_known(layers, [name])
    return {k: m.adapters[name] for k, m in layers.items() if name in m.adapters}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, as an optimizer takes them.

    Raises:
        InputError: if one of them is offloaded: an optimizer would change nothing.
    """
    check_kind("model", model, nn.Module)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    check_trains_in_memory(model, trained)
    return list(trained.values())


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of one adapter, as `<layer>.<tensor>`; the base is left out.

    Raises:
        InputError: if no layer holds an adapter of this name; if one of its tensors is
            offloaded, or on the device meta.
    """
    tensors = _tensors(model, name)
    check_has_values(tensors)
    return {key: tensor.detach() for key, tensor in tensors.items()}


def constants(model: nn.Module, name: str = "default") -> dict[str, float | str]:
    """Return the constants of an adapter: numbers that no tensor of the adapter holds.

    `<layer>.scaling` contains alpha and the choice of rsLoRA, and is
    `<layer>.<stack>.scaling` for experts; `<layer>.side` belongs to IA3. Save the
    constants together with `adapter_state_dict`.

    Raises:
        InputError: if no layer holds an adapter of this name.
    """
    layers = adapted(model)
    _check_known(layers, [name])
    return {
        ".".join(filter(None, (key, place, constant))): getattr(part, constant)
        for key, layer in layers.items()
        if name in layer.adapters
        for place, part in layer.adapters[name].named_modules()
        for constant in CONSTANTS
        if hasattr(part, constant)
    }


def load_adapter_state_dict(
    model: Model,
    tensors: Mapping[str, Tensor],
    name: str = "default",
    saved: Mapping[str, float | str] | None = None,
) -> Model:
    """Copy saved tensors into an adapter: all of them, or none.

    Args:
        model: with an adapter of the same configuration.
        tensors: what `adapter_state_dict` returned.
        name: of the adapter.
        saved: what `constants` returned at saving; None: constants are not compared.

    Raises:
        InputError: if a tensor is missing, unexpected, of another shape or kind of
            dtype, or not finite; if a constant differs; if a merged layer cannot be
            merged with them.
    """
    check_kind("tensors", tensors, Mapping)
    check_kind("saved", saved, Mapping, type(None))
    own = _tensors(model, name)
    problems = _odd_shapes(tensors, own) + _odd_values(tensors, own)
    problems += _other_constants({} if saved is None else saved, constants(model, name))
    if problems:
        raise InputError(
            f"the file does not fit adapter {name!r}: {problems[0]}"
            + (f", and {len(problems) - 1} more" * (len(problems) > 1))
            + "; inject with the configuration it was saved from."
        )
    _check_takes(tensors, own)
    layers = {k: m for k, m in adapted(model).items() if name in m.adapters}
    parts = {key: _part(layer, key, name, tensors) for key, layer in layers.items()}
    for key, layer in layers.items():
        loaded = {f"adapters.{name}.{k}": tensor for k, tensor in parts[key].items()}
        with naming(key):
            layer.check_load(loaded, "", assign=False)
    for key, layer in layers.items():
        layer.adapters[name].load_state_dict(parts[key])
        if layer.merged_weight is not None:
            layer.merge()
    return model


def _part(
    layer: Layer, key: str, name: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    prefix = f"{key}." if key else ""
    return {k: tensors[prefix + k] for k in layer.adapters[name].state_dict()}


def _wrapper(config: Config, layer: nn.Module) -> type[Layer]:
    """Return the class that wraps a layer; experts have a class of their own."""
    if isinstance(weight_view(layer), Stacked):
        stacked: type[Layer] = getattr(config, "stacked", config.wrapper)
        return stacked
    return config.wrapper


def _check_start(config: Config, name: str, generator: torch.Generator | None) -> None:
    if isinstance(config, type):
        name = config.__name__
        raise InputError(f"config is the class {name}; give one, such as {name}(...).")
    check_kind("config", config, Config)
    check_kind("name", name, str)
    check_generator(generator)


def _experts_left(
    model: nn.Module, targets: Sequence[str] | str, found: Mapping[str, nn.Module]
) -> str:
    """Return what "all-linear" leaves of a model of experts, and how to adapt it."""
    if ALL_LINEAR not in ([targets] if isinstance(targets, str) else targets):
        return ""
    outside, sizes = dict(outside_adapters(model)), {}
    for name, module in experts(model).items():
        if name in outside and name not in found:
            view = cast(Stacked, weight_view(module))
            stacks = [view.one(module, one) for one in view.names(module)]
            sizes[name] = sum(n * prod(form.shape) for n, form in stacks)
    if not sizes:
        return ""
    last = sorted({name.rpartition(".")[2] for name in sizes})
    return (
        f"{ALL_LINEAR!r} leaves experts as they are, {sum(sizes.values())} weights "
        f"(modules: {len(sizes)}, the first: {next(iter(sizes))}); to adapt them too, "
        f"give LoRAConfig and the targets {[ALL_LINEAR, *last]}"
    )


def _check_offered(config: Config, layer: nn.Module) -> None:
    view = weight_view(layer)
    if isinstance(view, Stacked) and not hasattr(config, "stacked"):
        view.form(layer)  # raises: the module has several matrices


def check_places(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse to adapt layers that are offloaded, or a model that is distributed."""
    check_in_memory(model, _places(layers))


def _places(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.device]]:
    for name, layer in layers.items():
        view = weight_view(layer)
        if isinstance(view, Stacked):
            held = next(chain(layer.parameters(), layer.buffers()))
            yield name, held.device
        else:
            yield name, view.form(layer).device


def _check_no_nan(layer: nn.Module) -> None:
    # Infinite values may be meant: a bias that rules out a token.
    for name, held in (*layer.named_parameters(), *layer.named_buffers()):
        floats = held.is_floating_point() and held.dtype.itemsize > 1
        if not floats or not held.numel() or not has_values(held):
            continue
        if held.detach().amin().isnan():  # a minimum is NaN where one value is
            raise InputError(f"the {name} holds NaN; load it again or repair it first.")


def _allow_saving(model: nn.Module) -> None:
    loading.unwatch(model)
    if not adapted(model):
        saving.allow(model, REMEDY)


def freeze(model: nn.Module) -> None:
    """Train only adapters; refuse `save_pretrained`, which would lose them."""
    saving.refuse(model, REMEDY)
    loading.watch(model)
    freeze_all_but_adapters(model)


def _odd_shapes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    for key in own.keys() & tensors.keys():
        check_kind(f"{key} of the tensors", tensors[key], Tensor)
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is unexpected" for key in tensors if key not in own]
    return problems + [
        f"{key} has shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]


def _odd_values(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for key in (key for key in own if key in tensors):
        if tensors[key].is_meta and not own[key].is_meta:
            problems.append(f"{key} is on the device meta and has no values")
        elif wrong := loading.odd(tensors[key], own[key]):
            problems.append(f"{key} {wrong}")
    return problems


def _check_takes(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    check_has_values(own)  # a copy to a placeholder would be lost
    for key, held in own.items():
        if hasattr(held, "placements") and not hasattr(tensors[key], "placements"):
            raise InputError(
                f"{key} of the model is sharded, and the one to load is whole; load "
                "it before the model is sharded, or by set_model_state_dict of "
                "torch.distributed.checkpoint.state_dict, with full_state_dict."
            )


def _other_constants(
    saved: Mapping[str, float | str], own: Mapping[str, float | str]
) -> list[str]:
    for key, constant in saved.items():
        check_kind(f"{key} of saved", constant, Real, str)
    keys = [key for key in {**own, **saved} if saved and saved.get(key) != own.get(key)]
    return [f"{key} is {saved.get(key)}, not {own.get(key)}" for key in keys]


def _check_known(layers: Mapping[str, Layer], names: Iterable[str]) -> None:
    known = sorted({n for layer in layers.values() for n in layer.adapters})
    for name in names:
        check_kind("the name of an adapter", name, str)
        if name not in known:
            choice = (
                f"choose from {', '.join(known)}"
                if known
                else "the model has no adapters: inject or load one first"
            )
            raise InputError(f"no layer holds an adapter {name!r}; {choice}.")


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    layers = adapted(model)
    _check_known(layers, [name])
    return {
        f"{key}.{tensor_name}".lstrip("."): tensor
        for key, layer in layers.items()
        if name in layer.adapters
        for tensor_name, tensor in layer.adapters[name].state_dict().items()
    }
