"""Checks of operands that are tensors, generators or dtypes; no value is read.

Each refuses in one sentence that names the operand, before anything is computed.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from minipeft.errors import InputError
from minipeft.shapes import check_floats, check_shapes
from minipeft.values import check_kind


def check_bytes(name: str, tensor: Tensor) -> None:
    """Refuse codes that are not one axis of bytes.

    Raises:
        InputError: names the operand, its dtype and its shape.
    """
    check_kind(name, tensor, Tensor)
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise InputError(
            f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; give a "
            "list of bytes (uint8)."
        )


def check_float_dtype(dtype: torch.dtype) -> None:
    """Refuse what is no float dtype of torch for a result.

    Raises:
        InputError: names it and what to choose.
    """
    check_kind("dtype", dtype, torch.dtype)
    if not dtype.is_floating_point:
        raise InputError(f"the result has dtype {dtype}; choose a float dtype.")


def check_generator(generator: torch.Generator | None) -> None:
    """Refuse what is no generator of torch on the CPU; None stands for torch's own.

    Raises:
        InputError: names what it is, and the device.
    """
    check_kind("generator", generator, torch.Generator, type(None))
    if generator is not None and generator.device.type != "cpu":
        raise InputError(
            f"generator is on {generator.device}; give one on the CPU, so that a seed "
            "gives the same numbers on every device."
        )


def check_indices(name: str, tensor: Tensor) -> None:
    """Refuse what is not one axis of whole numbers of 32 or 64 bits.

    Raises:
        InputError: names the operand, its dtype and its shape.
    """
    check_kind(name, tensor, Tensor)
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1:
        raise InputError(
            f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}; give a "
            "list of whole numbers (int64)."
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse what is no tensor of floats.

    Raises:
        InputError: names the operand, and its type or dtype.
    """
    check_kind(name, tensor, Tensor)
    check_floats(name, tensor)


def check_tensors(operands: Mapping[str, tuple[Tensor | None, str]]) -> None:
    """Refuse tensors whose shapes contradict those before them, and other arrays.

    Args:
        operands: as of `shapes.check_shapes`.

    Raises:
        InputError: at the first that is no tensor, or has a wrong shape or no floats.
    """
    for name, (tensor, axes) in operands.items():
        if tensor is not None or not axes.startswith("?"):
            check_kind(name, tensor, Tensor)
    check_shapes(operands)


def has_values(tensor: Tensor) -> bool:
    """Tell whether the values can be read: not on meta, nor in a `FakeTensorMode`."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def check_in_memory(
    model: nn.Module, places: Iterable[tuple[str, torch.device]]
) -> None:
    """Refuse to make adapters that would lie nowhere: beside offloaded layers.

    Args:
        model: which may have accelerate's hooks anywhere.
        places: names of weights for which adapters are made, and where they lie.

    Raises:
        InputError: names the first one whose weight comes in for a call alone; names
            a module that is distributed over processes; in a `FakeTensorMode`, where
            torch itself moves no module.
    """
    if isinstance(torch.empty(0), FakeTensor):
        raise InputError(
            "a FakeTensorMode is active, in which no adapter gets values; adapt the "
            "model outside it."
        )
    for name, module in model.named_modules():
        if how := _shared_out(module):
            raise InputError(
                f"{name or type(module).__name__} is {how}: each process would make "
                "and train adapters of its own; adapt the model first, then "
                "distribute it."
            )
    for name, device in places if _offloads(model) else ():
        if device.type == "meta":
            raise InputError(
                f"{name} is offloaded: its tensors come in for a call alone, and new "
                "ones would lie nowhere; adapt the model first and offload it then."
            )


def check_trains_in_memory(model: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Refuse to hand out parameters that accelerate has offloaded.

    Args:
        model: which may have accelerate's hooks anywhere.
        trained: what an optimizer is given, by name.

    Raises:
        InputError: names the first one that is a placeholder.
    """
    for name, parameter in trained.items() if _offloads(model) else ():
        if parameter.is_meta:
            raise InputError(
                f"{name} is offloaded: what is here is a placeholder, which gets no "
                "gradient; bring the model back before it is trained (accelerate: "
                "remove_hook_from_submodules)."
            )


def check_served(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse to place adapters beside layers that accelerate has offloaded.

    Args:
        model: which may have accelerate's hooks anywhere.
        layers: that serve, by name.

    Raises:
        InputError: names the first layer whose tensors come in for a call alone.
    """
    for name, layer in layers.items() if _offloads(model) else ():
        if any(held.is_meta for held in (*layer.parameters(), *layer.buffers())):
            raise InputError(
                f"{name} is offloaded: its tensors come in for a call alone, so the "
                "adapters of a batch have no device to lie on; bring the model back "
                "first (accelerate: remove_hook_from_submodules)."
            )


def check_has_values(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to hand out placeholders in the place of tensors, such as for a file.

    Args:
        tensors: by name.

    Raises:
        InputError: names the first one on the device meta.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise InputError(
                f"{name} has no values here: it is offloaded, or was made on the "
                "device meta; bring the model back first (accelerate: "
                "remove_hook_from_submodules), or load it."
            )


def _shared_out(module: nn.Module) -> str | None:
    """Tell how a module is distributed over processes, if it is."""
    if any(hasattr(p, "placements") for p in module._parameters.values()):
        return "sharded over processes"
    # By name: to import torch's distributed part takes a second.
    kinds = {kind.__name__ for kind in type(module).__mro__}
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        return "sharded over processes"
    return "copied to processes" if "DistributedDataParallel" in kinds else None


def _offloads(model: nn.Module) -> bool:
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    inner = [one for hook in hooks for one in (hook, *getattr(hook, "hooks", ()))]
    return any(getattr(hook, "offload", False) for hook in inner)
