"""Reference pages: one for each module that exists, so a new row appears by itself."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import Folders, write
from .methods import ROWS
from .source import kernels

COLUMNS = {
    "reference": (
        "NumPy",
        "The definition of every method: pure functions, NumPy only.",
    ),
    "torch": ("torch", "The same names as modules and autograd, and `inject`."),
    "cupy": ("CuPy", "The kernels over CuPy arrays, where layout is the point."),
    "kernels": ("Kernels", "CUDA sources; how they are compiled, launched, checked."),
    "golden": ("Golden vectors", "Cases that check any other implementation."),
    "interop": ("Interop", "Files and formats of other libraries."),
    "lab": ("Lab", "Models, data, training, memory and plots for the chapters."),
    "lab/memory": ("Memory", "What a run needs, counted from a configuration."),
    "lab/gpu": ("GPU report", "What every kernel does on a real GPU."),
}


@dataclass(frozen=True)
class Module:
    """A module, or a file of kernels, that gets a page."""

    column: str
    path: Path

    @property
    def name(self) -> str:
        """`lora`, or `blockwise.cu`."""
        return self.path.name if self.is_kernel else self.path.stem

    @property
    def is_kernel(self) -> bool:
        """Whether this is CUDA source."""
        return self.path.suffix in (".cu", ".cuh")

    @property
    def page(self) -> str:
        """The page's path below `api/`."""
        return f"{self.column}/{self.path.stem}.md"

    @property
    def summary(self) -> str:
        """The first line of its docstring or of its first comment."""
        text = self.path.read_text("utf-8")
        if self.is_kernel:
            return text.lstrip().split("\n")[0].strip("/* ")
        return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]


def modules(layout: Folders) -> list[Module]:
    """Every public module, column by column."""
    found = []
    for column in COLUMNS:
        folder = layout.package / column
        paths = [p for p in folder.glob("*.py") if not p.stem.startswith("_")]
        paths.sort(key=lambda p: (reading_order(p.stem), p.stem))
        paths += sorted(folder.glob("*.cu"))
        paths += sorted(folder.glob("*.cuh"))
        found += [Module(column, path) for path in paths]
    return found


def reading_order(row: str) -> int:
    """Return a method's place in the map; what is no method comes after them."""
    return ROWS.index(row) if row in ROWS else len(ROWS)


def publish(layout: Folders, seen_in: dict[str, list[str]]) -> list[Path]:
    """Write all pages; `seen_in` says, by module, which chapters show it."""
    every = modules(layout)
    pages = [write(layout.docs / "api" / "index.md", _index(every))]
    for module in every:
        where = _elsewhere(module, every, seen_in.get(_dotted(module), []))
        body = _kernels(module) if module.is_kernel else _module(module)
        text = f"# {module.name} {{ #{_dotted(module)} }}\n\n{where}{body}"
        pages.append(write(layout.docs / "api" / module.page, text))
    return pages


def nav(layout: Folders) -> list[Any]:
    """Return the navigation: a section for each column."""
    every = modules(layout)
    entries: list[Any] = [{"Overview": "api/index.md"}]
    for column, (title, _) in COLUMNS.items():
        section = [{m.name: f"api/{m.page}"} for m in every if m.column == column]
        entries += [{title: section}] if section else []
    return entries


def _dotted(module: Module) -> str:
    return f"minipeft.{module.column.replace('/', '.')}.{module.path.stem}"


def _index(every: list[Module]) -> str:
    lines = [
        "# Reference",
        "",
        "Columns are back ends, rows are methods, and a method has the same name in "
        "every column.",
        "",
    ]
    for column, (title, text) in COLUMNS.items():
        chosen = [module for module in every if module.column == column]
        if chosen:
            lines += [f"## {title}", "", text, "", "| module | |", "|---|---|"]
            lines += [f"| [`{m.name}`]({m.page}) | {m.summary} |" for m in chosen]
            lines.append("")
    return "\n".join(lines)


def _elsewhere(module: Module, every: list[Module], chapters: list[str]) -> str:
    """Point at the same row in the other columns, and at the chapters that show it."""
    stem, up = module.path.stem, "../" * module.page.count("/")
    row = [m for m in every if m.path.stem == stem in ROWS and m != module]
    links = [
        f"[{'CUDA' if m.is_kernel else COLUMNS[m.column][0]}]({up}{m.page})"
        for m in row
    ]
    sentences = [f"The same row in {', '.join(links)}."] if links else []
    sentences += [f"Shown in {', '.join(chapters)}."] if chapters else []
    return f"{' '.join(sentences)}\n{{ .row }}\n\n" if sentences else ""


def _module(module: Module) -> str:
    """Leave the rest to the docstrings."""
    return (
        f"::: {_dotted(module)}\n    options:\n"
        "      show_root_heading: false\n      show_root_toc_entry: false\n"
    )


def _kernels(module: Module) -> str:
    lines = []
    for name, text in kernels(module.path.read_text("utf-8")).items():
        anchor = f"{_dotted(module)}.{name}"
        lines += [f"## `{name}` {{ #{anchor} }}", "", "```cuda", text, "```", ""]
    return "\n".join(lines)
