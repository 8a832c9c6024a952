"""Blocks of a large model with random weights in four bits, and what they need.

On the device `meta` their storages are recorded and replayed by the rules of torch's
allocator. On CUDA they train: `python -m minipeft.lab.blocks [FILE]` says whether pages
save a run there under the limit that the count gives, and writes what it finds to FILE.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from minipeft.errors import InputError
from minipeft.lab import spike
from minipeft.lab.caching import ROUND, SETTINGS, CachingAllocator, Part
from minipeft.lab.card import Card, clear
from minipeft.lab.files import write_atomic
from minipeft.lab.spike import Budget, Course, Ready, smallest
from minipeft.lab.storages import Event, Recorder, live
from minipeft.lab.train import Batch
from minipeft.torch import adamw, launches, operators
from minipeft.torch.codebook import NF4
from minipeft.torch.double_quant import Nested
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig
from minipeft.torch.paged import PagedAdamW, Paging
from minipeft.torch.qlora import QuantizedLinear
from minipeft.torch.targets import ALL_LINEAR, all_linear

WORKSPACES = [32 * 2**20] * 2
"""What cuBLAS keeps on a GPU of compute capability 9.0, once for the thread of forward
and once for that of backward; on others it is less, or the same.

Source: `parseChosenWorkspaceSize`, `setWorkspaceForHandle` and the pool of handles of
each thread in torch's `aten/src/ATen/cuda/CublasHandlePool.cpp`.
"""
BESIDE = 2**30
"""Bytes of a device for its context, kernels, and what torch does not count."""
SECONDS = 60.0
"""How long the smallest limits are looked for."""
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
    r: int = 512
    usual: int = 64
    long: int = 1024

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
            take_workspaces(device)
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


def take_workspaces(device: str) -> None:
    """Let cuBLAS take what it keeps, while nothing else lies in its segments."""
    if device.startswith("cuda"):
        one = torch.ones(16, 16, device=device, requires_grad=True)
        torch.autograd.backward((one @ one).sum())


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
        weights: bytes of each that stays, and of what cuBLAS keeps.
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

    def budget(self, page: int) -> Budget:
        """Return what decides who has room, by the count alone.

        With pages it is the smallest limit by the allocator's rules. Without, it is the
        bytes of the tensors that live at one time, which no allocator can do without.

        Args:
            page: values of one.
        """
        fixed, states = sum(self.weights), sum(self.states())
        whole = fixed + states + live(self.long[0])[0]
        return Budget(fixed, states, self.least(page), whole)


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
    weights = [*WORKSPACES, *weights]
    return Counted(weights, [p.numel() for p in trained], *both)


def unfit(size: float, device: str) -> str:
    """Say in one sentence why a limit tells nothing on a CUDA device; empty: it does.

    Args:
        size: bytes of the limit.
        device: `cuda` or `cuda:N`.
    """
    for name in SETTINGS:
        if name in os.environ:
            return (
                f"{name} is set to {os.environ[name]!r}, and the limit is counted for "
                "torch's allocator without it; unset it."
            )
    if (backend := torch.cuda.get_allocator_backend()) != "native":
        return f"torch's allocator is {backend}, which is not counted; use native."
    clear(device)
    free, total = torch.cuda.mem_get_info(device)
    if free < size + BESIDE:
        return (
            f"{(size + BESIDE) / 1e6:,.0f} MB must be free, and {free / 1e6:,.0f} of "
            f"{total / 1e6:,.0f} are; end what else runs on the device, or take one "
            "with more."
        )
    return ""


@dataclass
class Trial:
    """A spike under one limit, half way between what both runs need.

    Args:
        blocks: that train.
        paging: of the states.
        device: `cpu` or `cuda`; on CUDA the limit is counted, on a CPU measured.
        tell: is called with every fact, a name and its value, as it is found.
    """

    blocks: Blocks
    paging: Paging
    device: str
    tell: Callable[[str, object], None] = lambda name, value: None

    def __post_init__(self) -> None:
        self.course = self.blocks.course(steps=3, at=1)
        self.whole = self.blocks.ready(None, self.device)
        self.paged = self.blocks.ready(self.paging, self.device)
        if self.device.startswith("cuda"):
            counts = counted(self.blocks)
            self.budget = counts.budget(self.paging.page_size)
        else:
            both = self.whole, self.paged
            self.budget = spike.budget(*both, self.course, self.device)
        self.tell("limit", self.budget.size)
        self.tell("counted", self.budget._asdict())

    def run(self) -> tuple[bool, str]:
        """Try both runs.

        Returns:
            whether the run with pages ends and the other one ends at the long batch,
            and what happened.
        """
        size, found = self.budget.size, dict[str, spike.Attempt]()
        for name, make in (("with pages", self.paged), ("without", self.whole)):
            found[name] = spike.attempt(make, self.course, Card(size, self.device))
            ended = [step._asdict() for step in found[name].log]
            self.tell(name, {"steps": ended, "error": found[name].error})
        paged, whole = found.values()
        said = (
            f"limit {size / 1e6:,.0f} MB: with pages {len(paged.log)} of 3 steps"
            f"{_because(paged)}, without pages {len(whole.log)}{_because(whole)}"
        )
        both = len(whole.log) == self.course.at and len(paged.log) == self.course.steps
        return both, said

    def margins(self, seconds: float) -> str:
        """Look for the smallest limit of each run on CUDA, for half of a time each."""
        fixed, states, least, whole = self.budget
        card, began = Card(self.budget.size, self.device), time.monotonic()
        between = fixed, int(card.size)
        spare = spike.narrow(
            self.paged, card, self.course, between, began + seconds / 2
        )
        self.tell("with pages needs", spare)
        between = fixed + states, 2 * whole - least
        over = spike.narrow(self.whole, card, self.course, between, began + seconds)
        self.tell("without pages needs", over)
        return f"with pages a run needs {spare}, without {over}"


def _because(found: spike.Attempt) -> str:
    return f" ({found.error})" if found.error else ""


def stage(tell: Callable[[str, object], None]) -> bool:
    """Try the blocks on CUDA, look for the margins, and say whether pages decide.

    Args:
        tell: as in `Trial`.

    Raises:
        InputError: there is no device, or what happens on this one tells nothing.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "torch sees no CUDA device here, and this is tried on one alone; "
            "chapter 32 counts it on a CPU."
        )
    tell("device", torch.cuda.get_device_name("cuda"))
    tell("torch", torch.__version__)
    trial = Trial(Blocks(), Paging(budget=1000), "cuda", tell)
    if reason := unfit(trial.budget.size, "cuda"):
        raise InputError(reason)
    real, said = trial.run()
    print(said, flush=True)
    if reason := unfit(trial.budget.size, "cuda"):
        raise InputError(f"This tells nothing: {reason}")
    print(f"{said}; {trial.margins(SECONDS)}")
    return real


def main(path: str = "") -> int:
    """Return 0 if pages decide on CUDA, 1 if not, 2 if this machine cannot say."""
    facts: dict[str, object] = {}

    def tell(name: str, value: object) -> None:
        facts[name] = value
        if path:
            write_atomic(Path(path), (json.dumps(facts, indent=1) + "\n").encode())

    try:
        return 0 if stage(tell) else 1
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the end", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
