"""Load adapters in peft's format onto a model, and save them.

load(model, Path("adapter"))
save(model, Path("trained"))
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError, OtherBaseError
from minipeft.interop import made as making
from minipeft.interop import peft_folder, peft_virtual, peft_write
from minipeft.interop.made import Made
from minipeft.interop.peft_experts import targeted
from minipeft.interop.peft_folder import PREFIX, Contents
from minipeft.interop.peft_read import adapters, split
from minipeft.interop.peft_settings import HEADS, check_config
from minipeft.interop.peft_write import Written
from minipeft.interop.spelling import counterpart
from minipeft.torch import inject, targets
from minipeft.torch.adapted import naming
from minipeft.torch.experts import LoRAExperts
from minipeft.torch.virtual import VirtualTokens

WHOLE = ".modules_to_save."
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""peft's names of tasks, by the ends of the names of transformers' classes."""


def warn(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr)


def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    allow_base_mismatch: bool = False,
    say: Callable[[str], None] = warn,
) -> nn.Module:
    """Load the adapter of a folder onto a model: all of it, or nothing.

    Layers are wrapped in place. Modules that the file contains as a whole replace the
    model's values and are trainable. For a soft prompt or a prefix the result is a
    `PromptModel` or `PrefixModel` around the model.

    Args:
        model: as it was before training, or with an adapter on the same layers.
        folder: in peft's format.
        name: of the new adapter.
        allow_base_mismatch: do not compare the model with the base of the file.
        say: is called with a line about the base.

    Raises:
        InputError: the files are damaged, were made for another base, do not fit the
            model, or need an adapter that minipeft does not have.
    """
    contents = peft_folder.read(folder)
    if contents.config.get("peft_type") in peft_virtual.KINDS:
        _check_base(contents, model, (), allow_base_mismatch, say)
        return peft_virtual.load(contents, model)
    check_config(contents.config)
    parts, others = split(contents)
    own = _unwrapped(model)
    places = {key: _place(key, own) for key in parts}
    brought = _brought(contents.config, others, model)
    layers = {key: own[place] for key, place in places.items()}
    with _naming_shapes(contents, parts, layers):
        _check_base(contents, model, brought, allow_base_mismatch, say)
    _check_complete(contents.config, own, set(places.values()))
    built = adapters(contents, parts, layers)
    _attach(model, {places[key]: pair for key, pair in built.items()}, name)
    with torch.no_grad():
        own_tensors = making.base_tensors(model)
        for key, values in brought.items():
            own_tensors[key].copy_(values)
            if own_tensors[key].is_floating_point():
                own_tensors[key].requires_grad_(True)
    return model


def save(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    made: Made | None = None,
) -> None:
    """Write one adapter of a model as a new folder in peft's format.

    The folder appears complete, or not at all. PiSSA becomes plain LoRA of rank 2r.
    Modules that are trained beside the adapter are saved as a whole.

    Args:
        model: with adapters, or behind virtual tokens.
        folder: a new one.
        name: of the adapter.
        made: what only the caller knows of the training.

    Raises:
        InputError: the folder exists, peft has no format for the adapter, or for
            adapters behind virtual tokens, or a number is not finite.
    """
    peft_folder.write(folder, contents_of(model, name, made))


def contents_of(
    model: nn.Module, name: str = "default", made: Made | None = None
) -> Contents:
    """Return the contents of the two files of one adapter.

    Raises:
        InputError: peft has no format for the adapter.
    """
    made = made or Made()
    peft_virtual.check_one_kind(model)
    if isinstance(model, VirtualTokens):
        check_all_frozen(model.model)
        return contents_with(peft_virtual.written(model), model.model, {}, made)
    inject.adapter_state_dict(model, name)  # raises if no layer has this name
    layers = inject.adapted(model)
    mine = {key: layer for key, layer in layers.items() if name in layer.adapters}
    result = peft_write.written(mine, name)
    rows = result.config.get("trainable_token_indices", {})
    stacks = result.config.get("target_parameters")
    chosen = [
        key
        for key, layer in mine.items()
        if key not in rows and not isinstance(layer, LoRAExperts)
    ]
    result.config["target_modules"] = target_modules(chosen, model)
    if stacks:
        result.config["target_parameters"] = target_parameters(stacks, model)
    return contents_with(result, model, trained_beside(model), made)


