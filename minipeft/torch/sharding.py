"""One model over several processes, on torch's own engine: FSDP2, DDP, checkpoints.

    distributed.init_process_group()  # under torchrun
    model = shardable(quantize_linears(model))
    shard(inject(model, LoRAConfig(r=16, alpha=32), "all-linear"))
    optimizer = torch.optim.AdamW(trainable_parameters(model))
    ...
    save(folder, model, optimizer, step)

`replicate` stands beside `shard`: every process holds the whole model, and only
gradients travel.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from minipeft.errors import InputError
from minipeft.torch.adapted import Adapted
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.double_quant import Nested
from minipeft.torch.linear import Bias
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.targets import replace
from minipeft.values import check_kind

Model = TypeVar("Model", bound=nn.Module)

WHOLE = ("codebook", "offset")
"""Parts of a quantized weight that each process holds whole: a few numbers."""

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class ByteLinear(QuantizedLinear):
    """A 4-bit layer whose codes and scales are frozen parameters of bytes.

    FSDP2 shards parameters and leaves buffers whole. Bytes, because a mixed-precision
    policy casts what is floating-point: it would round scales of 32 bits to 16.
    """

    def __init__(
        self,
        q: Blockwise | Nested,
        bias: Bias | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(q, bias, dtype)
        self.stored: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name in [name for name in self.tensors if name not in WHOLE]:
            tensor = self._buffers.pop(name)
            if tensor is not None:
                self.stored[name] = (tensor.dtype, tensor.shape)
                held = tensor.reshape(-1).view(torch.uint8)
                self.register_parameter(f"{name}_bytes", nn.Parameter(held, False))

    def __getattr__(self, name: str) -> Any:
        """Read a part of the quantized weight from its bytes.

        Raises:
            InputError: if this process holds a part of them alone.
        """
        kept = self.__dict__.get("stored", {})
        if name not in kept:
            return super().__getattr__(name)
        held = self._parameters[f"{name}_bytes"]
        if held is None or hasattr(held, "placements"):
            raise InputError(
                "the weight is sharded over several processes; read it within a call "
                "of the model, or gather it (FSDP2: unshard())."
            )
        dtype, shape = kept[name]
        return held.view(dtype).view(shape)


def shardable(model: Model) -> Model:
    """Put a `ByteLinear` in the place of every 4-bit layer.

    Args:
        model: changed in place and returned; not yet adapted.

    Raises:
        InputError: if no layer is quantized, or the model has adapters.
    """
    check_kind("model", model, nn.Module)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise InputError(
                f"{name} has adapters; call shardable() first, then inject."
            )
    found = [m for m in model.modules() if type(m) is QuantizedLinear]
    if not found:
        raise InputError("no layer is quantized; call quantize_linears(model) first.")
    made = {id(m): ByteLinear(m.q, m.bias, m.dtype).train(m.training) for m in found}
    replace(model, made)
    return model


def shard(model: Model, mesh: DeviceMesh | None = None) -> Model:
    """Shard a model over the processes: each of its blocks for itself, then the rest.

    A block is an element of an outermost list of modules. Its weights are gathered for
    its forward and its backward, frozen ones too; gradients of adapters are averaged.

    Args:
        model: with its adapters; changed in place and returned.
        mesh: of the processes; None: all of them.

    Raises:
        InputError: if a 4-bit layer keeps its codes in buffers, which would stay whole.
    """
    check_kind("model", model, nn.Module)
    for name, module in model.named_modules():
        if type(module) is QuantizedLinear:
            raise InputError(
                f"{name} keeps its codes in buffers, which every process would hold "
                "whole; call shardable(model) before inject."
            )
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def replicate(model: nn.Module) -> DistributedDataParallel:
    """Return the model in DDP: every process holds all of it.

    Buffers are frozen here, so they are not sent again in each pass.

    Raises:
        InputError: if nothing in the model is trained, or no process group is there.
    """
    check_kind("model", model, nn.Module)
    if not distributed.is_initialized():
        raise InputError(
            "there is no process group; start the processes with torchrun, and call "
            "torch.distributed.init_process_group() in each."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "nothing in the model is trained, so there is no gradient to average; "
            "inject an adapter first."
        )
    known = signature(DistributedDataParallel).parameters  # torch 2.13 renames it
    new = "forward_sync_buffers" in known
    name = "forward_sync_buffers" if new else "broadcast_buffers"
    never: dict[str, Any] = {name: False}
    return DistributedDataParallel(model, **never)


class _Replacing(FileSystem):
    """Gives the new list of parts its name in one step.

    torch removes the list before, then renames: killed between, there would be none.
    """

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        pass

    def rename(
        self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]
    ) -> None:
        Path(path).replace(new_path)


class _Beside(FileSystemWriter):
    """Leaves the parts of the checkpoint before in place until all new ones are there.

    torch gives them the same names, so that an interrupted save would mix two steps.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.fs = _Replacing()

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        found = super().prepare_global_plan(plans)
        mark = uuid4().hex
        for plan in found:
            plan.storage_data.prefix = f"__{mark}{plan.storage_data.prefix}"
        return found

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        written = {place.relative_path for place in metadata.storage_data.values()}
        for part in Path(self.path).glob("__*.distcp"):
            if part.name not in written:
                part.unlink()


