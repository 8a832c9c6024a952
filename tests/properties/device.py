"""A pretended device: torch takes it for a device, and every value is on the CPU.

Like a GPU, the device refuses an operation on tensors of two devices. So code that
leaves a table on the CPU, or makes a tensor without a device, fails here as it would
fail on a GPU. Unlike torch's `FakeTensorMode`, the device has values (a quantizer reads
them), its tensors can be sliced in a build without CUDA, it runs backward passes, and
it refuses a CPU table that is indexed by a tensor of the device.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
MOVES = (
    "aten::_to_copy",
    "aten::copy_",
    "aten::to",
)  # moves a tensor to another device


KERNELS = {}  # operators that run other code on the device, by name


class MixedDevicesError(Exception):
    """An operation met tensors of two devices."""


class There(Tensor):
    """A tensor on the device; `here` is the CPU tensor that holds its values."""

    NUMBER = 0

    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=f"{NAME}:{cls.NUMBER}",
        )

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return execute(operation, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, tensor):  # `Module.to` sets the data of its parameters
        Tensor.data.__set__(self, tensor)
        self.here = tensor.here

    def untyped_storage(self):  # code compares addresses and sizes of values
        return self.here.untyped_storage()

    def tolist(self):  # torch's own works on plain tensors only
        return self.cpu().tolist()

    def __format__(self, how):  # torch's own works on plain tensors only
        return format(self.cpu(), how)


def execute(operation, args, kwargs):
    """Run one operation on the CPU, and mark its result as a tensor of the device."""
    tensors = list(_tensors((args, kwargs)))
    there = [t for t in tensors if isinstance(t, There)]
    wanted = kwargs.get("device") or next(filter(_is_device, args), None)
    made_there = bool(there) if wanted is None else torch.device(wanted).type == NAME
    if there:
        _refuse_others(operation, tensors)
    if there or made_there:
        args, kwargs = _values(args), _values(kwargs)
    # On a device, an operator of this column launches a kernel.
    run = KERNELS.get(operation._schema.name, operation) if there else operation
    out = run(*args, **kwargs)
    if made_there:
        # An operation in place returns the tensor that it was given.
        owners = {id(getattr(t, "here", t)): t for t in tensors}
        out = _claimed(out, owners)
    return out


def _refuse_others(operation, tensors):
    here = [t for t in tensors if not isinstance(t, There)]
    shapes = [tuple(t.shape) for t in here if t.dim()]  # a scalar may be on any device
    if shapes and operation._schema.name not in MOVES:
        raise MixedDevicesError(
            f"{operation} on {NAME} tensors and CPU tensors {shapes}"
        )


# torch's functions for trees would take most of a chapter's time.
def _tensors(given):
    for value in given.values() if isinstance(given, dict) else given:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from _tensors(value)


def _is_device(given):
    return isinstance(given, torch.device)


def _values(given):
    if isinstance(given, There):
        return given.here
    if isinstance(given, torch.device):
        return torch.device("cpu")
    if isinstance(given, dict):
        return {name: _values(value) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return type(given)(_values(value) for value in given)
    return given


def _claimed(value, owners):
    if isinstance(value, list | tuple):
        return type(value)(_claimed(one, owners) for one in value)
    if not isinstance(value, Tensor):
        return value
    return owners[id(value)] if id(value) in owners else There(value)


class _Operations(TorchDispatchMode):
    """Also catches factories such as `torch.zeros`, which take no tensor."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return execute(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Moves values that no dispatch mode sees: `torch.tensor`, lists of indices."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is Tensor.new_tensor:
            like, *args = args
            kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
            function = torch.tensor
        if function is torch.tensor and "device" in kwargs:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if function is Tensor.pin_memory:  # the driver's affair
            return args[0]
        if function is Tensor.__getitem__ and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(args[0].device))
        return function(*args, **kwargs)


class Waits(TorchDispatchMode):
    """Notes each place where the host waits for the device.

    These are the places that `torch.cuda.set_sync_debug_mode` warns of. Only code of
    the torch column is noted, not code of a transformers model.
    """

    LOOKS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        there = [t for t in tensors if isinstance(t, There)]
        name = operation._schema.name.removeprefix("aten::")
        wanted = kwargs.get("device")
        crosses = name in ("_to_copy", "copy_") and (
            (wanted is not None and (torch.device(wanted).type == NAME) != bool(there))
            or 0 < len(there) < len(tensors)
        )
        by_mask = name in ("index", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in there[1:]
        )
        looks = there and (name in self.LOOKS or by_mask)
        if looks or (crosses and not kwargs.get("non_blocking")):
            place = _place()
            self.places += [f"{name} in {place}"] * (place is not None)
        return operation(*args, **kwargs)


def _place():
    """Return the line of the column that called torch; None if other code called it."""
    frame = sys._getframe(2)
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("minipeft.torch"):
            return f"{module}.{frame.f_code.co_qualname}:{frame.f_lineno}"
        if not module.startswith(("torch", __name__)):
            return None
        frame = frame.f_back
    return None


def register():
    """Make the device known to torch; call this before the first backward pass."""
    module = SimpleNamespace(
        is_initialized=lambda: True,
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    _setup_privateuseone_for_python_backend(NAME, module)


@contextmanager
def pretending():
    """Make the pretended device available inside the context."""
    with _Operations(), _Literals():
        yield torch.device(f"{NAME}:0")
