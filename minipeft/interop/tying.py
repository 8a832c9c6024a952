"""A head that shares the weight of the embedding, and adapters that pull them apart.

A model with tied weights keeps one tensor for the two. An adapter that changes only one
of the two leaves a model with two tensors; its file needs both, and its configuration
must say so, or a loader computes the head from the embedding again.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minipeft.interop.adapter import Adapter
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import PIECE, About, Tensors

HEAD = "lm_head.weight"
EMBEDDING = re.compile(
    r"(?:.+\.)?(?:embed_tokens|wte|word_embeddings|embed_in)\.weight"
)
KEY = "tie_word_embeddings"


class Untied:
    """Tensors of a base with tied weights, with the head as a tensor of its own.

    Args:
        source: of the tensors.
        embedding: the name of the weight that the head shares.
    """

    def __init__(self, source: Tensors, embedding: str):
        self._source, self._embedding = source, embedding
        self.about: Mapping[str, About] = {
            **source.about,
            HEAD: source.about[embedding],
        }
        self.metadata: Mapping[str, str] = source.metadata

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._source.read(self._embedding if name == HEAD else name)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a piece at a time."""
        return self._source.pieces(self._embedding if name == HEAD else name, size)


def pulled_apart(
    base: Tensors, adapter: Adapter, ties: bool
) -> tuple[Tensors, Adapter]:
    """Return base and adapter; the base with a head, if the adapter changes one of two.

    An adapter of peft with `ensure_weight_tying` changes both alike, and they stay one
    tensor.

    Args:
        base: the model's tensors.
        adapter: by the names in its file.
        ties: whether the model shares the weight, if the file has no head.
    """
    embeddings = [name for name in base.about if EMBEDDING.fullmatch(name)]
    if not ties or counterpart(HEAD, base.about) or len(embeddings) != 1:
        return base, adapter
    (embedding,) = embeddings
    if adapter.config.get("ensure_weight_tying"):
        return base, _without_head(adapter)
    for name in (*adapter.updates, *adapter.saved):
        if name == HEAD or counterpart(name, base.about) == embedding:
            return Untied(base, embedding), adapter
    return base, adapter


def ties(folder: str | Path) -> bool:
    """Return whether a folder's model shares the weight, as its configuration says.

    A causal model whose configuration does not say it follows transformers' default,
    which is to share.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        parts = [config, config.get("text_config") or {}]
        said = [part[KEY] for part in parts if KEY in part]
        names = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return any(said) if said else causal


def untie(config: dict[str, Any]) -> None:
    """Write into a configuration that the head has a weight of its own."""
    config[KEY] = False
    for part in config.values():
        if isinstance(part, dict) and KEY in part:
            part[KEY] = False


def _without_head(adapter: Adapter) -> Adapter:
    return replace(
        adapter,
        updates={n: u for n, u in adapter.updates.items() if n != HEAD},
        saved={n: t for n, t in adapter.saved.items() if n != HEAD},
        tables={n: t for n, t in adapter.tables.items() if n != HEAD},
    )
