"""The cost of training and decoding on a GPU, compared with bitsandbytes and peft.

    python -m minipeft.lab.gpu.bench NAME [--device cuda] [--out FILE]

Each pair runs in one process, in turns as in `lab.bench` on a CPU. CUDA's events
measure the time; the peak of allocated memory is measured too. If a peer is not
installed, only our side is timed, and the row shows the reason.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minipeft.errors import InputError
from minipeft.lab import memory_peak, timing
from minipeft.lab.files import write_atomic
from minipeft.lab.models import pick_device
from minipeft.lab.timing import Clock, Pair, Turn
from minipeft.torch import adamw, blockwise, operators, qlora
from minipeft.torch.codebook import NF4
from minipeft.torch.dora import DoRAConfig
from minipeft.torch.inject import inject, trainable_parameters
from minipeft.torch.lora import LoRAConfig

ROUNDS = 9
RANK, ALPHA = 16, 32
LR = 1e-4
OF_MODELS = ("-512", "-2048")
"""How the names of the pairs end that build a model."""


@dataclass(frozen=True)
class Sizes:
    """Those of Llama with 7 billion parameters, two blocks of it.

    Args:
        width: of the residual stream, and in_features of a single weight.
        inner: of the feed-forward network, and out_features of a single weight.
        heads: of attention.
        blocks: of the model.
        vocabulary: small, for the output layer is not what is measured.
    """

    width: int = 4096
    inner: int = 11008
    heads: int = 32
    blocks: int = 2
    vocabulary: int = 1024


@dataclass(frozen=True)
class Measurement:
    """The measurements of a pair.

    Args:
        name: of the operation that was measured.
        against: the name of the other library.
        ours: milliseconds.
        theirs: milliseconds, or why there is no such number.
        ratio: median of the turns' ours / theirs; its smallest and its largest.
        our_peak: bytes allocated at one time beyond what lives before the turn.
        their_peak: likewise.
        note: other findings.
    """

    name: str
    against: str
    ours: float
    theirs: float | str
    ratio: float | None = None
    smallest: float | None = None
    largest: float | None = None
    our_peak: int = 0
    their_peak: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """Two implementations; theirs may be missing, with the reason."""

    name: str
    against: str
    ours: Turn
    theirs: Turn | str
    note: str = ""


Place = torch.device


def measure(made: Bench, device: str, clock: Clock) -> Measurement:
    """Time both in turns, and measure the memory that each allocates."""
    theirs = made.theirs
    ours = memory_peak.peak_bytes(made.ours, device)
    if isinstance(theirs, str):
        # In turns with itself: the same number of calls, at the same distances.
        alone = timing.measure(_pair(made, lambda: made.ours()), ROUNDS, clock)
        return Measurement(made.name, made.against, alone.ours, theirs, our_peak=ours)
    row = timing.measure(_pair(made, theirs), ROUNDS, clock)
    return Measurement(
        name=made.name,
        against=made.against,
        ours=row.ours,
        theirs=row.theirs,
        ratio=row.ratio,
        smallest=row.smallest,
        largest=row.largest,
        our_peak=ours,
        their_peak=memory_peak.peak_bytes(theirs, device),
        note=made.note,
    )


def _pair(made: Bench, theirs: Turn) -> Pair:
    return Pair(made.name, made.against, made.ours, theirs, math.inf)


def _peer(name: str, build: Callable[[], Turn]) -> Turn | str:
    """Build a peer's turn, or say why there is none."""
    try:
        return build()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a stranger may fail in any way
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{name} failed: {first}"


def _normal(place: Place, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(place).manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, device=place) * 0.02
    return drawn.to(torch.bfloat16)


# One weight


def quantize(sizes: Sizes, place: Place) -> Bench:
    """NF4 of one weight in bfloat16, blocks of 64."""
    W = _normal(place, sizes.inner, sizes.width)
    codebook = NF4.to(place)

    def build() -> Turn:
        from bitsandbytes.functional import quantize_4bit

        return lambda: quantize_4bit(W, blocksize=64, quant_type="nf4")

    ours: Turn = lambda: operators.quantize(W, codebook, 64)  # noqa: E731
    return Bench("NF4 quantize", "bitsandbytes", ours, _peer("bitsandbytes", build))


