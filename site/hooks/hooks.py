"""What MkDocs calls: generate before the build, typeset formulas after it."""

from pathlib import Path
from typing import Any

from book import BookError, Folders, bugs, font, maths, shelf
from book.prose import expand
from generate import ROOT, Book, generate, hand_written
from mkdocs.exceptions import PluginError

built: list[Book] = []


def say(line: str) -> None:
    """Print a line of progress: chapters take minutes."""
    print(f"book: {line}", flush=True)


def on_pre_build(config: Any) -> None:
    """Run the chapters, write their pages, and put them into the navigation."""
    try:
        book = generate(Folders(ROOT), say)
    except BookError as error:
        raise PluginError(str(error)) from None
    built[:] = [book]
    config.nav = [
        {
            title: target if isinstance(target, list) else book.nav.get(target, target)
            for title, target in entry.items()
        }
        for entry in config.nav
    ]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Expand hand-written pages, and give terms their hover text."""
    book, where = built[0], page.file.src_uri
    if where.startswith("api/"):
        return markdown
    try:
        if where == "bugs.md":
            markdown = bugs.page(markdown, book.layout)
        if not where.startswith("book/"):
            markdown = expand(markdown, hand_written(book, where))
    except BookError as error:
        raise PluginError(str(error)) from None
    hover = "" if where == "glossary.md" else shelf.hover(book.terms)
    return f"{markdown}\n\n{hover}\n"


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Keep the hover text of each term only where it first stands."""
    return shelf.first_only(html)


def on_post_build(config: Any) -> None:
    """Typeset the formulas, and give the site the font that draws them."""
    site = Path(config.site_dir)
    try:
        characters = maths.typeset(site)
        font.publish(characters, site, Folders(ROOT).cache)
    except BookError as error:
        raise PluginError(str(error)) from None
