"""Check a whole state dict before `load_state_dict` writes its first tensor.

Torch loads a model module by module, and each module's hooks run when the modules
before it are written. So what a layer refuses would be refused when half of the model
has changed. `inject`, `quantize_linears` and the other functions that change a model
register a hook on it, which asks all its layers first.

What remains is torch's: it tells no hook whether `strict` was given, so it names
missing and unexpected tensors at the end, when the others are loaded
(`inject.load_adapter_state_dict` refuses them before). A module around the model loads
its own tensors, and those of the children before the model, before the hook runs; so
does a graph that `torch.fx` or `torch.export` makes of a model, as it keeps the layers
and not the hook of their root.
Below a module where another program changes what is loaded, by a hook or a method of
the class, each layer checks for itself when its turn comes, and takes whole numbers for
floats as torch does: the hook may run after the check.
Of a sharded tensor (DTensor) each process checks its own part: to ask the others would
wait forever where one of them does not load. In a `FakeTensorMode` there are no values.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import is_tensor_like

from minipeft.errors import InputError
from minipeft.torch.operands import has_values

Module = TypeVar("Module", bound=nn.Module)
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
"""Where torch keeps the hooks of a module's calls."""

ON_LOAD = "_load_state_dict_pre_hooks"
# What belongs to calls; a twin is not called.
CALLS = (*HOOKS, "forward", "_old_forward", "_hf_hook", "ready")
# What belongs to saving and loading.
AFTER_LOAD = "_load_state_dict_post_hooks"
FILES = (ON_LOAD, AFTER_LOAD, "_state_dict_hooks", "_state_dict_pre_hooks")


def watch(module: nn.Module) -> None:
    """Check what is loaded into the module and its parts before it is written.

    A part says by a method `check_load(state, prefix, assign)` what it refuses besides
    tensors of other shapes.
    """
    if not _of_ours(module):
        module.register_load_state_dict_pre_hook(_check)  # type: ignore[no-untyped-call]


def unwatch(model: nn.Module) -> None:
    """Remove the hook where no part has anything to check any more."""
    for module in model.modules():
        if not any(hasattr(type(part), "check_load") for part in module.modules()):
            for key in _of_ours(module):
                del getattr(module, ON_LOAD)[key]


def check_values(
    layer: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    names: Sequence[str] = (),
    assign: bool = False,
) -> None:
    """Refuse tensors that are not finite, or no floats where the layer has floats.

    Args:
        layer: whose tensors are compared.
        state: all that is loaded.
        prefix: of the layer's names in the state.
        names: of the tensors to check; none given: all.
        assign: whether the tensors replace those of the layer, and keep their dtype.
    """
    for name, own in layer.state_dict().items():
        if not names or name in names:
            new = state.get(prefix + name)
            if isinstance(new, Tensor) and (wrong := odd(new, own, assign)):
                raise InputError(f"{prefix}{name} {wrong}; load another file.")


def odd(new: Tensor, own: Tensor, assign: bool = False) -> str | None:
    """Return what is wrong with the values of a tensor that replaces another."""
    if new.is_floating_point() != own.is_floating_point():
        return f"has dtype {new.dtype}, not {own.dtype}"
    if new.layout != own.layout:
        return f"is {new.layout}, not {own.layout}"
    here: Tensor = new.to_local() if hasattr(new, "to_local") else new  # sharded
    # In the dtype in which the layer will have it: 1e300 may become infinite there.
    here = here if assign else here.to(own.dtype)
    if not has_values(here):
        return None
    if here.is_floating_point() and here.element_size() == 1:  # torch cannot ask these
        here = here.float()
    if bool(here.isfinite().all()):
        return None
    return "is not finite"


