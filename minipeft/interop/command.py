"""`minipeft merge`, `inspect`, `audit`, `export`, `combine`: adapters in files.

Exit code 0: done, or exact; 1: the audit found something wrong; 2: the input was wrong,
and one sentence on stderr says why; 130 or 143: it was stopped by Ctrl-C or SIGTERM.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipeft.errors import InputError, cannot_write
from minipeft.interop import inspect_command, merge_command
from minipeft.interop.progress import progress
from minipeft.interop.stopping import stoppable

if TYPE_CHECKING:
    from minipeft.interop.adapter import Adapter
    from minipeft.interop.audit import Finding

Commands = "argparse._SubParsersAction[argparse.ArgumentParser]"
TARGETS = ("peft", "gguf", "ollama", "safetensors", "bitsandbytes")
LEFT = "what the mistake does not explain"
KINDS = ("F32", "F16", "BF16", "Q8_0")
COMBINE = "minipeft combine [-h] ADAPTER [ADAPTER ...] [--weights W [W ...]] --out PATH"
"""argparse's own line puts the adapters behind the weights, which would take them."""


def add(commands: Any) -> None:
    """Add the subcommands."""
    _add_merge(commands)
    _add_inspect(commands)
    _add_audit(commands)
    _add_export(commands)
    _add_combine(commands)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "write base + adapter as a model's folder",
        "minipeft merge --base llama --adapter adapter --out merged --dtype bfloat16",
        merge_command.run,
    )
    _add_base_and_adapter(parser)
    _add_out(parser, "the new folder")
    merge_command.add_options(parser)


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "say what an adapter does, and what other programs will do with it",
        "minipeft inspect adapter --base llama --for vllm",
        inspect_command.run,
    )
    inspect_command.add_arguments(parser)


def _add_audit(commands: Any) -> None:
    parser = _command(
        commands,
        "audit",
        "say whether a model is base + adapter, and if not, which mistake made it",
        "minipeft audit --base llama --adapter adapter --merged merged",
        _audit,
    )
    _add_base_and_adapter(parser)
    parser.add_argument(
        "--merged",
        type=Path,
        required=True,
        metavar="MODEL",
        help="a folder, a safetensors file or a GGUF file: what should be judged",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "write an adapter, or base + adapter, for another program",
        "minipeft export --to gguf --base llama --adapter adapter --out adapter.gguf",
        _export,
    )
    parser.add_argument("--to", choices=TARGETS, required=True, help="the target")
    _add_base_and_adapter(parser)
    _add_out(parser, "the new file, or folder")
    parser.add_argument(
        "--merged",
        action="store_true",
        help="for gguf: the merged model, not the adapter alone",
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="F16",
        help="how a merged GGUF stores weights (default: %(default)s)",
    )
    _add_rank(parser)
    merge_command.add_options(parser)


def _add_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="for peft: write any method as plain LoRA of this rank, with the error",
    )
    parser.add_argument(
        "--share",
        type=float,
        metavar="P",
        help="for peft: the same, of the ranks that keep this share of each |ΔW|²",
    )


def _add_combine(commands: Any) -> None:
    parser = _command(
        commands,
        "combine",
        "write the weighted sum of adapters as one adapter",
        "minipeft combine first second --weights 0.7 0.3 --out both",
        _combine,
    )
    parser.usage = COMBINE
    # argparse takes -1e3 for an option.
    parser._negative_number_matcher = re.compile(
        r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I
    )
    parser.add_argument(
        "adapters",
        type=Path,
        nargs="+",
        metavar="ADAPTER",
        help="folders in peft's format, of one method and one base",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one for each adapter (default: 1 each, which is their concatenation)",
    )
    _add_out(parser, "the new folder")


def _command(
    commands: Any, name: str, about: str, example: str, run: Callable[..., int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=f"example: {example}",
    )
    parser.set_defaults(run=stoppable(run))
    return parser


def _add_base_and_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, required=True, metavar="MODEL", help="the base's folder"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a folder in peft's format",
    )
    parser.add_argument(
        "--allow-base-mismatch",
        action="store_true",
        help="go on though the adapter was made for another base",
    )


