"""Bottleneck adapters in the format of AdapterHub's library `adapters`.

A folder holds `adapter_config.json` and `adapter.safetensors`. The library reads and
writes the latter if it is asked to: `load_adapter(folder, use_safetensors=True)`. With
the settings below its adapter computes h + s f(h) behind a sublayer, as `Serial` does.

Source: adapters 1.3.0, configuration/adapter_config.py, methods/modeling.py, loading.py
"""

import re
from collections.abc import Mapping
from math import inf, nextafter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.interop import made as making
from minipeft.interop import peft_folder, peft_virtual
from minipeft.interop.made import Made
from minipeft.interop.peft_folder import Contents
from minipeft.interop.peft_model import check_all_frozen, warn
from minipeft.torch import inject, targets
from minipeft.torch.adapted import naming
from minipeft.torch.bottleneck import Bottleneck, Serial
from minipeft.torch.linear import weight_view

WEIGHTS = peft_folder.ADAPTERHUB
PLACES = {"self_attn.o_proj": "attention_adapters", "mlp.down_proj": "output_adapters"}
"""The layers that end the sublayers of a Llama, and the library's adapters there."""
PARTS = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}
OPERANDS = ("down", "up", "down_bias", "up_bias")
KEY = re.compile(
    r"(?P<layer>.+\.layers\.(?P<number>\d+))\.(?P<place>attention|output)_adapters"
    r"\.adapters\.(?P<name>[^.]+)\.(?P<part>adapter_(?:down\.0|up)\.(?:weight|bias))"
)
OURS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "inv_adapter": None,
    "is_parallel": False,
    "ln_after": False,
    "ln_before": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "phm_layer": False,
    "residual_before_ln": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
"""The settings under which the library computes what `Serial` does."""
UNUSED: dict[str, Any] = {
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}
"""The library's own values of what it reads and such an adapter does not use."""


def save(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    made: Made | None = None,
) -> None:
    """Write one bottleneck adapter of a model as a new folder.

    Args:
        model: with adapters behind o_proj, down_proj, or both.
        folder: a new one; it appears whole, or not at all.
        name: of the adapter.
        made: what only the caller knows of the training.

    Raises:
        InputError: the folder exists, a layer has no place in the format, widths or
            scalings differ, or the model has virtual tokens or trained weights too.
    """
    peft_virtual.check_one_kind(model)
    inject.adapter_state_dict(model, name)  # refuses a name that no layer holds
    check_all_frozen(model)
    found: dict[str, Bottleneck] = {}
    for key, layer in inject.adapted(model).items():
        if name in layer.adapters:
            with naming(key):
                found[key] = _bottleneck(layer.adapters[name])
    tensors = {
        f"{_place(key)}.adapters.{name}.{part}": getattr(adapter, own).detach().cpu()
        for key, adapter in found.items()
        for part, own in PARTS.items()
    }
    scalings = {f"{key}.scaling": adapter.scaling for key, adapter in found.items()}
    facts = making.metadata(
        making.of_base(model), "BOTTLENECK", scalings, made or Made()
    )
    config = _config(model, found, name)
    peft_folder.write(folder, Contents(config, tensors, facts), WEIGHTS)


def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    allow_base_mismatch: bool = False,
) -> nn.Module:
    """Put the bottleneck adapter of a folder onto a model: all of it, or nothing.

    Args:
        model: without adapters, of a Llama's names.
        folder: of the adapter.
        name: of the new adapter.
        allow_base_mismatch: do not compare the base with the one that the file names.

    Raises:
        InputError: the files are damaged, hold an adapter that computes anything else,
            were made for another base, or do not fit the model.
    """
    contents = peft_folder.read(folder, WEIGHTS)
    scaling = _checked(contents.config)
    parts = _parts(contents.tensors)
    layers = targets.layers(model, list(parts))
    inject.check_places(model, layers)
    built = {}
    for key, layer in layers.items():
        with naming(key):
            missing = {*PARTS.values()} - parts[key].keys()
            if missing:
                raise InputError(f"the file has no {min(missing)}; get it again")
            form = weight_view(layer).form(layer)
            own = {n: t.to(form.device, form.wide) for n, t in parts[key].items()}
            down, up, *biases = (own[n] for n in OPERANDS)
            built[key] = Bottleneck(down, up, scaling, *biases)
            Serial.check_fits(form, built[key])
    if allow_base_mismatch:
        warn(making.NOT_COMPARED)
    else:
        warn(making.checked(contents.metadata, model))
    wrapped = {id(layers[key]): Serial(layers[key], built[key], name) for key in built}
    inject.freeze(model)
    targets.replace(model, wrapped)
    return model