def twin(
    layer: Module, state: Mapping[str, Any], prefix: str, assign: bool = False
) -> Module:
    """Return an unmerged copy of a layer with the tensors that a load would give it.

    All other tensors are shared; so are hooks of calls, as the copy is not called.
    Hooks on its state dict stay out of it, but those by which an adapter loads.
    """
    shared: list[Any] = [*layer.parameters(), *layer.buffers()]
    aside = (*CALLS, *FILES)
    shared += [vars(m)[n] for m in layer.modules() for n in aside if n in vars(m)]
    new = deepcopy(layer, {id(one): one for one in shared})
    for module in new.modules():
        after = {} if module is new else getattr(module, AFTER_LOAD)
        ours = {k: h for k, h in after.items() if _name(h).startswith("minipeft.")}
        vars(module).update({name: OrderedDict() for name in FILES})
        setattr(module, AFTER_LOAD, OrderedDict(ours))
    new.unmerge()  # type: ignore[operator]
    loaded = {}
    for name, own in new.state_dict().items():
        if prefix + name in state and not state[prefix + name].is_meta:
            held = state[prefix + name].detach().reshape(own.shape)
            loaded[name] = held if assign else held.to(own.device, own.dtype)
    new.load_state_dict(loaded, strict=False, assign=True)
    return new


def _check(
    module: nn.Module,
    state: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    *rest: object,
) -> None:
    errors = rest[-1]  # one list for all modules that are loaded at once
    if vars(module).pop("_checked", None) is errors:
        return
    parts = list(_loaded_as_they_are(module, prefix))
    problems = [p for part, at in parts for p in _misfits(part, state, at)]
    if problems:
        more = f", and {len(problems) - 1} more" * (len(problems) > 1)
        raise InputError(
            f"the state dict does not fit: {problems[0]}{more}; build the model as the "
            "one that was saved, with its adapters and bits."
        )
    assign = bool(metadata.get("assign_to_params_buffers"))
    # Another program's hook here may still change names, but no NaN becomes a number.
    for part, at in parts or [(module, prefix)]:
        if hasattr(type(part), "check_load"):
            part.check_load(_as_it_comes(part, state, at), at, assign)  # type: ignore[operator]
    for part, _ in parts[1:]:
        if _of_ours(part):
            vars(part)["_checked"] = errors


def _loaded_as_they_are(
    module: nn.Module, prefix: str
) -> Iterator[tuple[nn.Module, str]]:
    if not _changes_what_comes(module):
        yield module, prefix
        for name, child in module._modules.items():
            if child is not None:
                yield from _loaded_as_they_are(child, f"{prefix}{name}.")


def _changes_what_comes(module: nn.Module) -> bool:
    # Others' hooks, and a method of a class, may change names, shapes and dtypes.
    hooks = getattr(module, ON_LOAD).values()
    others = any(not _name(hook).startswith("minipeft.") for hook in hooks)
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return others or own


def _as_it_comes(
    part: nn.Module, state: Mapping[str, Any], prefix: str
) -> Mapping[str, Any]:
    """Leave out whole numbers that another program may turn into floats."""
    named = [n for n, module in part.named_modules() if _changes_what_comes(module)]
    below = tuple(f"{prefix}{name}." if name else prefix for name in named)

    def may_change(key: str, new: Any) -> bool:
        whole = isinstance(new, Tensor) and not new.is_floating_point()
        return whole and key.startswith(below)

    return {k: t for k, t in state.items() if not may_change(k, t)} if below else state


def _misfits(module: nn.Module, state: Mapping[str, Any], prefix: str) -> list[str]:
    aside = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module._buffers.items() if n not in aside}
    found = []
    for name, own in {**module._parameters, **buffers}.items():
        key = prefix + name
        if own is None or key not in state or nn.parameter.is_lazy(own):
            continue
        new = state[key]
        if not is_tensor_like(new):  # type: ignore[no-untyped-call]
            found.append(f"{key} is of type {type(new).__name__}")
        elif new.shape != own.shape and not (own.dim() == 0 and new.shape == (1,)):
            found.append(f"{key} has shape {tuple(new.shape)}, not {tuple(own.shape)}")
    return found


def _of_ours(module: nn.Module) -> list[int]:
    hooks = getattr(module, ON_LOAD)
    return [key for key, hook in hooks.items() if _name(hook) == _name(_check)]


def _name(hook: Any) -> str:
    function = getattr(hook, "hook", hook)  # torch wraps it
    return f"{function.__module__}.{getattr(function, '__qualname__', '')}"
