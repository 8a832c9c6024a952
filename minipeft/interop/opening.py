"""Open a model's tensors in any format: safetensors, folders, 4 bits, GGUF."""

from pathlib import Path

from minipeft.interop.bitsandbytes_format import STATE, FourBitTensors
from minipeft.interop.tensors import Tensors, open_tensors


def open_model(path: str | Path) -> Tensors:
    """Return a model's tensors by transformers' names; packed tensors are decoded.

    Raises:
        InputError: the format is unknown, or the file is absent or damaged.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from minipeft.interop.gguf_format import GgufTensors

        return GgufTensors(path)
    tensors = open_tensors(path)
    packed = any(STATE in name for name in tensors.about)
    return FourBitTensors(tensors) if packed else tensors
