"""`minipeft merge`, and `minipeft export --to safetensors`, which does the same."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minipeft.errors import InputError
from minipeft.interop.progress import progress

if TYPE_CHECKING:
    import torch

    from minipeft.interop.adapter import Adapter
    from minipeft.interop.merging import Step

DTYPES = ("float32", "float16", "bfloat16")
TARGETS = ("original", "dequantized", "requantized")
CHOICES = (
    "--target original, with --original MODEL: the weights before they were quantized; "
    "--target dequantized: the decoded weights, kept in floats; or --target "
    "requantized: 4 bits again"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about the merged weights."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the merged weights (default: as in the base)",
    )
    parser.add_argument(
        "--target",
        choices=TARGETS,
        help="for a base in 4 bits: what to merge into",
    )
    parser.add_argument(
        "--original",
        type=Path,
        metavar="MODEL",
        help="for --target original: the model before it was quantized",
    )


def run(options: argparse.Namespace) -> int:
    """Merge, and say into what; return the exit code."""
    import torch

    from minipeft.interop import made, peft_format
    from minipeft.interop.fingerprint import BASE
    from minipeft.interop.tensors import open_tensors

    adapter = peft_format.read(options.adapter)
    if options.allow_base_mismatch:
        free = {key: text for key, text in adapter.metadata.items() if key != BASE}
        adapter = replace(adapter, metadata=free)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    with progress("merging", len(open_tensors(options.base).about)) as step:
        line = _merged(options, adapter, dtype, step)
    if options.allow_base_mismatch:
        line = made.NOT_COMPARED
    print(line, file=sys.stderr)
    stacks = sum(len(parts) // 2 for parts in adapter.stacks.values())
    into = f" ({options.target})" if options.target else ""
    count = len(adapter.updates) + stacks
    print(f"merged {count} weights into {options.out}{into}")
    return 0


def _merged(
    options: argparse.Namespace,
    adapter: "Adapter",
    dtype: "torch.dtype | None",
    step: "Step",
) -> str:
    from minipeft.interop import merging, quantized_base

    where = options.base, adapter, options.out
    if quantized_base.is_quantized(options.base):
        if options.target is None:
            raise InputError(f"the base holds 4-bit weights; choose {CHOICES}")
        if (options.target == "original") != (options.original is not None):
            raise InputError(
                "--target original needs --original MODEL, and no other target takes it"
            )
        if options.target == "requantized" and dtype is not None:
            raise InputError(
                "--target requantized keeps the dtypes of the 4-bit base; leave "
                "--dtype out"
            )
        target = quantized_base.Target(options.target, options.original, dtype)
        return quantized_base.merge(*where, target, step)
    if options.target or options.original:
        raise InputError(
            "the base holds no 4-bit weights, so there is one target; leave --target "
            "and --original out"
        )
    return merging.merge(*where, dtype, step)