def save(folder: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Save what is trained and its optimizer; each process writes its own part.

    In a folder that holds a checkpoint it takes that one's place once all parts are
    written; an interrupted call leaves the one before.
    """
    new = not optimizer.state
    state = _state(model, optimizer, step)
    if new:  # torch took a step of zeros to learn what the state holds
        optimizer.state.clear()
    with _without_warnings():
        state_dict_saver.save(state, storage_writer=_Beside(folder))


def resume(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Load what `save` wrote, on any number of processes; return the step.

    Raises:
        InputError: if there is no checkpoint, or it is of another configuration.
    """
    if not (folder / ".metadata").is_file():
        raise InputError(f"{folder} holds no checkpoint; give a folder of save().")
    new = not optimizer.state
    state = _state(model, optimizer, 0)
    try:
        _load(folder, state)
    except BaseException:
        if new:  # torch took a step of zeros to learn what the state holds
            optimizer.state.clear()
        raise
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **parts, options=TRAINED)
    return int(state["step"])


def _load(folder: Path, state: dict[str, Any]) -> None:
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    known = {f"model.{name}" for name in state["model"]}
    others = [k for k in saved if k.startswith("model.") and k not in known]
    if others:
        raise InputError(
            f"{folder} does not fit this model (it holds {others[0]}, and "
            f"{len(others) - 1} more); resume with the configuration that wrote it."
        )
    try:
        with _without_warnings():
            state_dict_loader.load(state, checkpoint_id=folder)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise InputError(
            f"{folder} does not fit this model ({str(reason).splitlines()[-1]}); "
            "resume with the configuration that wrote it."
        ) from error


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained, whole and on the CPU; on the first process alone."""
    whole = StateDictOptions(True, True, ignore_frozen_params=True)
    return _only_trained(model, get_model_state_dict(model, options=whole))


def _only_trained(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    # torch leaves frozen parameters out, but not buffers, which are frozen too here.
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    return {name: value for name, value in state.items() if name in trained}


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", "Detected an existing checkpoint")
        yield


def _state(model: nn.Module, optimizer: Optimizer, step: int) -> dict[str, Any]:
    trained, states = get_state_dict(model, optimizer, options=TRAINED)
    trained = _only_trained(model, trained)
    return {"model": trained, "optimizer": states, "step": torch.tensor(step)}


def _blocks(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in inside)
        if isinstance(module, nn.ModuleList) and not within:
            found += [m for m in module if next(m.parameters(), None) is not None]
            inside.append(name)
    return found
