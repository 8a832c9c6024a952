"""Which method works on which class: each one on a tiny random model.

`python -m tests.lab.works` writes the page of the book.
"""

import functools
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

from minipeft.errors import InputError
from minipeft.torch.bottleneck import BottleneckConfig
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.hira import HiRAConfig
from minipeft.torch.ia3 import IA3Config
from minipeft.torch.inject import inject, merge, trainable_parameters, unload
from minipeft.torch.loftq import LoftQConfig
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.miss import MiSSConfig
from minipeft.torch.pissa import PiSSAConfig
from minipeft.torch.prefix import PrefixConfig, PrefixModel
from minipeft.torch.prompt import PromptConfig, PromptModel
from minipeft.torch.qlora import quantize_linears
from minipeft.torch.vera import VeRAConfig
from tests.lab.architectures import EVERY, build, operands

PAGE = Path(__file__).parents[2] / "site" / "works.md"
WORKS, NONE = "✓", "–"
STEP = 0.1


def _linear(config):
    return lambda model: inject(model, config, "all-linear")


def _qlora(model):
    quantize_linears(model, blocksize=16)
    return inject(model, LoRAConfig(2, 4.0), "all-linear")


@dataclass(frozen=True)
class Method:
    """How a model gets the adapters of a row, and whether they can be merged."""

    inject: Callable
    merges: bool = True


METHODS = {
    "LoRA": Method(_linear(LoRAConfig(2, 4.0))),
    "DoRA": Method(_linear(DoRAConfig(2, 4.0))),
    "VeRA": Method(_linear(VeRAConfig(2))),
    "IA3": Method(_linear(IA3Config())),
    "HiRA": Method(_linear(HiRAConfig(2))),
    "MiSS": Method(_linear(MiSSConfig(2))),
    "PiSSA": Method(_linear(PiSSAConfig(2, 4.0))),
    "LoftQ": Method(_linear(LoftQConfig(2, 4.0, blocksize=16, steps=1))),
    "QLoRA": Method(_qlora),
    "LoRA on experts": Method(
        lambda model: inject(model, LoRAConfig(2, 4.0), ["experts"])
    ),
    "bottleneck": Method(_linear(BottleneckConfig(2)), merges=False),
    "prefix": Method(lambda m: PrefixModel(m, PrefixConfig(2)), merges=False),
    "prompt": Method(lambda m: PromptModel(m, PromptConfig(2)), merges=False),
}


@functools.lru_cache(maxsize=1)  # all methods use one model
def _built(name: str):
    return build(name)


def outcome(method: str, name: str) -> str:
    """Build, inject, take a step, merge: return `WORKS`, or the refusal."""
    model = deepcopy(_built(name))
    if method == "LoRA on experts" and not _has_experts(model):
        return NONE
    try:
        model = METHODS[method].inject(model)
        first = model(**operands(name))
        first.loss.backward()
    except InputError as error:
        return str(error)
    trained = trainable_parameters(model)
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    assert any(p.grad is not None and p.grad.any() for p in trained)
    with torch.no_grad():
        for p in trained:
            p -= STEP * (0 if p.grad is None else p.grad)
        moved = model(**operands(name)).logits
        size = (moved - first.logits).abs().max()
        assert size > 0
        if METHODS[method].merges:
            apart = (merge(model)(**operands(name)).logits - moved).abs().max()
            # A wrong merge differs by as much as the step has changed the output.
            assert apart < size / 4 or apart < moved.abs().max() * 2.0**-18
            plain = unload(model)(**operands(name)).logits
            assert (plain - moved).abs().max() <= 2 * apart or apart == 0
    return WORKS


def _has_experts(model) -> bool:
    return any(
        name.rpartition(".")[2] == "experts" for name, _ in model.named_modules()
    )


def table(found: dict[tuple[str, str], str]) -> str:
    """Draw the page; a sentence that several cells share gets one number."""
    sentences = list(dict.fromkeys(s for s in found.values() if s not in (WORKS, NONE)))
    lines = [
        "| class | " + " | ".join(METHODS) + " |",
        "|:--|" + ":-:|" * len(METHODS),
    ]
    for name in EVERY:
        marks = [_mark(found[method, name], sentences) for method in METHODS]
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    notes = [f"{i}. {sentence}" for i, sentence in enumerate(sentences, start=1)]
    return "\n".join([HEAD, *lines, "", FOOT, "", *notes, ""])


def _mark(sentence: str, sentences: list[str]) -> str:
    return sentence if sentence in (WORKS, NONE) else str(sentences.index(sentence) + 1)


HEAD = f"""# What works where

Each cell is a test: a tiny model of the class of `transformers` gets random weights and
the adapters of the method, computes a loss and its gradients, takes a step, and is
merged where the method merges.

- {WORKS} all of it works;
- {NONE} the model has no experts;
- a number: it is refused, and the sentence with this number below the table says why.

The methods for linear layers have the target `"all-linear"`, LoRA on experts the target
`experts`; QLoRA is LoRA on `quantize_linears`. `python -m tests.lab.works` writes this
page, and a test compares it.
"""
FOOT = "The sentences, as the library prints them:"


def every(names: Iterable[str] = EVERY) -> dict[tuple[str, str], str]:
    """Return the outcomes of all methods and classes."""
    return {
        (method, name): outcome(method, name) for name in names for method in METHODS
    }


def read(page: str) -> dict[tuple[str, str], str]:
    """Return the outcomes that a page shows."""
    sentences = dict(re.findall(r"^(\d+)\. (.+)$", page, re.M))
    found = {}
    for name, cells in re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.M):
        for method, mark in zip(METHODS, cells.split(" | "), strict=True):
            found[method, name] = sentences.get(mark, mark)
    return found


if __name__ == "__main__":
    PAGE.write_text(table(every()), encoding="utf-8")
