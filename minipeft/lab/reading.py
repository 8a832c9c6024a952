"""Read a model from files, weight by weight, and quantize each layer on request.

The memory peak is the final model plus one layer. If a weight is missing or has another
shape, the message names it. Otherwise the layer would keep random numbers, and nobody
would notice.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from minipeft.errors import InputError
from minipeft.interop.tensors import INDEX, Tensors, is_finite, open_tensors
from minipeft.torch.qlora import QuantizedLinear, quantizable

Quantize = Callable[[nn.Module], QuantizedLinear]
PIECE = 2**20
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def nf4(layer: nn.Module) -> QuantizedLinear:
    """Quantize to NF4 in blocks of 64."""
    return QuantizedLinear.from_linear(layer)


def nf4_double(layer: nn.Module) -> QuantizedLinear:
    """Quantize to NF4 in blocks of 64, and the scales in blocks of 256."""
    return QuantizedLinear.from_linear(layer, nested_blocksize=256)


QUANTIZERS: Mapping[str, Quantize] = {"nf4": nf4, "nf4-double": nf4_double}


def read(
    folder: Path, dtype: torch.dtype, device: str, quantize: Quantize | None = None
) -> nn.Module:
    """Return the model of a folder in Hugging Face format, in evaluation mode.

    Args:
        folder: with config.json and safetensors.
        dtype: of every floating tensor that is not quantized.
        device: of the returned model.
        quantize: of every linear layer but the output layer; None: of none.

    Raises:
        InputError: a weight is missing, unexpected, of another shape, not finite, or
            there twice; the configuration makes no model; the folder holds an adapter.
    """
    _check_no_adapter(folder)
    with building("model", folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        auto = head(config)
    if not _has_plain_files(folder):
        return _by_transformers(folder, auto, dtype, device, quantize)
    tensors = open_tensors(folder)
    with building("model", folder):
        model = empty(auto, config, dtype)
    names = _names(model, tensors.about)
    if names is None:  # transformers fuses or renames these weights
        return _by_transformers(folder, auto, dtype, device, quantize)
    fill(model, tensors, names, (dtype, device), quantize)
    return model.eval()


def _check_no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter (adapter_config.json), which would be left "
            "out; load its base, and put the adapter on it with "
            "minipeft.interop.peft_model.load"
        )


@contextmanager
def building(what: str, folder: Path) -> Iterator[None]:
    """Turn any error of transformers over a folder's files into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of many kinds, and all come from the folder's files
        said = " ".join(str(error).split())
        if isinstance(error, UnpicklingError):  # torch's own remedy runs its code
            said = "a pickle is damaged, or holds more than tensors"
        raise InputError(
            f"transformers makes no {what} of {folder} ({type(error).__name__}: "
            f"{shorten(said, 200)}); get its files again, or repair them"
        ) from error