def dequantize(sizes: Sizes, place: Place) -> Bench:
    """Dequantize to bfloat16."""
    W = _normal(place, sizes.inner, sizes.width)
    parts = operators.parts(blockwise.quantize(W, NF4, 64))

    def build() -> Turn:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(W, blocksize=64, quant_type="nf4")
        return lambda: dequantize_4bit(packed, state)

    ours: Turn = lambda: operators.dequantize(*parts, W.dtype)  # noqa: E731
    return Bench("NF4 dequantize", "bitsandbytes", ours, _peer("bitsandbytes", build))


def product(rows: int) -> Callable[[Sizes, Place], Bench]:
    """A few rows of x times a weight of 4 bits."""

    def made(sizes: Sizes, place: Place) -> Bench:
        W = _normal(place, sizes.inner, sizes.width)
        x = _normal(place, rows, sizes.width, seed=1)
        parts = operators.parts(blockwise.quantize(W, NF4, 64))

        def build() -> Turn:
            from bitsandbytes import matmul_4bit
            from bitsandbytes.functional import quantize_4bit

            packed, state = quantize_4bit(W, blocksize=64, quant_type="nf4")
            return lambda: matmul_4bit(x, packed.t(), state)

        ours: Turn = lambda: operators.matmul_4bit(x, *parts, None)  # noqa: E731
        name = f"4-bit product, {rows} row{'s' * (rows > 1)}"
        return Bench(name, "bitsandbytes", ours, _peer("bitsandbytes", build))

    return made


def optimizer(sizes: Sizes, place: Place) -> Bench:
    """A step of AdamW with states of eight bits, for one weight in bfloat16."""

    def parameter() -> nn.Parameter:
        p = nn.Parameter(_normal(place, sizes.inner, sizes.width))
        p.grad = _normal(place, sizes.inner, sizes.width, seed=1)
        return p

    def build() -> Turn:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit([parameter()], lr=LR).step

    ours = adamw.AdamW([parameter()], lr=LR, bits=8)
    theirs = _peer("bitsandbytes", build)
    return Bench("8-bit AdamW", "bitsandbytes", ours.step, theirs)


# Steps of training


def _step(run: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Turn:
    chooser = torch.optim.AdamW(parameters, lr=LR)

    def turn() -> Tensor:
        chooser.zero_grad(set_to_none=True)
        loss = run()
        torch.autograd.backward(loss)
        chooser.step()
        return loss.detach()

    return turn


def dora(sizes: Sizes, place: Place) -> Bench:
    """A step of DoRA on one layer in bfloat16, 512 rows of x."""
    x = _normal(place, 512, sizes.width, seed=1)

    def base() -> nn.Sequential:
        torch.manual_seed(0)
        layer = nn.Linear(sizes.width, sizes.width, device=place, dtype=torch.bfloat16)
        return nn.Sequential(layer)

    def run(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(x).float().square().mean()

    def build() -> Turn:
        import peft

        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=r"\d+", use_dora=True
        )
        model = peft.get_peft_model(base(), config)
        return _step(run(model), [p for p in model.parameters() if p.requires_grad])

    ours = inject(base(), DoRAConfig(RANK, ALPHA), ["*"])
    turn = _step(run(ours), trainable_parameters(ours))
    return Bench("DoRA step", "peft", turn, _peer("peft", build))


def qlora_step(tokens: int) -> Callable[[Sizes, Place], Bench]:
    """A step of QLoRA on blocks of a Llama, one sequence of this many tokens."""

    def made(sizes: Sizes, place: Place) -> Bench:
        drawn = torch.randint(sizes.vocabulary, (1, tokens)).to(place)

        def run(model: nn.Module) -> Callable[[], Tensor]:
            return lambda: model(input_ids=drawn, labels=drawn).loss

        def build() -> Turn:
            import peft

            config = peft.LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
            )
            base = _in_four_bits(_llama(sizes, tokens, place))
            model = peft.get_peft_model(base, config)
            return _step(run(model), [p for p in model.parameters() if p.requires_grad])

        base = qlora.quantize_linears(_llama(sizes, tokens, place))
        ours = inject(base, LoRAConfig(RANK, ALPHA), "all-linear")
        turn = _step(run(ours), trainable_parameters(ours))
        theirs = _peer("bitsandbytes and peft", build)
        name = f"QLoRA step, {tokens} tokens"
        return Bench(name, "bitsandbytes + peft", turn, theirs, _losses(turn, theirs))

    return made


