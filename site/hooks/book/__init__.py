"""The book's press: `chapters/NN_name.py` in, Markdown pages out.

chapter       a percent script, read into cells
run, cells    each chapter in a clean interpreter, cached
quantities    one label, one value in the whole book
prose         directives, quoted numbers and citations inside Markdown
source        the source of a symbol, found by name
page          one chapter as a Markdown page, with its figures
notebook      the same chapter as a notebook
shelf         bibliography and glossary, from their data files
matrix        what the vectors found in other libraries, from the committed results
bugs, reproduce  which of the bugs this build sees itself, in what is installed
vectors       the operations of the golden vectors, from the vectors
api, methods  the reference pages and the table of methods, from the files that exist
maths, font   formulas to MathML, and the font that draws them
"""

from dataclasses import dataclass
from pathlib import Path


class BookError(Exception):
    """Why the book cannot be built: the chapter or page, and what is wrong in it."""


@dataclass(frozen=True)
class Folders:
    """Where everything lies, from the root of the repository."""

    root: Path

    @property
    def chapters(self) -> Path:
        """The chapter scripts."""
        return self.root / "chapters"

    @property
    def package(self) -> Path:
        """The library that the chapters import."""
        return self.root / "minipeft"

    @property
    def docs(self) -> Path:
        """MkDocs' `docs_dir`: hand-written pages, generated ones beside them."""
        return self.root / "site"

    @property
    def cache(self) -> Path:
        """What may be deleted at any time."""
        return self.root / "build" / "cache"


def write(path: Path, content: str | bytes) -> Path:
    """Write a generated file, and leave one that already says this untouched.

    An unchanged file keeps its time stamp, so `mkdocs serve` does not rebuild forever.
    """
    data = content.encode() if isinstance(content, str) else content
    if not (path.exists() and path.read_bytes() == data):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_bytes(data)
        temporary.replace(path)
    return path
