"""Blocks of a large model with random weights in four bits, and what they need.

On CUDA they train: `python -m minipeft.lab.blocks` says whether pages save a run there.
On the device `meta` their storages are recorded and replayed by the rules of torch's
allocator; an H200 did not confirm the answer that they predict.
"""

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from minipeft.errors import InputError
from minipeft.lab import spike
from minipeft.lab.caching import ROUND, CachingAllocator, Part
from minipeft.lab.card import Card
from minipeft.lab.models import pick_device
from minipeft.lab.spike import Course, Ready, smallest
from minipeft.lab.storages import Event, Recorder
from minipeft.lab.train import Batch
from minipeft.torch import adamw, launches, operators
from minipeft.torch.codebook import NF4
from minipeft.torch.double_quant import Nested
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.paged import PagedAdamW, Paging
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.targets import ALL_LINEAR, all_linear

SCALE = 0.04
"""Of every block of 64 weights: random codes of NF4 times it spread by about 0.02."""
BLOCKSIZE, NESTED = 64, 256


@dataclass(frozen=True)
class Blocks:
    """Blocks of Llama 2 70B, its sizes and QLoRA's adapter.

    Attributes:
        count: of blocks, of the model's 80.
        width: of the residual stream.
        inner: of the feed-forward network.
        heads: of attention.
        groups: of heads that share keys and values.
        vocabulary: tokens.
        r: the rank on every linear layer.
        usual: tokens of a batch.
        long: tokens of the longer batch.
    """

    count: int = 10
    width: int = 8192
    inner: int = 28672
    heads: int = 64
    groups: int = 8
    vocabulary: int = 32000
    r: int = 64
    usual: int = 64
    long: int = 512

    def model(self, device: str) -> Any:
        """Return the model with adapters, bfloat16 over four bits; always the same."""
        config = self.config()
        torch.manual_seed(0)
        with torch.device("meta"), no_init_weights():
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        for name, layer in all_linear(model).items():
            model.set_submodule(name, _random_codes(cast(nn.Linear, layer), device))
        rotation = type(model.model.rotary_emb)  # holds values, which meta has none of
        model.model.rotary_emb = rotation(config).to(device)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    setattr(module, name, _random(parameter, device))
        with torch.device(device):
            return inject(model, LoRAConfig(self.r, 16), ALL_LINEAR).train()

    def config(self) -> Any:
        """Return the sizes for transformers; plain attention repeats its bits."""
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.count,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            use_cache=False,
            attn_implementation="eager",
            dtype=torch.bfloat16,
        )

    def batch(self, tokens: int, seed: int = 0) -> Batch:
        """Return one sequence of random tokens, with its causal mask."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (1, tokens), generator=generator)
        hidden = torch.full((tokens, tokens), torch.finfo(torch.bfloat16).min)
        mask = hidden.triu(1).to(torch.bfloat16)[None, None]
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}

    def course(self, steps: int, at: int) -> Course:
        """Return a run in which one batch is longer."""
        long = self.batch(self.long, steps)
        return Course(lambda k: self.batch(self.usual, k), long, at, steps)

    def ready(self, paging: Paging | None, device: str) -> Ready:
        """Return what makes the model and an optimizer of 8 bits, paged or not."""

        def make() -> tuple[nn.Module, torch.optim.Optimizer]:
            model = self.model(device)
            trained = trainable_parameters(model)
            use: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "bits": 8}
            optimizer = (
                PagedAdamW(trained, **use, paging=paging)
                if paging
                else adamw.AdamW(trained, **use)
            )
            spike.ready(model, optimizer)
            return model, optimizer

        return make


class _AsOnAGPU(QuantizedLinear):
    """Decodes by the operator, which makes one tensor, of the weight's size.

    Attributes:
        fused: whether the product takes the codes, as for few rows; backward decodes.
    """

    fused = False

    def runs_kernels(self, dtype: torch.dtype) -> bool:
        return self.fused

    def decoded(self, dtype: torch.dtype) -> Tensor:
        return operators.dequantize_nested(*operators.parts(self.q), dtype)


def _random_codes(layer: nn.Linear, device: str) -> QuantizedLinear:
    n, blocks = layer.weight.numel(), layer.weight.numel() // BLOCKSIZE
    codes = torch.randint(256, (n // 2,), dtype=torch.uint8, device=device)
    q = Nested(
        codes,
        torch.zeros(blocks, dtype=torch.uint8, device=device),
        torch.zeros(-(-blocks // NESTED), device=device),
        torch.full((), SCALE, device=device),
        NF4.to(device),
        BLOCKSIZE,
        NESTED,
        tuple(layer.weight.shape),
    )
    kind = _AsOnAGPU if device == "meta" else QuantizedLinear
    return kind(q, None, torch.bfloat16)


def _random(parameter: Tensor, device: str) -> nn.Parameter:
    whole = torch.ones if parameter.dim() == 1 else torch.randn
    values = whole(parameter.shape, dtype=parameter.dtype, device=device)
    return nn.Parameter(values.mul_(1 if parameter.dim() == 1 else 0.02), False)


@dataclass(frozen=True)
class Counted:
    """The storages of a run, recorded on `meta`.

    Attributes:
        weights: bytes of each that stays.
        trained: values of each trained tensor.
        usual: what comes and goes in a pass, and after it with the gradients.
        long: the same of the longer batch.
    """

    weights: Sequence[int]
    trained: Sequence[int]
    usual: tuple[Sequence[Event], Sequence[Event]]
    long: tuple[Sequence[Event], Sequence[Event]]

    def states(self, page: int | None = None) -> list[int]:
        """Return the bytes of each tensor of the states of 8 bits.

        Args:
            page: values of one; None: whole parameters.
        """
        return [
            size
            for n in self.trained
            for start in range(0, n, page or n)
            for values in [min(page or n, n - start)]
            for size in 2 * (values, 4 * -(-values // adamw.BLOCKSIZE))
        ]

    def finished(self, limit: float, page: int | None = None) -> int:
        """Return how many of three steps end: a usual one, the long one, a usual one.

        Args:
            limit: bytes that the allocator may take.
            page: values of one; None: states that stay.
        """
        run, done = _Replay(self, page), 0
        run.allocator.limit = limit
        with suppress(torch.OutOfMemoryError):
            for batch in (self.usual, self.long, self.usual):
                run.step(batch, batch is self.long)
                done += 1
        return done

    def least(self, page: int | None = None) -> int:
        """Return the smallest limit, to 2 MiB, with which all three steps end."""
        return smallest(
            lambda size: self.finished(size, page) == 3, sum(self.weights), ROUND
        )


class _Replay:
    """A run on the allocator, its states made as `spike.ready` makes them."""

    def __init__(self, counted: Counted, page: int | None):
        self.allocator, self.held = CachingAllocator(), dict[int, Part]()
        self.stream = 1 if page else 0  # pages are copied on a stream of their own
        self.sizes = counted.states(page)
        for size in counted.weights:
            self.allocator.allocate(size)  # and stays
        zeros = [self.allocator.allocate(4 * n) for n in counted.trained]
        self.pages = self.bring()
        for part in zeros:
            self.allocator.release(part)
        self.allocator.give_back()

    def bring(self) -> list[Part]:
        return [self.allocator.allocate(n, self.stream) for n in self.sizes]

    def leave(self, pages: list[Part]) -> None:
        """Release all pages but the last one; a page is four tensors."""
        for part in pages[:-4]:
            self.allocator.release(part)
        del pages[:-4]

    def step(self, batch: tuple[Sequence[Event], Sequence[Event]], long: bool) -> None:
        paged = bool(self.stream) and long
        if paged:
            self.leave(self.pages)
        self.play(batch[0])
        if paged:
            kept = self.pages
            self.pages = [
                self.allocator.allocate(n, self.stream) for n in self.sizes[:-4]
            ] + kept
        self.play(batch[1])

    def play(self, events: Iterable[Event]) -> None:
        for key, size in events:
            if size is None:
                self.allocator.release(self.held.pop(key))
            else:
                self.held[key] = self.allocator.allocate(size)


def counted(blocks: Blocks) -> Counted:
    """Record a usual and a long pass of these blocks; nothing is computed."""
    model = blocks.model("meta")
    trained = trainable_parameters(model)
    recorder = Recorder()
    recorder.note([*model.parameters(), *model.buffers()])
    weights = [event.size or 0 for event in recorder.events]

    def passed(tokens: int) -> tuple[Sequence[Event], Sequence[Event]]:
        batch = {k: v.to("meta") for k, v in blocks.batch(tokens).items()}
        for module in model.modules():
            if isinstance(module, _AsOnAGPU):
                module.fused = tokens <= launches.SHARED[torch.bfloat16]
        began = len(recorder.events)
        recorder.note(batch.values())
        with recorder:
            model(**batch).loss.backward()
        del batch
        ended = len(recorder.events)
        for parameter in trained:
            parameter.grad = None
        return recorder.events[began:ended], recorder.events[ended:]

    both = passed(blocks.usual), passed(blocks.long)
    return Counted(weights, [p.numel() for p in trained], *both)


def trial(blocks: Blocks, paging: Paging, device: str) -> tuple[bool, str]:
    """Try a spike on a card half way between what both runs need.

    Args:
        blocks: that train.
        paging: of the states.
        device: `cpu` or `cuda`.

    Returns:
        whether the run with pages ends and the other one does not, and what happened.
    """
    course = blocks.course(steps=3, at=1)
    makers = blocks.ready(None, device), blocks.ready(paging, device)
    budget = spike.budget(*makers, course, device)
    size, saved = budget.size, budget.whole - budget.least
    whole, paged = (spike.attempt(make, course, Card(size, device)) for make in makers)
    ended, steps = len(whole.log), len(paged.log)
    said = (
        f"pages save {saved / 1e6:,.1f} MB of {budget.states / 1e6:,.1f}; "
        f"limit {size / 1e6:,.0f} MB: without pages {ended} of 3 steps "
        f"({whole.error}), with pages {steps}"
    )
    return ended == course.at and steps == course.steps, said


if __name__ == "__main__":
    try:
        card = pick_device("cuda")
    except InputError as error:
        sys.exit(str(error))
    real, said = trial(Blocks(), Paging(budget=1000), card)
    print(said)
    sys.exit(0 if real else 1)
