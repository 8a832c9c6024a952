"""A chapter is a percent script: `# %% [markdown]` prose, `# %%` code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jupytext
from nbformat import NotebookNode

from . import BookError

MARK = "# %%"
LIMIT = re.compile(r"^# *limit: *(\d+) *s *$", re.M)
VALUE = re.compile(r"\{=(.+?)=\}")
FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
USUAL_LIMIT, LONGEST_LIMIT = 60, 180
KNOWN_TAGS = {"hide", "fold", "solution"}


@dataclass(frozen=True)
class Cell:
    """One cell; `line` is where its first line stands in the script."""

    number: int
    kind: str
    source: str
    line: int
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chapter:
    """A chapter as its author wrote it."""

    path: Path
    front: str
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The script's name, which is the page's too: `01_lora`."""
        return self.path.stem

    @property
    def number(self) -> int:
        """The chapter's place in the book."""
        return int(self.name.split("_")[0])

    @cached_property
    def title(self) -> str:
        """The first heading."""
        for cell in self.prose:
            if found := re.search(r"^# (.+)$", cell.source, re.M):
                return found[1].strip()
        raise BookError(f"{self.path.name}: no prose cell has a title, '# # Title'")

    @property
    def limit(self) -> int:
        """Seconds that the chapter may take: 60, or what its front comment asks for."""
        found = LIMIT.search(self.front)
        seconds = int(found[1]) if found else USUAL_LIMIT
        if seconds > LONGEST_LIMIT:
            raise BookError(
                f"{self.path.name}: its front comment asks for {seconds} s; "
                f"a chapter may ask for {LONGEST_LIMIT} s at most"
            )
        return seconds

    @property
    def prose(self) -> list[Cell]:
        """The Markdown cells."""
        return [cell for cell in self.cells if cell.kind == "markdown"]

    @property
    def code(self) -> list[Cell]:
        """The code cells."""
        return [cell for cell in self.cells if cell.kind == "code"]

    @cached_property
    def values(self) -> list[str]:
        """Every expression that the prose quotes as `{=expression=}`, once each."""
        text = [p for c in self.prose for fenced, p in pieces(c.source) if not fenced]
        return list(dict.fromkeys(VALUE.findall("\n".join(text))))

    @cached_property
    def solutions(self) -> list[Cell]:
        """The code inside `??? …` blocks, numbered in reading order."""
        found = [part for cell in self.prose for part in _solutions(cell)]
        return [
            Cell(number, "code", source, line)
            for number, (source, line) in enumerate(found, 1)
        ]


def read(path: Path) -> Chapter:
    """Read one script; what it says wrongly about itself is an error here."""
    text = path.read_text("utf-8")
    # jupytext reads the cells but does not say where they stand.
    lines = enumerate(text.splitlines(), 1)
    marks = [number for number, line in lines if line.startswith(MARK)]
    found = jupytext.reads(text, fmt="py:percent").cells
    front = found.pop(0).source if len(found) > len(marks) else ""
    numbered = enumerate(zip(marks, found, strict=True), 1)
    return Chapter(path, front, tuple(_cell(path, n, *cell) for n, cell in numbered))


def read_all(folder: Path) -> list[Chapter]:
    """Every chapter of a folder, in the order of the file names."""
    return [read(path) for path in sorted(folder.glob("[0-9][0-9]_*.py"))]


def pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Split into runs of lines: (is it a fenced block?, its text)."""
    run: list[str] = []
    closing = None
    for line in text.split("\n"):
        fence = FENCE.match(line)
        opens = fence is not None and closing is None
        if opens and run:
            yield False, "\n".join(run)
            run = []
        run.append(line)
        if opens and fence:
            closing = fence["ticks"]
        elif fence and closing and fence["ticks"].startswith(closing):
            yield True, "\n".join(run)
            run, closing = [], None
    if run:
        yield closing is not None, "\n".join(run)


def _cell(path: Path, number: int, mark: int, found: NotebookNode) -> Cell:
    """Make one cell of what jupytext read below the mark on this line."""
    source = found.source.lstrip("\n")
    line = mark + 1 + len(found.source) - len(source)
    tags = tuple(found.metadata.get("tags", ()))
    if unknown := set(tags) - KNOWN_TAGS:
        raise BookError(
            f"{path.name}, cell {number}: unknown tag {min(unknown)!r}; "
            f"the tags are {', '.join(sorted(KNOWN_TAGS))}"
        )
    if found.cell_type == "markdown":
        _check_prose(path, line, len(source.splitlines()))
    return Cell(number, found.cell_type, source.rstrip(), line, tags)


def _check_prose(path: Path, first: int, count: int) -> None:
    # jupytext takes a line without its "#" for prose too: code that never runs.
    lines = path.read_text("utf-8").splitlines()
    for number, line in enumerate(lines[first - 1 : first - 1 + count], first):
        if line.strip() and not line.startswith("#"):
            raise BookError(
                f"{path.name}, line {number}: code in a prose cell: {line.strip()!r}"
            )


def _solutions(cell: Cell) -> list[tuple[str, int]]:
    """Find the Python fences of `???` blocks, with the line each begins on."""
    found: list[tuple[list[str], int]] = []
    inside, fenced, keep = False, False, False
    for line, text in enumerate(cell.source.splitlines(), cell.line):
        if text.strip() and not text.startswith("    "):
            inside, fenced = text.startswith("???"), False
        elif inside and (fence := FENCE.match(text)):
            fenced = not fenced
            if keep := fenced and fence["info"].strip() == "python":
                found.append(([], line + 1))
        elif fenced and keep:
            found[-1][0].append(text[4:])
    return [("\n".join(lines), line) for lines, line in found]
