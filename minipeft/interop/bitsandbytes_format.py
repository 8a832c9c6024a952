"""4-bit weights in safetensors, in the format of bitsandbytes and transformers.

A weight is six tensors, or eight with double quantization: the packed codes, their
scales, the tables, and a JSON text stored as bytes, which holds block size, dtype and
shape.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from minipeft.errors import InputError
from minipeft.interop.tensors import PIECE, About, Tensors, in_pieces
from minipeft.torch import blockwise, double_quant
from minipeft.torch.blockwise import Blockwise
from minipeft.torch.codebook import FP4, NF4, dynamic_map
from minipeft.torch.double_quant import Nested

if TYPE_CHECKING:
    from minipeft.interop.rounding import Rounding

STATE = ".quant_state.bitsandbytes__"
KINDS = {"nf4": NF4, "fp4": FP4}
Quantized = Blockwise | Nested


def write(name: str, q: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of one weight, by the names that bitsandbytes gives them.

    Args:
        name: of the weight, such as `model.layers.0.mlp.up_proj.weight`.
        q: the quantized weight; its codebook is NF4 or FP4.
        dtype: of the weight before; bitsandbytes decodes to this dtype.

    Raises:
        InputError: the codebook is another one.
    """
    kind = _kind(name, q.codebook)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": q.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    found = {name: q.packed.reshape(-1, 1)}
    if isinstance(q, Nested):
        state |= {
            "nested_blocksize": q.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": float(q.offset),
        }
        found |= {
            f"{name}.absmax": q.absmax_codes,
            f"{name}.nested_absmax": q.nested_absmax,
            f"{name}.nested_quant_map": dynamic_map(),
        }
    else:
        found[f"{name}.absmax"] = q.absmax
    found[f"{name}.quant_map"] = q.codebook
    found[f"{name}{STATE}{kind}"] = _bytes(json.dumps(state))
    return found


def read(name: str, tensors: Tensors) -> tuple[Quantized, torch.dtype]:
    """Return one weight and its dtype before quantization.

    Raises:
        InputError: a part is missing, malformed, or contradicts the size of another.
    """
    state = _state(name, tensors)
    packed = tensors.read(name).reshape(-1)
    codebook = _part(name, "quant_map", tensors)
    shape = tuple(state["shape"])
    fields = {"codebook": codebook, "blocksize": state["blocksize"], "shape": shape}
    absmax = _part(name, "absmax", tensors)
    if "nested_blocksize" in state:
        table = _part(name, "nested_quant_map", tensors)
        if not torch.equal(table, dynamic_map()):
            raise InputError(f"{name} has a nested table other than the dynamic map")
        q: Quantized = Nested(
            packed=packed,
            absmax_codes=absmax,
            nested_absmax=_part(name, "nested_absmax", tensors),
            offset=torch.tensor(state["nested_offset"], dtype=torch.float32),
            nested_blocksize=state["nested_blocksize"],
            **fields,
        )
    else:
        q = Blockwise(packed=packed, absmax=absmax, **fields)
    _check_sizes(name, q)
    return q, getattr(torch, state["dtype"])


def decode(q: Quantized, dtype: torch.dtype) -> Tensor:
    """Return the decoded weight; the scales may be numbers or codes."""
    if isinstance(q, Nested):
        return double_quant.dequantize(q, dtype)
    return blockwise.dequantize(q, dtype)


class FourBitTensors:
    """A 4-bit checkpoint that decodes each weight when it is read.

    Args:
        tensors: of the files.
    """

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self.metadata: Mapping[str, str] = tensors.metadata
        self.quantized = {
            name.split(STATE)[0] for name in tensors.about if STATE in name
        }
        parts = tuple(f"{name}." for name in self.quantized)
        plain = {n: a for n, a in tensors.about.items() if not n.startswith(parts)}
        self.about: Mapping[str, About] = {
            name: self._decoded(name) if name in self.quantized else about
            for name, about in plain.items()
        }

    def _decoded(self, name: str) -> About:
        state = _state(name, self._tensors)
        return About(getattr(torch, state["dtype"]), tuple(state["shape"]))

    def rounding(self, name: str) -> "Rounding":
        """Return how the file rounds one tensor."""
        from minipeft.interop.rounding import Cast, FourBits

        if name not in self.quantized:
            return Cast(self.about[name].dtype)
        return FourBits(*read(name, self._tensors))

    def read(self, name: str) -> Tensor:
        """Return one tensor, decoded if it is a 4-bit weight."""
        if name in self.quantized:
            return decode(*read(name, self._tensors))
        return self._tensors.read(name)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, decoded if it is a 4-bit weight."""
        if name in self.quantized:
            return in_pieces(self.read(name), size)
        return self._tensors.pieces(name, size)


def _kind(name: str, codebook: Tensor) -> str:
    found = table_name(codebook)
    if found in KINDS:
        return found
    raise InputError(f"{name} has a codebook that bitsandbytes does not know; use NF4")


def table_name(codebook: Tensor) -> str:
    """Return bitsandbytes' name of a table of 16 values, nf4 or fp4, if it has one."""
    known = (k for k, table in KINDS.items() if torch.equal(codebook.cpu(), table))
    return next(known, "another table")


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def _part(name: str, part: str, tensors: Tensors) -> Tensor:
    if f"{name}.{part}" not in tensors.about:
        raise InputError(f"{name} is 4-bit and has no {part}; get the model again")
    return tensors.read(f"{name}.{part}")


def _state(name: str, tensors: Tensors) -> dict[str, Any]:
    keys = [key for key in tensors.about if key.startswith(f"{name}{STATE}")]
    if len(keys) != 1:
        raise InputError(f"{name} has no 4-bit state that can be read")
    text = tensors.read(keys[0]).numpy().tobytes()
    try:
        state: dict[str, Any] = json.loads(text)
        numbers = [state["blocksize"], *state["shape"]]
        numbers += [state["nested_blocksize"]] if "nested_blocksize" in state else []
        offset = float(state.get("nested_offset", 0.0))
        right = all(isinstance(n, int) and n > 0 for n in numbers) and offset == offset
        right &= state["dtype"] in ("float32", "float16", "bfloat16")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"the 4-bit state of {name} is damaged ({error}); get the model again"
        ) from None
    if not right:
        raise InputError(f"the 4-bit state of {name} is damaged ({text!r})")
    return state


def _check_sizes(name: str, q: Quantized) -> None:
    count = int(np.prod(q.shape))
    blocks = -(-count // q.blocksize)
    scales = q.absmax_codes if isinstance(q, Nested) else q.absmax
    wanted = {"codes": -(-count // 2), "scales": blocks}
    found = {"codes": q.packed.numel(), "scales": scales.numel()}
    if isinstance(q, Nested):
        wanted["nested scales"] = -(-blocks // q.nested_blocksize)
        found["nested scales"] = q.nested_absmax.numel()
    for part, size in wanted.items():
        if found[part] != size:
            raise InputError(
                f"{name} of shape {tuple(q.shape)} has {found[part]} {part}, not "
                f"{size}; get the model again"
            )
