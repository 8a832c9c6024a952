"""`minipeft memory CONFIG`: what a run needs, before anything is loaded.

Exit code 0: counted; 2: the input was wrong, and one sentence on stderr says why.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

EXAMPLE = (
    "minipeft memory config.json --method lora -r 16 --base nf4-double --sequence 1024"
)
STAYS = {
    "embeddings": "looked up, not multiplied",
    "output layer": "its errors would be the words'",
    "norms, biases, routers": "vectors and a choice: little to save",
    "experts": "stacks, which most loaders do not quantize",
}
"""Why a quantized base leaves these parts exact."""
TEXT_ALONE = "counted: the part that writes text, and not what reads images or sound"
UNITS = {"G": (1e9, 2**30), "M": (1e6, 2**20)}
"""Bytes of the units of a table, decimal and binary."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    about = "count the memory that fine-tuning a model needs"
    parser = commands.add_parser(
        "memory",
        help=about,
        description=f"{about[0].upper()}{about[1:]}, from its configuration alone: "
        "weights, gradients, optimizer, activations, at the fullest moment of a step.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a config.json, a folder, or a model's name"
    )
    _add_method(parser)
    _add_base(parser)
    _add_step(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.set_defaults(run=run)


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        default="lora",
        help="full or a method of the book; qlora is lora with --base nf4-double "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "-r",
        type=int,
        default=16,
        metavar="N",
        help="rank, width of a bottleneck, or virtual tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--targets",
        default="",
        metavar="NAMES",
        help="layers to adapt, with commas between them (default: the method's)",
    )


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        default="bfloat16",
        help="float32, bfloat16, nf4 or nf4-double (default: %(default)s)",
    )
    parser.add_argument(
        "--exact-experts",
        action="store_true",
        help="leave experts in 16 bits, as most loaders of quantized models do",
    )
    parser.add_argument(
        "--adapt-experts", action="store_true", help="put LoRA on every expert too"
    )


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizer",
        default="adamw",
        help="adamw, adamw16, adamw-master, adamw8, paged-adamw, paged-adamw8 or sgd "
        "(default: %(default)s)",
    )
    count = "(default: %(default)s)"
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help=f"sequences {count}"
    )
    parser.add_argument(
        "--sequence", type=int, default=512, metavar="N", help=f"tokens of one {count}"
    )
    parser.add_argument(
        "--attention",
        default="fused",
        help="fused, masked (fused, with padding) or eager (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="compute each block again in the backward pass",
    )


def run(options: argparse.Namespace) -> int:
    """Count, and print."""
    from minipeft.lab.memory.configs import configuration, of_config
    from minipeft.lab.memory.options import Options

    asked = Options(
        method=options.method,
        r=options.r,
        targets=tuple(options.targets.split(",")) if options.targets else (),
        base=options.base,
        optimizer=options.optimizer,
        batch=options.batch,
        sequence=options.sequence,
        attention=options.attention,
        checkpointing=options.checkpointing,
        experts=not options.exact_experts,
        adapt_experts=options.adapt_experts,
    )
    config = configuration(options.config)
    model = of_config(config)
    if hasattr(config, "text_config"):
        print(TEXT_ALONE, file=sys.stderr)
    if options.json:
        print(json.dumps(as_json(model, asked), indent=2))
    else:
        for line in report(model, asked):
            print(line)
    return 0


def as_json(model: Any, asked: Any) -> dict[str, Any]:
    """Return all counts in bytes, with the options that they are of."""
    from minipeft.lab.memory.cards import CARDS

    peak = asked.peak(model)
    return {
        "options": asdict(asked),
        "parameters": model.parameters,
        "trained": asked.trained(model),
        "weights": asked.weights(model),
        "peak": {**asdict(peak), "total": peak.total},
        "on the host": asked.host(model),
        "cards": {name: peak.total <= size for name, size in CARDS.items()},
    }


def report(model: Any, asked: Any) -> Iterator[str]:
    """Yield the table: parts, their sum, and the cards on which it fits."""
    from minipeft.lab.memory.cards import CARDS, those_that_hold

    peak = asked.peak(model)
    yield _share(model, asked)
    unit = "G" if peak.total >= 1e9 else "M"
    yield f"{'':34s} {unit + 'B':>10s} {unit + 'iB':>10s}"

    def line(name: str, size: float) -> str:
        return _line(name, size, *UNITS[unit])

    for name, size in asked.weights(model).items():
        yield line(f"  {name}", size) + _why_exact(name, asked)
    yield line("weights", peak.weights)
    yield line("gradients", peak.gradients)
    yield line("optimizer", peak.optimizer)
    yield line("activations", peak.activations)
    yield line("two more buffers of the logits", peak.logits)
    yield line("what one operation needs", peak.transient)
    yield line(f"at the fullest moment, the {peak.moment}", peak.total)
    if host := asked.host(model):
        yield line("on the host, beside", host)
    fits = those_that_hold(peak.total)
    small = [name for name in CARDS if name not in fits]
    yield f"fits on: {'; '.join(fits) or 'none of the cards listed here'}"
    if small:
        yield f"not on: {'; '.join(small)}"


def _share(model: Any, asked: Any) -> str:
    trained = asked.trained(model)
    whole, of = model.parameters, "of all"
    if asked.adapter:
        whole, of = whole + trained, "of all, adapters included"
    share = f"{trained / whole:.3%} {of}"
    return f"{model.parameters:,} parameters; {trained:,} train ({share})"


def _why_exact(name: str, asked: Any) -> str:
    if not asked.base.startswith("nf4") or name not in STAYS:
        return ""
    quantized = name == "experts" and asked.experts
    return "" if quantized else f"  not quantized: {STAYS[name]}"


def _line(name: str, size: float, decimal: float, binary: float) -> str:
    return f"{name:34s} {size / decimal:10.3f} {size / binary:10.3f}"