def head(config: Any) -> Any:
    """Return the auto class for a configuration.

    The names of classes of causal language models have several endings, such as
    GPT2LMHeadModel.
    """
    kinds = set(config.architectures or ())
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    seq2seq = set(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
    if kinds & causal:
        return transformers.AutoModelForCausalLM
    if kinds & seq2seq:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModel


def empty(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return the model without memory for its parameters; buffers are computed."""
    with accelerate.init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=dtype)


def fill(
    model: Any,
    tensors: Tensors,
    names: Mapping[str, str],
    place: tuple[torch.dtype, str],
    quantize: Quantize | None,
) -> None:
    """Read each tensor into the model; quantize a layer as soon as it is complete.

    Args:
        model: from `empty`.
        tensors: of the files.
        names: {name in the model: name in the files}.
        place: dtype and device.
        quantize: of every linear layer but the output layer.

    Raises:
        InputError: a weight is missing or not finite.
    """
    output = _output_layer(model)
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)  # a list would keep all in memory
        prefix = f"{name}." if name else ""
        for key in [k for k in _own(module) if prefix + k in names]:
            tensor = tensors.read(names[prefix + key])
            _check_kind(prefix + key, tensor, getattr(module, key))
            _put(module, key, _cast(prefix + key, tensor, place))
        if quantize and quantizable(module) and module is not output:
            _replace(model, name, quantize(module))
    _check_tied(model, names)
    model.tie_weights()
    left = [n for n, p in model.named_parameters() if p.is_meta]
    if left:
        raise InputError(
            f"the files hold no {left[0]}, and a layer of random numbers would take "
            "its place; give a checkpoint that fits the model"
        )
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(place[1])


def quantized(model: Any, quantize: Quantize | None) -> Any:
    """Quantize every linear layer but the output layer, in place."""
    output = _output_layer(model)
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if quantize and quantizable(module) and module is not output:
            _replace(model, name, quantize(module))
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _check_kind(name: str, tensor: Tensor, own: Tensor) -> None:
    if own.is_floating_point() and not tensor.is_floating_point():
        raise InputError(
            f"{name} has dtype {tensor.dtype} in the files, and the model computes "
            "with floats; give a checkpoint that is not quantized"
        )


def _check_tied(model: nn.Module, names: Mapping[str, str]) -> None:
    """Refuse two different weights where config.json says that there is one."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, source in tied.items():
        if name not in names or source not in names:
            continue
        both = [model.get_parameter(one) for one in (name, source)]
        if not torch.equal(*both):
            raise InputError(
                f"config.json ties {name} to {source}, and the files hold two "
                "different weights; set tie_word_embeddings to false in config.json, "
                "or give the checkpoint that fits it"
            )


def _own(module: nn.Module) -> list[str]:
    return [*module._parameters, *module._buffers]


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    own = module._parameters.get(key)
    if own is None:
        module._buffers[key] = tensor
    else:
        module._parameters[key] = nn.Parameter(tensor, tensor.is_floating_point())


def _cast(name: str, tensor: Tensor, place: tuple[torch.dtype, str]) -> Tensor:
    dtype, device = place
    if not tensor.is_floating_point():
        return tensor.to(device)
    # Piece by piece, because the test makes copies.
    if not all(map(is_finite, torch.split(tensor.reshape(-1), PIECE))):
        raise InputError(f"{name} holds values that are not finite; get it again")
    cast = tensor.to(dtype)
    narrowed = cast.dtype != tensor.dtype
    if narrowed and not all(map(is_finite, torch.split(cast.reshape(-1), PIECE))):
        raise InputError(
            f"{name} holds values beyond the range of {dtype}; choose another dtype"
        )
    return cast.to(device)


def _output_layer(model: Any) -> nn.Module | None:
    layer: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return layer


def _has_plain_files(folder: Path) -> bool:
    return (folder / INDEX).exists() or (folder / "model.safetensors").exists()


def _names(model: Any, about: Mapping[str, Any]) -> dict[str, str] | None:
    """Return {name in the model: name in the files}, or None if they do not fit.

    Raises:
        InputError: a name fits, but its shape does not.
    """
    own = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    base = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name in about:
        spellings = (name, base + name, name.removeprefix(base))
        fits = next((s for s in spellings if s in own), None)
        if fits is None:
            if _ignored(model, name):
                continue
            return None
        if fits in found:
            raise InputError(
                f"the files hold {fits} twice, as {found[fits]} and as {name}; leave "
                "one of them out"
            )
        found[fits] = name
        if own[fits] != about[name].shape:
            raise InputError(
                f"{name} has shape {about[name].shape} in the files and {own[fits]} in "
                "the model; give a checkpoint that fits the config.json"
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return found if own.keys() - found.keys() <= tied else None


def _ignored(model: Any, name: str) -> bool:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    more = (
        r"rotary_emb\.inv_freq$",
        r"\.masked_bias$",
        r"attn\.bias$",
        "position_ids$",
    )
    return any(re.search(pattern, name) for pattern in (*patterns, *more))


def _by_transformers(
    folder: Path, auto: Any, dtype: torch.dtype, device: str, quantize: Quantize | None
) -> nn.Module:
    """Let transformers rename and fuse weights; refuse missing ones."""
    transformers.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with building("model", folder):
            model, info = auto.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    finally:
        logger.setLevel(before)
    for kind, why in (
        ("missing_keys", "is not in the files, and would be random"),
        ("mismatched_keys", "has another shape in the files"),
        ("unexpected_keys", "is in the files, and the model has no place for it"),
    ):
        if info.get(kind):
            name = sorted(map(str, info[kind]))[0]
            raise InputError(f"{name} {why}; give a checkpoint that fits the model")
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{name} holds values that are not finite in {dtype}; choose a wider "
                "dtype, or get it again"
            )
    moved: nn.Module = quantized(model, quantize).to(device).eval()
    return moved