def _add_out(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=about)


def _audit(options: argparse.Namespace) -> int:
    from minipeft.interop import tying
    from minipeft.interop.audit import WRONG, audit, concluded
    from minipeft.interop.made import TARGET
    from minipeft.interop.opening import open_model

    adapter = _adapter(options)
    base, merged = open_model(options.base), open_model(options.merged)
    ties = tying.ties(options.base)
    base, adapter = tying.pulled_apart(base, adapter, ties)
    findings = []
    with progress("auditing", len(base.about)) as step:
        for finding in audit(base, adapter, merged):
            findings.append(finding)
            step(finding.tensor)
    findings = concluded(findings)
    if TARGET in merged.metadata:
        print(f"the file says that the target was {merged.metadata[TARGET]}")
    if options.json:
        write_json(options.json, [asdict(finding) for finding in findings])
    for line in report(findings):
        print(line)
    return int(any(finding.verdict == WRONG for finding in findings))


def report(findings: "list[Finding]") -> Iterator[str]:
    """Yield the lines of an audit: each mistake with its tensors, then the verdict."""
    from minipeft.interop.audit import BOUND, EXACT, UNEXPLAINED, WRONG

    wrong = [f for f in findings if f.verdict == WRONG]
    for name in dict.fromkeys(f.mistake for f in wrong):
        made = [f for f in wrong if f.mistake == name]
        worst = max(f.residual for f in made)
        yield f"{name}: {made[0].sentence} ({len(made)} tensors, first {made[0].tensor}"
        left = "how far from the right merge" if name == UNEXPLAINED else LEFT
        yield f"  {left}: {worst:.2g} of the update)"
    adapted = [f for f in findings if f.adapted]
    exact = sum(f.verdict == EXACT for f in adapted)
    bound = sum(f.verdict == BOUND for f in adapted)
    yield (
        f"{len(adapted)} adapted tensors: {exact} exact, {bound} within the bound of "
        f"another order of sums, {len(adapted) - exact - bound} wrong"
    )
    others = [f for f in findings if not f.adapted]
    right = [f for f in others if f.verdict == EXACT]
    same = sum(not f.stored for f in right)
    stored = Counter(f.stored for f in right if f.stored)
    how = "".join(f"{count} as the base, {how}, " for how, count in stored.items())
    wrong_ones = len(others) - len(right)
    yield f"{len(others)} other tensors: {same} unchanged, {how}{wrong_ones} not"


def _export(options: argparse.Namespace) -> int:
    if options.rank is not None or options.share is not None:
        return _export_lora(options)
    if options.to != "safetensors" and (options.target or options.original):
        raise InputError(
            "--target and --original are for --to safetensors; a 4-bit base is "
            "decoded for gguf and ollama, and requantized for bitsandbytes"
        )
    if options.to != "safetensors" and options.dtype:
        raise InputError("--dtype is for --to safetensors, --kind for GGUF; omit it")
    if options.to == "safetensors":
        return merge_command.run(options)
    adapter = _adapter(options)
    if options.to == "peft":
        from minipeft.interop import fixing, parts

        fixing.fix(parts.read(options.adapter), options.out)
        print(f"wrote {options.out}: alpha = r, no patterns, every scale in B")
    elif options.to == "bitsandbytes":
        from minipeft.interop import bitsandbytes_export

        with progress("writing") as step:
            where = (options.base, adapter, options.out)
            count = bitsandbytes_export.write_model(*where, step)
        print(f"wrote {options.out}: {count} weights in 4 bits (NF4), merged first")
    else:
        _export_gguf(options, adapter)
    return 0


