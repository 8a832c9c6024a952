"""`minipeft inspect`: describe an adapter, and how other programs load it.

Exit code 0: the adapter was read, it fits the base of `--base`, and the program of
`--for` loses nothing; 1: it does not fit that base or was made for another, or the
program loses something, or its behaviour is not known; 2: the adapter cannot be read.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minipeft.interop.progress import progress

if TYPE_CHECKING:
    from minipeft.interop.inspecting import Inspection

LISTED = 5
"""The most names that a line lists; it counts the others."""
CHECKED = "the tensors and minipeft's metadata are as minipeft wrote them"
UNCHECKED = "none in the file, so a damaged number is not noticed"
TARGETS = (
    *("peft", "vLLM", "SGLang", "llama.cpp"),
    *("Ollama", "TensorRT-LLM", "diffusers", "MLX"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="its folder")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="MODEL",
        help="the model it belongs to: compares names, shapes, sizes, fingerprint",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument(
        "--for",
        dest="target",
        type=_target,
        choices=TARGETS,
        help="judge one loader: exit code 0 if nothing would be lost, 1 if something",
    )
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="OUT",
        help="write the equivalent adapter: scales folded into B, alpha = r",
    )


def _target(text: str) -> str:
    """Return a loader's name in its own spelling; capitals do not matter."""
    return next((name for name in TARGETS if name.lower() == text.lower()), text)


def run(options: argparse.Namespace) -> int:
    """Print the report; return the exit code."""
    from minipeft.interop import fixing, inspecting, parts
    from minipeft.interop.command import write_json
    from minipeft.interop.opening import architecture, open_model

    read = parts.read(options.adapter)
    base = open_model(options.base) if options.base else None
    kind = architecture(options.base) if options.base else ""
    with progress("inspecting", len(read.modules)) as step:
        found = inspecting.inspect(read, base, step, kind)
    if options.json:
        write_json(options.json, plain(asdict(found)))
    for line in report(found, options.target):
        print(line)
    if options.fix:
        fixing.fix(read, options.fix)
        print(f"wrote {options.fix}: alpha = r, no patterns, every scale in B")
    lost = any(j.lost for j in found.loaders if j.loader == options.target)
    return int(lost or bool(found.unfit))


def plain(value: Any) -> Any:
    """Return a value for JSON, without NaN and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def report(found: "Inspection", target: str | None = None) -> Iterator[str]:
    """Yield the lines of a report, with all loaders or one."""
    yield f"method: {found.method}; {len(found.layers)} updates"
    yield f"base: {found.base}"
    yield f"checksum: {CHECKED if found.checksum else UNCHECKED}"
    if found.matched is not None:
        yield f"modules that fit the base: {found.matched}"
    yield from _table(found)
    dead = tuple(layer.module for layer in found.layers if layer.dead)
    for about, names in (
        ("B = 0, these layers change nothing", dead),
        ("not finite", found.not_finite),
        ("without A or without B", found.incomplete),
        ("not in the base, or of another shape", found.unmatched),
        ("in target_modules, but not in the file", found.missing),
        ("tensors beside A and B", found.others),
    ):
        if names:
            yield f"{about} ({len(names)}): {_some(names)}"
    for judgement in found.loaders:
        if target in (None, judgement.loader):
            unfit = f"{found.unfit}; on its own base: " if found.unfit else ""
            yield f"{judgement.loader}: {unfit}{judgement.sentence}"
            if target:
                yield from (f"  source: {source}" for source in judgement.sources)


def _table(found: "Inspection") -> Iterator[str]:
    if not found.layers:
        return
    width = max(len(layer.module) for layer in found.layers)
    yield f"{'module':{width}}  rank     scale  norm of the change  of the weight"
    for layer in found.layers:
        norm, share = _number(layer.norm, "18.4g"), _number(layer.share, "12.2%")
        yield (
            f"{layer.module:{width}}  {layer.r:4d}  {layer.scaling:8.4g}  {norm:>18}  "
            f"{share:>13}"
        )


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
