"""Write the generated pages of the book: `python site/hooks/generate.py`.

MkDocs calls the same function before every build (hooks.py). The pages go to `book/`
and `api/` below `site/`, which git ignores; a chapter runs again only when it changed.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from book import (
    BookError,
    Folders,
    api,
    figures,
    matrix,
    methods,
    museum,
    notebook,
    page,
    quantities,
    shelf,
    source,
    vectors,
)
from book.chapter import Chapter, read_all
from book.prose import References, expand
from book.run import Result, run_all

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Book:
    """What was generated, as far as the hand-written pages and MkDocs need it."""

    layout: Folders
    nav: dict[str, list[Any]]
    works: dict[str, shelf.Work]
    terms: list[shelf.Term]
    cited_in: dict[str, list[str]]
    results: dict[str, Result]


def generate(layout: Folders, say: Callable[[str], None] = print) -> Book:
    """Run the chapters, and write every generated page."""
    works = shelf.works(layout.docs / "bibliography.yml")
    terms = shelf.terms(layout.docs / "glossary.yml")
    chapters = read_all(layout.chapters)
    parts = group(chapters, Path(__file__).with_name("parts.yml"))
    results = run_all(layout, chapters, say)
    quantities.check(results)
    readme, figure_of = layout.root / "README.md", "01_lora"
    if readme.exists() and figure_of in results:
        text = readme.read_text("utf-8")
        quantities.check_readme(text, figure_of, results[figure_of])
    written: list[Path] = []
    cited_in: dict[str, list[str]] = {}
    for part, members in parts.items():
        for chapter in members:
            setting = chapter_page(layout, chapter, results[chapter.name], works)
            written += publish(layout, chapter, results[chapter.name], setting, part)
            link = f"[{chapter.title}](book/{chapter.name}.md)"
            for key in setting.cited:
                cited_in.setdefault(key, []).append(link)
    written += api.publish(layout, shown_modules(chapters))
    prune(layout, written)
    nav = {"book/": book_nav(parts), "api/": api.nav(layout)}
    return Book(layout, nav, works, terms, cited_in, results)


def group(chapters: list[Chapter], file: Path) -> dict[str, list[Chapter]]:
    """Put chapters into parts; the parts come in the order of their first chapters."""
    known = dict(shelf.load(file))
    part_of = {word: part for part, words in known.items() for word in words}
    last = list(known)[-1]
    parts: dict[str, list[Chapter]] = {}
    for chapter in chapters:
        part = part_of.get(chapter.name.split("_", 1)[1], last)
        parts.setdefault(part, []).append(chapter)
    return parts


def chapter_page(
    layout: Folders, chapter: Chapter, result: Result, works: dict[str, shelf.Work]
) -> References:
    """Return what the prose of one chapter may refer to."""
    setting = References(
        where=f"chapters/{chapter.path.name}",
        root="../",
        works=works,
        source=partial(source.find, package=layout.package),
        values=result.values,
    )
    setting.blocks["references"] = lambda: shelf.references(setting.cited, works)
    return setting


def publish(
    layout: Folders, chapter: Chapter, result: Result, setting: References, part: str
) -> list[Path]:
    """Write one chapter's page, figures and downloads."""
    setter = page.Setter(chapter, result, setting, layout.docs)
    text = setter.set(part)
    written = page.publish(
        chapter, text, notebook.write(chapter, result, setting), layout.docs
    )
    return [*written, *setter.folder.glob("*.svg")]


def shown_modules(chapters: list[Chapter]) -> dict[str, list[str]]:
    """Return links to the chapters that show something of a module, by module."""
    found: dict[str, list[str]] = {}
    for chapter in chapters:
        for cell in chapter.prose:
            for line in cell.source.splitlines():
                if match := source.DIRECTIVE.match(line):
                    module = match["name"].split(":")[0]
                    parts = module.split(".")
                    depth = 4 if "/".join(parts[1:3]) in api.COLUMNS else 3
                    module = module if ":" in match["name"] else ".".join(parts[:depth])
                    root = "../" * (depth - 1)
                    link = f"[{chapter.title}]({root}book/{chapter.name}.md)"
                    if link not in found.setdefault(module, []):
                        found[module].append(link)
    return found


def book_nav(parts: dict[str, list[Chapter]]) -> list[Any]:
    """Return the navigation of the chapters, part by part."""
    return [
        {part: [{c.title: f"book/{c.name}.md"} for c in members]}
        for part, members in parts.items()
    ]


def hand_written(book: Book, where: str) -> References:
    """Return what a hand-written page may refer to."""
    root = "../" * where.count("/")
    setting = References(
        where, root, book.works, partial(source.find, package=book.layout.package)
    )
    setting.blocks = {
        "map": lambda: methods.table(book.layout.root, partial(map_link, book.layout)),
        "operations": lambda: vectors.table(book.layout.package / "golden" / "v1"),
        "matrix": lambda: matrix.table(book.layout.root / "results"),
        "museum": lambda: museum.table(book.layout.root),
        "matrix-details": lambda: matrix.details(book.layout.root / "results"),
        "figure": lambda chapter, name: figure(book, where, chapter, name),
        "glossary": lambda: expand(shelf.glossary(book.terms), setting),
        "bibliography": lambda: shelf.bibliography(
            list(book.works.values()), book.cited_in
        ),
    }
    return setting


def figure(book: Book, where: str, chapter: str, name: str) -> str:
    """Show a chapter's figure elsewhere, and say where it comes from."""
    result = book.results.get(chapter)
    shown = [f for c in result.cells for f in c["figures"]] if result else []
    for found in shown:
        if result and Path(found["file"]).stem == name:
            svg = (result.folder / found["file"]).read_text("utf-8")
            label = f'<a href="book/{chapter}.html">Chapter {int(chapter[:2])}</a>'
            at = f"book/{chapter}/{name}"
            return figures.markup(found, figures.size(svg, name), at, label)
    raise BookError(f"{where}: chapter {chapter} shows no figure {name!r}")


def map_link(layout: Folders, column: str, file: Path) -> str:
    """Where a tick of the map leads on the site."""
    if column == "chapter":
        return f"book/{file.stem}.md"
    if file.parent.name in api.COLUMNS:
        return f"api/{file.parent.name}/{file.stem}.md"
    return "verify.md"


def prune(layout: Folders, written: list[Path]) -> None:
    """Remove generated files that this generation did not write."""
    for folder in ("book", "api"):
        for path in (layout.docs / folder).rglob("*"):
            if path.is_file() and path not in written:
                path.unlink()
        for path in sorted((layout.docs / folder).glob("*/"), reverse=True):
            if not any(path.iterdir()):
                shutil.rmtree(path)


def main() -> int:
    """Generate from the command line."""
    try:
        generate(Folders(ROOT))
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
