"""One fine-tuning as a person orders it: a method of the book and its settings."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minipeft.errors import InputError
from minipeft.lab.models import recompute_blocks
from minipeft.lab.places import Places
from minipeft.lab.train import TrainConfig
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import Config, inject
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.vera import VeRAConfig

TINY_WIDTH = 128
RATES = {
    "full": 3e-3,
    "lora": 1e-2,
    "rslora": 3e-3,
    "qlora": 1e-2,
    "dora": 1e-2,
    "pissa": 3e-3,
    "loftq": 1e-2,
    "hira": 1e-2,
    "miss": 3e-3,
    "vera": 1e-1,
    "ia3": 1e-1,
    "bottleneck": 1e-2,
    "prefix": 3e-1,
    "prompt": 1.0,
}
"""The best rate on `tiny` that the chapters of the book found, to one digit."""
METHODS = tuple(RATES)
RANKED = ("vera", "miss")
"""The methods, LoRA's apart, whose update has no higher rank than their own."""

Configs = Mapping[str, Callable[[int, Places], Config]]
CONFIGS: Configs = {
    "lora": lambda r, _: LoRAConfig(r, 2 * r),
    "rslora": lambda r, _: LoRAConfig(r, 2 * r, rank_stabilized=True),
    "qlora": lambda r, _: LoRAConfig(r, 2 * r),
    "dora": lambda r, _: DoRAConfig(r, 2 * r),
    "pissa": lambda r, _: PiSSAConfig(r, 2 * r),
    "loftq": lambda r, _: LoftQConfig(r, 2 * r, steps=1),
    "hira": lambda r, _: HiRAConfig(r),
    "miss": lambda r, _: MiSSConfig(r),
    "vera": lambda r, _: VeRAConfig(r),
    "ia3": lambda _, places: IA3Config(places.feedforward),
    "bottleneck": lambda r, _: BottleneckConfig(r),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of a run.

    Attributes:
        method: one of `METHODS`.
        rank: of a bottleneck its width, of virtual tokens their number.
        batch: examples whose gradient is taken at once.
        accumulate: batches of a step.
        lr: learning rate; None: by the method and the width of the model.
        recompute: whether activations are computed again instead of kept.
    """

    method: str
    rank: int
    batch: int
    accumulate: int
    lr: float | None
    recompute: bool

    @property
    def quantize(self) -> str | None:
        """How the linear layers are stored while they are read."""
        return "nf4-double" if self.method == "qlora" else None

    def prepared(self, model: Any, places: Places, seed: int = 0) -> Any:
        """Return the model with what trains in it; the model is changed.

        Args:
            model: from `Chapter.load`, quantized as `quantize` says.
            places: where adapters stand.
            seed: of their start.

        Raises:
            InputError: the method does not fit the model.
        """
        torch.manual_seed(seed)
        if self.recompute:
            recompute_blocks(model)
        if self.method == "full":
            return model.requires_grad_(True)
        if self.method == "prefix":
            return PrefixModel(model, PrefixConfig(self.rank))
        if self.method == "prompt":
            return PromptModel(model, PromptConfig(self.rank))
        config = CONFIGS[self.method](self.rank, places)
        ends = {"ia3": places.scaled, "bottleneck": places.ends}
        return inject(model, config, ends.get(self.method, places.linears))

    def settings(self, model: Any, steps: int) -> TrainConfig:
        """Return what the training loop takes: a tenth of the steps warms up.

        Args:
            model: from `Chapter.load`; the learning rate depends on its width.
            steps: of the run.
        """
        wide = model.get_input_embeddings().weight.shape[1] > TINY_WIDTH
        lr = self.lr or RATES[self.method] / (10 if wide else 1)
        every = -(-steps // 3)
        return TrainConfig(
            steps,
            lr,
            warmup=steps // 10,
            validate_every=every,
            accumulate=self.accumulate,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a run to a chapter's options."""
    method = "a method of the book (default: %(default)s)"
    parser.add_argument("--method", choices=METHODS, default="lora", help=method)
    rank = (
        "rank; width of a bottleneck, number of virtual tokens (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=16, metavar="R", help=rank)
    batch = "examples at once (default: %(default)s)"
    parser.add_argument("--batch", type=int, default=1, metavar="N", help=batch)
    times = "batches whose gradients make one step (default: %(default)s)"
    parser.add_argument("--accumulate", type=int, default=4, metavar="N", help=times)
    lr = "learning rate (default: the book's, a tenth of it in wider models)"
    parser.add_argument("--lr", type=float, metavar="X", help=lr)
    again = "keep no activations inside a block, compute them again"
    parser.add_argument("--recompute", action="store_true", help=again)


def recipe(options: argparse.Namespace) -> Recipe:
    """Return the settings that were asked for.

    Raises:
        InputError: a number is below 1, or the learning rate is not positive.
    """
    for name in ("rank", "batch", "accumulate"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; give at least 1")
    if options.lr is not None and not options.lr > 0:
        raise InputError(f"--lr is {options.lr}; give a positive number")
    return Recipe(**vars(options))


def fingerprint(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the SHA-256 of the training examples, for the file of an adapter."""
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
