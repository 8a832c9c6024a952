"""Every chapter on a device that is not the CPU: a program for `make devices`.

The device is pretended (tests/properties/device.py). Like a GPU it refuses an operation
on tensors of two devices. The chapters run one after another in one process, with one
step of training, few examples, small blocks in place of those of a large model, and no
figures.
"""

import contextlib
import io
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minipeft.lab import blocks, chapter, data, models, plots, timing
from tests.properties import device

CHAPTERS = Path(__file__).parents[2] / "chapters"
EXAMPLES = 24  # of each side of the split
SMALL = {"count": 1, "width": 256, "inner": 512, "heads": 4, "groups": 2}
SMALL |= {"vocabulary": 512, "r": 8, "long": 256}  # in place of 12 GB of a large model
TIMED: list[object] = []


def uses_a_device(path: Path) -> bool:
    """Tell whether a chapter asks for the device or loads the model onto it."""
    source = path.read_text("utf-8")
    return "chapter.device" in source or "chapter.load(" in source


def shorten(there: torch.device) -> None:
    """Let every chapter run on the device, on few examples."""
    for module in (chapter, models):
        module.pick_device = lambda asked: str(there)
    entries = data.devils_dictionary
    data.devils_dictionary = lambda split=None: entries(split)[:EXAMPLES]
    blocks.Blocks = partial(blocks.Blocks, **SMALL)
    timing.cost = once
    plots.save = lambda figure, path: path.parent.mkdir(parents=True, exist_ok=True)


def once(device: str, turn: Callable[..., object], *given: object) -> float:
    """Run a turn the first time only, and report one second."""
    what = getattr(turn, "func", turn)
    if what not in TIMED:
        TIMED.append(what)
        turn(*given)
    return 1.0


def run(path: Path, out: Path) -> str:
    """Run a chapter; return its error, or None."""
    sys.argv = [str(path), "--steps", "1", "--out", str(out / path.stem)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(path), run_name="__main__")
    except BaseException:
        return traceback.format_exc()
    return ""


def main(out: str, *names: str) -> int:
    """Run chapters by number, other files, or all chapters; return the exit code."""
    device.register()
    every = [p for p in sorted(CHAPTERS.glob("[0-9][0-9]_*.py")) if uses_a_device(p)]
    chosen = [p for p in every if not names or p.name[:2] in names]
    chosen += [Path(name) for name in names if name.endswith(".py")]
    failed = 0
    with device.pretending() as there, sdpa_kernel(SDPBackend.MATH):
        shorten(there)
        for path in chosen:
            began = time.process_time()
            wrong = run(path, Path(out))
            failed += bool(wrong)
            spent = f"{time.process_time() - began:.1f} s"
            print(wrong or f"ran {path.stem} in {spent}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