def contents_with(
    result: Written, base: nn.Module, trained: Mapping[str, Tensor], made: Made
) -> Contents:
    """Return the contents of the two files, with the metadata of their origin.

    Args:
        result: settings and tensors of the method.
        base: the model, adapted or not.
        trained: tensors beside the adapters.
        made: what only the caller knows of the training.
    """
    config = {
        "base_model_name_or_path": _path_of(base),
        "task_type": _task_of(base, {_module(key) for key in trained}),
        "inference_mode": True,
        "modules_to_save": sorted({_module(key) for key in trained}) or None,
        **result.config,
    }
    own = making.of_base(base, trained)
    facts = making.metadata(own, config["peft_type"], result.constants, made)
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in trained.items()}
    tensors |= result.tensors
    return Contents(config, {k: t.detach().cpu() for k, t in tensors.items()}, facts)


def _check_base(
    contents: Contents,
    model: nn.Module,
    brought: Mapping[str, Tensor] | tuple[()],
    allow_base_mismatch: bool,
    say: Callable[[str], None],
) -> None:
    if allow_base_mismatch:
        say(making.NOT_COMPARED)
    else:
        say(making.checked(contents.metadata, model, brought))


@contextmanager
def _naming_shapes(
    contents: Contents,
    parts: Mapping[str, Mapping[str, Tensor]],
    layers: Mapping[str, nn.Module],
) -> Iterator[None]:
    """Name the shapes of another base, where these do not fit either."""
    try:
        yield
    except OtherBaseError as error:
        try:
            adapters(contents, parts, layers)
        except InputError as misfit:
            what = f"{error.found}, and {str(misfit).rstrip('.')}"
            raise OtherBaseError(what) from None
        raise