def _export_lora(options: argparse.Namespace) -> int:
    if options.to != "peft":
        raise InputError(
            f"--rank and --share write plain LoRA for peft, not for {options.to}; "
            "write that first, and export it then"
        )
    from minipeft.interop import peft_folder, to_lora

    with progress("factoring") as step:
        found = to_lora.of_files(
            options.base,
            options.adapter,
            (options.rank, options.share),
            options.allow_base_mismatch,
            step,
        )
    peft_folder.write(options.out, found.contents)
    ranks, (worst, error) = found.ranks.values(), found.worst
    print(
        f"wrote {options.out}: {len(ranks)} updates as LoRA of rank {min(ranks)} to "
        f"{max(ranks)}\nlost: {found.error:.2g} of all updates together, at most "
        f"{error:.2g} of one ({worst})"
    )
    return 0


def _combine(options: argparse.Namespace) -> int:
    weights = options.weights or [1.0] * len(options.adapters)
    if len(weights) != len(options.adapters):
        raise InputError(
            f"there are {len(options.adapters)} adapters and {len(weights)} weights; "
            "give one weight for each"
        )
    from minipeft.interop import combine, peft_folder

    with progress("reading", len(options.adapters)) as step:
        parts = []
        for folder, weight in zip(options.adapters, weights, strict=True):
            step(str(folder))
            parts.append((peft_folder.read(folder), weight))
    total = combine.weighted_sum(parts)
    peft_folder.write(options.out, total)
    print(f"wrote {options.out}: {len(total.tensors)} tensors")
    return 0


def _export_gguf(options: argparse.Namespace, adapter: "Adapter") -> None:
    from minipeft.interop import gguf_format, made, merging, quantized_base
    from minipeft.interop.bitsandbytes_format import FourBitTensors
    from minipeft.interop.opening import open_model
    from minipeft.interop.tensors import Watched

    path = options.out / "model.gguf" if options.to == "ollama" else options.out
    if path.exists():
        raise InputError(f"{path} exists; choose another path, or remove it")
    if options.to == "gguf" and not options.merged:
        config = gguf_format.read_config(options.base)
        gguf_format.write_lora(options.out, _with_base(options, adapter), config)
        print(f"wrote {options.out}: llama-server --lora {options.out}")
        return
    base = open_model(options.base)
    if isinstance(base, FourBitTensors):
        told = {**adapter.metadata, made.TARGET: quantized_base.DEQUANTIZED}
        adapter = replace(adapter, metadata=told)
    with progress("writing", 2 * len(base.about)) as step:  # hashed, then written
        watched = Watched(base, step)
        gguf_format.write_model(path, watched, options.base, adapter, options.kind)
    if options.to == "ollama":
        merging.write_text(options.out / "Modelfile", "FROM ./model.gguf\n")
        print(
            f"wrote {options.out}: ollama create NAME -f {options.out / 'Modelfile'}\n"
            "(the merged model: an ADAPTER line builds only before Ollama 0.34.1)"
        )
    else:
        print(f"wrote {path}: llama-server --model {path}")


def _with_base(options: argparse.Namespace, adapter: "Adapter") -> "Adapter":
    """Return the adapter with the fingerprint of the base that was given."""
    from minipeft.interop import fingerprint
    from minipeft.interop.tensors import open_tensors

    if fingerprint.BASE in adapter.metadata and not options.allow_base_mismatch:
        return adapter  # it was compared
    own = fingerprint.of_files(open_tensors(options.base)).to_json()
    return replace(adapter, metadata={**adapter.metadata, fingerprint.BASE: own})


def _adapter(options: argparse.Namespace) -> "Adapter":
    """Return the adapter, after checking that it belongs to the base."""
    from minipeft.interop import fingerprint, made, merging, peft_format
    from minipeft.interop.apart import named_as
    from minipeft.interop.tensors import open_tensors

    adapter = peft_format.read(options.adapter)
    if options.allow_base_mismatch:
        print(made.NOT_COMPARED, file=sys.stderr)
    elif fingerprint.BASE in adapter.metadata:
        saved = fingerprint.Fingerprint.from_json(adapter.metadata[fingerprint.BASE])
        base = named_as(saved.tensors, open_tensors(options.base))
        own = fingerprint.of_files(base)
        print(merging.check_base(adapter, own), file=sys.stderr)
    else:
        print(made.UNKNOWN, file=sys.stderr)
    return adapter


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error