def _config(
    model: nn.Module, found: Mapping[str, Bottleneck], name: str
) -> dict[str, Any]:
    layers = (re.fullmatch(r".+\.layers\.(\d+)", n) for n, _ in model.named_modules())
    there = {int(layer[1]) for layer in layers if layer}
    own = getattr(model, "config", None)
    return {
        "config": {**OURS, **UNUSED, **_sizes(found, there)},
        "hidden_size": next(iter(found.values())).down.shape[1],
        "model_class": type(model).__name__,
        "model_name": getattr(own, "name_or_path", ""),
        "model_type": getattr(own, "model_type", None),
        "name": name,
        "version": "adapters.1.3.0",
    }


def _bottleneck(adapter: nn.Module) -> Bottleneck:
    if not isinstance(adapter, Bottleneck):
        raise InputError(
            f"{type(adapter).__name__} is no bottleneck adapter; save it in peft's "
            "format"
        )
    return adapter


def _place(key: str) -> str:
    """Return the library's name of the place behind a layer."""
    for layer, place in PLACES.items():
        if re.fullmatch(rf".+\.layers\.\d+\.{re.escape(layer)}", key):
            return f"{key.removesuffix(layer)}{place}"
    raise InputError(
        f"{key} has no place in AdapterHub's format, which knows adapters behind "
        f"{' and '.join(PLACES)} of a Llama; save the state dict of the adapter instead"
    )


def _sizes(found: Mapping[str, Bottleneck], there: set[int]) -> dict[str, Any]:
    """Return the settings that follow from the adapters of the layers.

    Args:
        found: the adapters.
        there: the numbers of the model's layers.

    Raises:
        InputError: they differ in what the format has once.
    """
    sizes = {(*adapter.down.shape, adapter.scaling) for adapter in found.values()}
    if len(sizes) > 1:
        raise InputError(
            "the adapters differ in width or scaling, and AdapterHub's file has one "
            "for all; save the state dict of the adapter instead"
        )
    ((bottleneck, features, scaling),) = sizes
    numbers = {int(key.split(".layers.")[1].split(".")[0]) for key in found}
    held = {
        place: any(key.endswith(layer) for key in found)
        for layer, place in PLACES.items()
    }
    wanted = {(n, place) for n in numbers for place in PLACES.values() if held[place]}
    if len(wanted) != len(found):
        raise InputError(
            "some layers have two adapters and others one, and AdapterHub's file has "
            "one choice for all; save the state dict of the adapter instead"
        )
    return {
        "reduction_factor": _factor(features, bottleneck),
        "scaling": float(scaling),
        "mh_adapter": held["attention_adapters"],
        "output_adapter": held["output_adapters"],
        "leave_out": sorted(there - numbers),
    }


def _factor(features: int, bottleneck: int) -> float:
    """Return the reduction factor from which the library gets this bottleneck."""
    factor = features / bottleneck
    # The library takes features // factor, one less if this was rounded up.
    return factor if int(features // factor) == bottleneck else nextafter(factor, -inf)


def _checked(config: Mapping[str, Any]) -> float:
    """Return the scaling, once the settings are known to be those of `Serial`."""
    inner = config.get("config")
    if not isinstance(inner, dict):
        raise InputError(
            f"adapter_config.json has config = {inner!r}, and no settings of a "
            "bottleneck adapter; get the folder again"
        )
    known = {*OURS, *UNUSED, "reduction_factor", "scaling", "leave_out"}
    known |= {"mh_adapter", "output_adapter"}
    for key, value in inner.items():
        if key not in known or (key in OURS and value != OURS[key]):
            raise InputError(
                f"the adapter was made with {key} = {value!r}, for which minipeft has "
                "no method; use the library that trained it"
            )
    for key, value in OURS.items():
        if key not in inner:
            raise InputError(
                f"adapter_config.json does not say {key}, which minipeft needs to be "
                f"{value!r}; get the folder again"
            )
    scaling = inner.get("scaling")
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise InputError(
            f"scaling is {scaling!r}, for which minipeft has no method; use the "
            "library that trained it"
        )
    return float(scaling)


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer, by the names that `Bottleneck` has."""
    layers = {place.split("_")[0]: layer for layer, place in PLACES.items()}
    found: dict[str, dict[str, Tensor]] = {}
    names = set()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or not tensor.is_floating_point():
            raise InputError(
                f"the file holds {key}, which is no part of a bottleneck adapter of a "
                "Llama; use the library that trained it"
            )
        names.add(match["name"])
        layer = f"{match['layer']}.{layers[match['place']]}"
        found.setdefault(layer, {})[PARTS[match["part"]]] = tensor
    if len(names) > 1:
        raise InputError(
            f"the file holds the adapters {' and '.join(sorted(names))}; save one alone"
        )
    return found