def _losses(ours: Turn, theirs: Turn | str) -> str:
    """Return the first loss of each model: the same base, B = 0 in both."""
    if isinstance(theirs, str):
        return ""
    losses = [float(turn()) for turn in (ours, theirs)]  # type: ignore[arg-type]
    return f"first loss {losses[0]:.4f}, theirs {losses[1]:.4f}"


def _llama(sizes: Sizes, tokens: int, place: Place) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_attention_heads=sizes.heads,
        num_hidden_layers=sizes.blocks,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    with place:
        return LlamaForCausalLM(config).to(torch.bfloat16)


def _in_four_bits(model: Any) -> Any:
    """Put bitsandbytes' nested 4-bit layers in the place of the linear ones."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            there = Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            W = layer.weight.data.cpu()
            there.weight = Params4bit(
                W, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], there.to(layer.weight.device))
    return model


PAIRS: dict[str, Callable[[Sizes, Place], Bench]] = {
    "nf4-quantize": quantize,
    "nf4-dequantize": dequantize,
    "product-1": product(1),
    "product-4": product(4),
    "adamw-8bit": optimizer,
    "dora-step": dora,
    "qlora-512": qlora_step(512),
    "qlora-2048": qlora_step(2048),
}


def table(rows: Sequence[Measurement]) -> str:
    """Lay the rows out as Markdown; a ratio below 1 is in our favour."""
    lines = [
        "| what | against | ours, ms | theirs, ms | ours / theirs | min to max "
        "| our peak, MB | theirs, MB | |",
        "|:--|:--|--:|--:|--:|:-:|--:|--:|:--|",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def summary(folder: Path) -> str:
    """Tell what `make gpu` wrote to a folder: the machine, each verdict, the ratios."""
    if not (folder / "gpu.json").is_file():
        return "no results of `make gpu` are here"
    ran = json.loads((folder / "gpu.json").read_text("utf-8"))
    said = [f"{name}: {fact}" for name, fact in ran["facts"].items()]
    for verdict in ("passed", "failed", "left out", "unfinished"):
        of_it = [n for n, step in ran["steps"].items() if step["verdict"] == verdict]
        said += ["", f"{verdict}: {', '.join(of_it)}"] if of_it else []
    files = [folder / f"bench-{name}.json" for name in PAIRS]
    found = [json.loads(f.read_text("utf-8")) for f in files if f.is_file()]
    return "\n".join([*said, "", table([Measurement(**row) for row in found])])


def _line(row: Measurement) -> str:
    cells = [row.name, row.against, f"{row.ours:.3f}"]
    peak = f"{row.our_peak / 1e6:.1f}"
    if isinstance(row.theirs, str):
        cells += ["not measured", "", "", peak, "", row.theirs]
    else:
        span = f"{row.smallest:.2f} to {row.largest:.2f}"
        cells += [f"{row.theirs:.3f}", f"{row.ratio:.2f}", span, peak]
        cells += [f"{(row.their_peak or 0) / 1e6:.1f}", row.note]
    return f"| {' | '.join(cells)} |"


def run(name: str, device: str, sizes: Sizes | None = None) -> Measurement:
    """Build and measure one pair.

    Raises:
        InputError: if there is no such pair, or no such device.
    """
    if name not in PAIRS:
        raise InputError(f"there is no pair {name!r}; choose of {list(PAIRS)}")
    device = pick_device(device)
    made = PAIRS[name](sizes or Sizes(), torch.device(device))
    on_cuda = device.startswith("cuda")
    clock = partial(timing.events, device=device) if on_cuda else timing.wall
    return replace(measure(made, device, clock), name=made.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one pair, print its row, write it as JSON; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help=", ".join(PAIRS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    try:
        row = run(options.name, options.device)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.out:
        text = json.dumps(asdict(row), indent=1, ensure_ascii=False) + "\n"
        write_atomic(options.out, text.encode())
    print(table([row]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
