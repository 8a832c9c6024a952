"""Open a model's tensors in any format: safetensors, folders, 4 bits, GGUF."""

import json
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


def architecture(path: str | Path) -> str:
    """Return transformers' class of a model by its config.json; "" if none names it.

    Args:
        path: the model's folder, or its file of tensors beside the config.json.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        names = json.loads((folder / "config.json").read_text("utf-8"))["architectures"]
        return names[0] if isinstance(names[0], str) else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""