def _unwrapped(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name; for adapted layers, the wrapped layers."""
    layers = inject.adapted(model)
    outside = dict(targets.outside_adapters(model))
    return {n: layers[n].base if n in layers else m for n, m in outside.items()}


def _place(key: str, own: Mapping[str, nn.Module]) -> str:
    found = counterpart(key, own)
    if found is None:
        raise InputError(
            f"the adapter changes {key}, which the model does not have; give the model "
            "that it was trained on"
        )
    return found


def _check_complete(
    config: Mapping[str, Any], own: Mapping[str, nn.Module], found: set[str]
) -> None:
    """Refuse a file that lacks the tensors of a layer named in its settings."""
    wanted = config.get("target_modules")
    narrowed = ("layers_to_transform", "exclude_modules", "layers_pattern")
    if not isinstance(wanted, list) or any(config.get(key) for key in narrowed):
        wanted = []
    for name, module in own.items():
        named = any(name == w or name.endswith(f".{w}") for w in wanted)
        named = named and hasattr(module, "weight")
        named = named or bool(targeted(name, [*module._parameters], config))
        if named and name not in found:
            raise InputError(
                f"the settings name {name}, and the file has no tensors for it; give "
                "the model that it was trained on, or, if that is this one, get the "
                "adapter again"
            )


def _brought(
    config: Mapping[str, Any], others: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Return the tensors of whole modules in the file, by the model's names."""
    own, tied = making.base_tensors(model), targets.tied(model)
    found = {}
    for key, tensor in others.items():
        if key in ("base_model.vera_A", "base_model.vera_B"):
            continue
        plain = key.replace(WHOLE, ".").replace(".base_layer.", ".")
        place = counterpart(plain, own)
        if ".base_layer." in key and place is not None:
            _check_same_table(place, tensor, own[place])
            continue
        if not _is_named(plain, config.get("modules_to_save") or []):
            raise InputError(
                f"the file holds {key}, for which minipeft has no adapter; merge it "
                "with the library that trained it"
            )
        if place is None or _module(place) in tied:
            raise InputError(
                f"the file brings {plain}, which the model does not have alone; untie "
                "it, or give the model that the adapter was trained on"
            )
        _check_same_shape(plain, tensor, own[place])
        found[place] = tensor
    return found


def _is_named(tensor: str, modules: Any) -> bool:
    """Tell whether a tensor belongs to a module named in the settings."""
    inside = f".{_module(tensor)}."
    return isinstance(modules, list) and any(f".{m}." in inside for m in modules)


def _check_same_shape(name: str, tensor: Tensor, own: Tensor) -> None:
    if own.shape != tensor.shape:
        raise InputError(
            f"the file brings {name} with shape {tuple(tensor.shape)}, and the model "
            f"has {tuple(own.shape)}; give the model that it was trained on"
        )


def _check_same_table(name: str, table: Tensor, own: Tensor) -> None:
    here = own.detach().cpu()
    if table.shape != here.shape or not torch.equal(table.to(here.dtype), here):
        raise InputError(
            f"the file holds {name} of another base; give the base that the adapter "
            "was trained on"
        )


def _attach(
    model: nn.Module, built: Mapping[str, tuple[type[Any], nn.Module]], name: str
) -> None:
    """Wrap the layers, or raise an error and change nothing."""
    layers = inject.adapted(model)
    if layers:
        inject.check_places(model, {key: one.base for key, one in layers.items()})
        _add(layers, built, name)
        return
    found = targets.layers(model, list(built))
    inject.check_places(model, found)
    kept = {p: p.requires_grad for p in model.parameters()}
    wrapped = {}
    try:
        for key, (wrapper, adapter) in built.items():
            with naming(key):
                wrapped[id(found[key])] = wrapper(found[key], adapter, name)
    except InputError:
        for parameter, trained in kept.items():
            parameter.requires_grad_(trained)
        raise
    inject.freeze(model)
    targets.replace(model, wrapped)


def _add(
    layers: Mapping[str, inject.Layer],
    built: Mapping[str, tuple[type[Any], nn.Module]],
    name: str,
) -> None:
    kinds = {key: type(layer) for key, layer in layers.items()}
    if kinds != {key: wrapper for key, (wrapper, _) in built.items()}:
        raise InputError(
            "the model has adapters on other layers, or of another method, than the "
            "file; unload the model and load again"
        )
    for key, layer in layers.items():
        with naming(key):
            layer.check_new(name)
    for key, (_, adapter) in built.items():
        layers[key].add(name, adapter)


def check_all_frozen(model: nn.Module) -> None:
    """Refuse a base that is trained too, for a format that holds no module of it.

    Raises:
        InputError: names a tensor that a file would lose.
    """
    for key in trained_beside(model):
        raise InputError(
            f"{key} is trained too, and the file has no place for it; save "
            "model.state_dict(), or freeze it (requires_grad_(False))"
        )


def trained_beside(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of each module that is trained beside the adapters."""
    own = making.base_tensors(model)
    modules = {_module(n) for n, t in own.items() if t.requires_grad}
    return {n: t for n, t in own.items() if _module(n) in modules}


def target_modules(chosen: Sequence[str], model: nn.Module) -> list[str] | str:
    """Return the `target_modules` that select exactly these layers of a model."""
    others = [key for key in _unwrapped(model) if key not in chosen]
    found = peft_write.shortest(chosen, others)
    if any(other.endswith(f".{end}") for other in others for end in found):
        return "|".join(re.escape(key) for key in chosen)
    return found


def target_parameters(chosen: Sequence[str], model: nn.Module) -> list[str]:
    """Return what peft's settings say to mean these stacks of a model, and no other."""
    ends = {".".join(name.split(".")[-2:]) for name in chosen}
    others = making.base_tensors(model).keys() - {*chosen}
    if any(other.endswith(f".{end}") for other in others for end in ends):
        return sorted(chosen)
    return sorted(ends)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _path_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def _task_of(model: nn.Module, saved: set[str]) -> str | None:
    """Return the task of a model, unless peft would miss its head in the file."""
    kind = type(model).__name__
    task = next((task for end, task in TASKS.items() if kind.endswith(end)), None)
    if task not in HEADS:
        return task
    heads = {name for name, _ in model.named_modules() if name.endswith(HEADS[task])}
    return task if heads and heads <= saved else None
