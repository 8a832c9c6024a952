"""The first line of every chapter: options, seeds, threads, figures, calm errors.

    chapter = start(name="01_lora", steps=300, model="tiny")

Results go to stdout; progress and the paths of figures to stderr.
"""

import argparse
import errno
import json
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from matplotlib.figure import Figure

from minipeft.errors import InputError
from minipeft.lab import plots
from minipeft.lab.claims import Claims
from minipeft.lab.files import write_atomic
from minipeft.lab.models import NAMES, WHEELS, check_name, fetch, pick_device

FIGURES: list[tuple[Path, str, str]] = []
"""(SVG, alternative text, caption) of each figure this process has shown, in order."""

SEED = 0


@dataclass(frozen=True)
class Chapter(Claims):
    """What a chapter was asked to do, and what it states."""

    name: str
    model: str
    device: str
    steps: int
    out: Path
    full: bool

    def show(self, figure: Figure, name: str, alt: str, caption: str = "") -> Path:
        """Write `<out>/<name>.svg` and its alternative text, and return the path.

        Args:
            figure: Any matplotlib figure; it is closed.
            name: The file's name without `.svg`.
            alt: What the figure draws, for those who cannot see it.
            caption: The point that the figure makes, with its numbers; printed below.

        Raises:
            InputError: The text is empty, the folder cannot be written.
        """
        if not alt.strip():
            raise InputError(f"figure {name!r} has no alternative text; describe it")
        path = self.out / f"{name}.svg"
        plots.save(figure, path)
        write_atomic(
            path.with_suffix(".json"), (json.dumps({"alt": alt}) + "\n").encode()
        )
        FIGURES.append((path, alt, caption))
        print(path, file=sys.stderr)
        figure.clear()
        return path

    def read_full(self, path: Path) -> dict[str, Any]:
        """Return what a run with `--full` has written.

        Raises:
            InputError: The file is not there, or damaged.
        """
        try:
            result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{path} is not here; run the chapter where it lies in a checkout, or "
                "make the file with --full"
            ) from None
        except ValueError as error:
            raise InputError(
                f"{path} is damaged ({error}); take it from the repository again, or "
                "make it anew with --full"
            ) from None
        return result


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help shows the options")


def start(
    name: str, steps: int, model: str = "tiny", arguments: Sequence[str] | None = None
) -> Chapter:
    """Read the command line, set seeds and threads, make errors calm.

    Args:
        name: The chapter's, as in its file name.
        steps: Training steps of the quick setting.
        model: The default model.
        arguments: The command line; None: the process's own.
    """
    sys.excepthook = _calm
    options = _parser(name, steps, model).parse_args(arguments)
    if options.steps < 1:
        raise InputError(f"--steps is {options.steps}; give at least 1")
    if options.model in WHEELS:
        fetch(options.model)  # nothing to do if it is here
    check_name(options.model)
    options.device = pick_device(options.device)
    reproducible(SEED)
    plots.use()
    usual = (options.model, options.steps) == (model, steps)
    return Chapter(name=name, usual=usual, **vars(options))


def _parser(name: str, steps: int, model: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=name, description=f"Chapter {name} of the minipeft book.")
    parser.add_argument(
        "--model",
        default=model,
        metavar="NAME",
        help=f"{', '.join(NAMES)}, a folder, a Hugging Face id (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto takes the GPU if there is one (default: %(default)s)",
    )
    of_a_run = "training steps of a run (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=of_a_run)
    out = Path("build/chapters") / name
    parser.add_argument(
        "--out", type=Path, default=out, metavar="FOLDER", help="where figures go"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="the long setting: more seeds and sizes, writes chapters/results",
    )
    return parser


def reproducible(seed: int) -> None:
    """Seed every generator; one thread, so that sums keep their order."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)


def _calm(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End with a sentence where there is one, with the traceback where there is not."""
    sys.stdout.flush()
    if issubclass(kind, KeyboardInterrupt):
        number = getattr(error, "signal", signal.SIGINT)
        _end(str(error) or "stopped; nothing is half-written", 128 + number)
    if issubclass(kind, InputError):
        _end(str(error), 2)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _end("the disk is full; free some space and run the chapter again", 2)
    sys.__excepthook__(kind, error, trace)


def _end(sentence: str, code: int) -> NoReturn:
    """Say it, and leave."""
    print(sentence, file=sys.stderr)
    raise SystemExit(code)
