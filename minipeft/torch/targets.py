"""Which layers of a model a target selects, and how layers are replaced.

A target is a full name (`model.layers.0.mlp.up_proj`), the last parts of one
(`up_proj`, `mlp.up_proj`), a pattern with `*`, `?` or `[]` (`layers.1?.mlp.*`), or
`"all-linear"`: every linear layer except output heads and routers.
"""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from minipeft.errors import InputError
from minipeft.torch.adapted import Adapted, naming
from minipeft.torch.linear import weight_view
from minipeft.values import check_kind

ALL_LINEAR = "all-linear"
ROUTERS = ("gate", "router", "*_gate", "*_router")
"""Name parts of the layers that choose experts; `gate_proj` is not one of them."""


def matches(name: str, target: str) -> bool:
    """Tell whether a target, a name or a pattern, selects this name."""
    if _is_pattern(target):
        return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")
    return name == target or name.endswith(f".{target}")


def chosen(names: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Return the names that the targets select, in the order of the names.

    Raises:
        InputError: if a target selects none of them.
    """
    names = list(names)
    for target in targets:
        if not any(matches(name, target) for name in names):
            choices = sorted({name.rpartition(".")[2] for name in names})
            raise InputError(f"the target {target!r} matches nothing; {_say(choices)}.")
    return [name for name in names if any(matches(name, t) for t in targets)]


def _say(choices: Collection[str]) -> str:
    if choices:
        return f"choose from {', '.join(choices)}"
    return "the model has no layer that can be adapted, so give another model"


def check_names(name: str, value: Collection[str]) -> None:
    """Refuse what is no list of texts, such as one text: its letters would be names.

    Raises:
        InputError: names the operand and what it is.
    """
    if isinstance(value, str):
        raise InputError(f"{name} is the string {value!r}; give a list: [{value!r}].")
    check_kind(name, value, Collection)
    for one in value:
        check_kind(f"a name in {name}", one, str)


def layers(model: nn.Module, targets: Sequence[str] | str) -> dict[str, nn.Module]:
    """Return the layers to adapt; a layer with several names is returned once.

    Raises:
        InputError: if a target matches nothing, or a layer that cannot be adapted, is
            adapted already, or shares its weight with another.
    """
    check_kind("model", model, nn.Module)
    if not isinstance(targets, str):
        check_names("targets", targets)
    if not targets:
        raise InputError(
            f"targets is {targets!r}, so no layer would be adapted; name at least one, "
            f"or give {ALL_LINEAR!r}."
        )
    modules = dict(outside_adapters(model))
    found: dict[int, tuple[str, nn.Module]] = {}
    for target in [targets] if isinstance(targets, str) else targets:
        for name in _meant(model, modules, target):
            with naming(name):
                _check_adaptable(modules[name])
            found.setdefault(id(modules[name]), (name, modules[name]))
    chosen = dict(found.values())
    _refuse_tied(model, chosen)
    return chosen


def all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer except output heads and routers.

    A head is the layer that a transformers model returns from
    `get_output_embeddings()`, a layer on top of the base model (a classifier), or a
    layer that shares its weight with an embedding. A router is a layer whose name has a
    part among `ROUTERS`, as the routers of transformers have. A module that holds a
    stack of experts is no linear layer.
    """
    modules = dict(outside_adapters(model))
    left = _heads(model) | _routers(modules)
    return {n: m for n, m in modules.items() if _is_linear(m) and id(m) not in left}


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module by each of its names, except those inside adapted layers.

    Modules inside quantized experts are not yielded either, as they are adapted as a
    whole, nor those inside the network of a prefix, which is trained itself.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside):
            continue
        if isinstance(module, Adapted) or getattr(module, "adapted_whole", False):
            inside += (f"{name}.",)
        if name:
            yield name, module


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules, given by their id, everywhere in the model."""
    check_inside(model, replacements)
    places = [
        (parent, attribute, replacements[id(child)])
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if id(child) in replacements
    ]
    for parent, attribute, module in places:
        setattr(parent, attribute, module)


def check_inside(model: nn.Module, replaced: Container[int]) -> None:
    """Refuse to replace the model itself, which no parent holds."""
    if id(model) in replaced:
        raise InputError("the model is itself an adapted layer; call its own unload().")


def tied(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of modules that share their weight, with those of the others.

    A parameter that is not the `weight` of its module has its own full name.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                named = name if own == "weight" else f"{name}.{own}".lstrip(".")
                owners.setdefault(parameter, []).append(named)
    modules = dict(model.named_modules())
    return {
        name: [other for other in names if other != name]
        for names in owners.values()
        if len(names) > 1
        for name in names
        if name in modules
    }


def _meant(
    model: nn.Module, modules: Mapping[str, nn.Module], target: str
) -> list[str]:
    if target == ALL_LINEAR:
        names = list(all_linear(model))
    else:
        names = [name for name in modules if matches(name, target)]
    if _is_pattern(target):  # a pattern may also match other modules
        names = [name for name in names if _is_adaptable(modules[name])]
    if not names:
        said = _say(_choices(modules))
        raise InputError(f"the target {target!r} matches no layer; {said}.")
    return names


def _is_pattern(target: str) -> bool:
    return any(c in target for c in "*?[")


def _is_adaptable(module: nn.Module) -> bool:
    try:
        weight_view(module)
    except InputError:
        return isinstance(module, Adapted)  # reported later with an error of its own
    return True


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, Adapted):
        return module.view.linear
    return _is_adaptable(module) and weight_view(module).linear


def _check_adaptable(module: nn.Module) -> None:
    if isinstance(module, Adapted):
        raise InputError(
            f"already adapted by {', '.join(module.adapters)}; use add() to give it "
            "another adapter, or unload() to start again."
        )
    weight_view(module)


def _choices(modules: Mapping[str, nn.Module]) -> list[str]:
    found = [n for n, module in modules.items() if _is_adaptable(module)]
    return sorted({name.rpartition(".")[2] for name in found})


def _heads(model: nn.Module) -> set[int]:
    heads = set()
    for owner in _outermost(model) or [model]:
        ask = getattr(owner, "get_output_embeddings", lambda: None)
        heads.add(id(ask()))
        base = getattr(owner, "base_model", owner)
        if isinstance(base, nn.Module) and base is not owner:
            body = {id(module) for module in base.modules()}
            heads |= {id(module) for module in owner.modules()} - body
    modules = dict(model.named_modules())
    for name, others in tied(model).items():
        if any(isinstance(modules.get(other), nn.Embedding) for other in others):
            heads.add(id(modules[name]))
    return heads


def _outermost(model: nn.Module) -> list[nn.Module]:
    """Return the model if transformers made it, else such models inside it."""
    if hasattr(type(model), "get_output_embeddings"):
        return [model]
    return [owner for child in model.children() for owner in _outermost(child)]


def _routers(modules: Mapping[str, nn.Module]) -> set[int]:
    routers = set()
    for name, module in modules.items():
        named = any(fnmatchcase(p, r) for p in name.split(".") for r in ROUTERS)
        if named:
            routers |= {id(inner) for inner in module.modules()}
    return routers


def _refuse_tied(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    for name, others in tied(model).items():
        if name in found:
            raise InputError(
                f"{name} shares its weight with {', '.join(others)}, and an adapter on "
                "one of them would pull them apart; leave it out of the targets, or "
                "untie it: layer.weight = nn.Parameter(layer.weight.clone()), and "
                "tie_word_embeddings = False in the config of a transformers model."
            )
