"""The places of adapters in a language model, derived from its modules.

The places in `tiny` are fixed by the names that the book uses. In other models they
follow from the tree of modules: the modules in a list are the blocks, the children of a
block are its sublayers, and the last linear layer of a sublayer writes to the residual
stream.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minipeft.errors import InputError
from minipeft.torch.targets import ALL_LINEAR, all_linear, layers

Targets = Sequence[str] | str

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEYS = ("k_proj", "key", "k", "key_proj", "k_lin")
VALUES = ("v_proj", "value", "v", "value_proj", "v_lin")


@dataclass(frozen=True)
class Places:
    """Targets for `inject`, by their role in the model.

    Attributes:
        linears: every linear layer of the blocks, or the chosen ones.
        ends: the last linear layer of each sublayer.
        feedforward: the last linear layer of each feed-forward sublayer, where a block
            has two sublayers with linear layers.
        beside: feed-forward sublayers that are a module of their own.
        scaled: what IA3 scales: keys, values and the feed-forward; where keys and
            values are computed by one layer, every linear layer.
    """

    linears: Targets
    ends: Targets
    feedforward: Sequence[str]
    beside: Sequence[str]
    scaled: Targets


TINY = Places(
    LLAMA,
    ("o_proj", "down_proj"),
    ("down_proj",),
    ("mlp",),
    ("k_proj", "v_proj", "down_proj"),
)


def places(model: Any, asked: Targets = ALL_LINEAR) -> Places:
    """Return a model's places.

    Args:
        model: a language model.
        asked: the layers that adapters may stand on.

    Raises:
        InputError: a target matches nothing; the model has no blocks.
    """
    everything = list(all_linear(model))
    meant = layers(model, asked)
    wanted = [name for name in everything if name in meant] or list(meant)
    ends, feedforward, beside = [], [], []
    for block, sublayers in _blocks(model, everything).items():
        ends += [names[-1] for names in sublayers.values()]
        if len(sublayers) > 1:
            module = [*sublayers][-1]
            feedforward.append(sublayers[module][-1])
            beside += [module] if module != block else []
    feedforward = [name for name in feedforward if name in wanted]
    ends = [name for name in ends if name in wanted] or wanted
    return Places(asked, ends, feedforward, beside, _scaled(wanted, feedforward))


def block_of(name: str) -> int:
    """Return the number of the block that a layer's name stands in, 0 if none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else 0


def first_block(model: Any) -> nn.Module:
    """Return the first block of a model."""
    block: nn.Module = model.get_submodule(
        next(iter(_blocks(model, all_linear(model))))
    )
    return block


def _blocks(model: Any, names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return {block: {sublayer: its linear layers}}.

    Linear layers that lie in the block itself are one sublayer, as OPT's fc1 and fc2.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        within = re.match(r"(.*?\.\d+)\.(.+)", name)
        if within:
            block, rest = within.groups()
            child = rest.split(".")[0] if "." in rest else ""
            sublayer = f"{block}.{child}" if child else block
            found.setdefault(block, {}).setdefault(sublayer, []).append(name)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers; name "
            "the layers with --targets in a model that has one"
        )
    return found


def _scaled(wanted: list[str], feedforward: list[str]) -> list[str]:
    last = [(name.rpartition(".")[2], name) for name in wanted]
    apart = [name for part, name in last if part in (*KEYS, *VALUES)]
    return [n for n in wanted if n in apart or n in feedforward] if apart else wanted
