"""Expand what the book adds to Markdown: directives, quoted numbers, citations.

A directive stands alone on its line and begins with `@`; `{=expression=}` quotes a
number of the chapter; `[@hu2021]` cites. Fenced code is left as it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from . import BookError
from .chapter import VALUE, pieces
from .shelf import Work
from .source import DIRECTIVE, Source

CITATION = re.compile(r"\[(@[\w-]+(?:, [^;\]]+)?(?:; @[\w-]+(?:, [^;\]]+)?)*)\]")
SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.S)


@dataclass
class References:
    """The works and sources that a page can name; `cited` collects citations."""

    where: str
    root: str
    works: dict[str, Work]
    source: Callable[[str], Source]
    values: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Callable[..., str]] = field(default_factory=dict)
    cited: list[str] = field(default_factory=list)


def outside_spans(change: Callable[[str], str], text: str) -> str:
    """Apply a change to everything but code spans."""
    done, at = [], 0
    for span in SPAN.finditer(text):
        done += [change(text[at : span.start()]), span[0]]
        at = span.end()
    return "".join([*done, change(text[at:])])


def expand(text: str, page: References) -> str:
    """Expand one page's, or one cell's, Markdown."""
    return "\n".join(
        part if fenced else _open(part, page) for fenced, part in pieces(text)
    )


def _open(text: str, page: References) -> str:
    """Expand text that is not fenced: numbers, then citations, then directives.

    Two formulas on lines of their own, one below the other, are two paragraphs.
    """
    text = re.sub(r"^(\$\$.*\$\$)\n(?=\$\$)", r"\1\n\n", text, flags=re.M)
    text = VALUE.sub(lambda m: _value(m[1], page), text)
    text = outside_spans(lambda t: CITATION.sub(lambda m: _cite(m[1], page), t), text)
    return _directives(text, page)


def _value(expression: str, page: References) -> str:
    if expression not in page.values:
        raise BookError(f"{page.where}: {{={expression}=}} can stand only in a chapter")
    return page.values[expression]


def _cite(inside: str, page: References) -> str:
    """`@hu2021, section 4; @dettmers2023` as "(Hu et al., 2021, section 4; …)"."""
    links = []
    for item in inside.split("; "):
        key, comma, place = item[1:].partition(", ")
        if key not in page.works:
            raise BookError(f"{page.where}: [@{key}] is not in site/bibliography.yml")
        if key not in page.cited:
            page.cited.append(key)
        label = page.works[key].label
        links.append(f"[{label}]({page.root}bibliography.md#{key}){comma}{place}")
    return f"({'; '.join(links)})"


def _directives(text: str, page: References) -> str:
    """Replace directive lines; consecutive `@source` lines go together."""
    done: list[str] = []
    sources: list[str] = []
    margin = ""  # of the box in which they stand
    for line in [*text.split("\n"), ""]:
        if found := DIRECTIVE.match(line):
            margin = found["indent"]
            sources.append(found["name"])
            continue
        if sources:
            done += ["", indent(_sources(sources, page), margin), ""]
            sources = []
        done.append(_block(line, page) if line.startswith("@") else line)
    return "\n".join(done[:-1])


def _block(line: str, page: References) -> str:
    """`@name`, or `@name words`, of the blocks this page has."""
    name, _, words = line[1:].strip().partition(" ")
    if name not in page.blocks:
        choices = ", ".join(f"@{known}" for known in ("source", *page.blocks))
        raise BookError(
            f"{page.where}: unknown directive {line!r}; there are {choices}"
        )
    return page.blocks[name](*words.split())


def _sources(names: list[str], page: References) -> str:
    """Show symbols; those of several columns become tabs, one for each column."""
    columns: dict[str, list[Source]] = {}
    for name in names:
        try:
            source = page.source(name)
        except BookError as error:
            raise BookError(f"{page.where}: {error}") from None
        columns.setdefault(source.column, []).append(source)
    if len(columns) == 1:
        return "\n\n".join(show(s) for s in columns.popitem()[1])
    tabs: list[str] = []
    for column, sources in columns.items():
        body = "\n\n".join(show(source) for source in sources)
        mark = "===" if tabs else "===!"  # a new set, not more tabs of the last one
        tabs.append(f'{mark} "{column}"\n\n{indent(body)}')
    return "\n\n".join(tabs)


def show(source: Source) -> str:
    """Show one symbol below a line that links to its place in the reference."""
    label = f"[`{source.name}`][{source.anchor}]{{ .source }}"
    return f"{label}\n\n```{source.language}\n{source.text}\n```"


def indent(text: str, margin: str = "    ") -> str:
    """Push a block to the right, blank lines excepted."""
    return "\n".join(margin + line if line.strip() else "" for line in text.split("\n"))
