"""The same chapter as a notebook whose prose reads well in Jupyter.

nbclient could run it, but the book runs chapters itself (`cells.py`): solutions and
quoted values are part of a chapter's run, and a notebook has no place for them.
"""

import re
from typing import Any

import nbformat
from nbformat import NotebookNode, v4

from . import shelf
from .chapter import VALUE, Cell, Chapter, pieces
from .prose import CITATION, References, outside_spans
from .run import Result
from .source import DIRECTIVE

SITE = "https://minipeft.github.io/minipeft/"
BOX = re.compile(
    r'^(?P<mark>!!!|\?\?\?\+?) +(?P<kind>\w+)(?: +"(?P<title>[^"]*)")?\n'
    r"(?P<body>(?:(?: {4}.*)?\n)*)",
    re.M,
)
SYMBOL = re.compile(r"\[([^\]]+)\]\[([\w.]*)\]")
LINK = re.compile(r"\]\((?P<up>\.\./)?(?P<page>[\w/]+)\.md(?P<anchor>#[\w.-]+)?\)")
START = re.compile(r"^(chapter = start\([^)]*)\)", re.M)
ATTRIBUTES = re.compile(r"\{ ?[.#:][^}]*\}$", re.M)


def write(chapter: Chapter, result: Result, page: References) -> str:
    """Return the notebook, outputs included, as JSON."""
    outputs = iter(result.cells)
    cells = [
        _prose(cell, page)
        if cell.kind == "markdown"
        else _code(cell, next(outputs), result, chapter.name)
        for cell in chapter.cells
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.writes(v4.new_notebook(cells=cells, metadata=metadata)) + "\n"


def _prose(cell: Cell, page: References) -> NotebookNode:
    return v4.new_markdown_cell(clean(cell.source, page), **_about(cell))


def _code(
    cell: Cell, output: dict[str, Any], result: Result, name: str
) -> NotebookNode:
    shown = []
    if output["stdout"]:
        shown.append(v4.new_output("stream", text=output["stdout"]))
    for figure in output["figures"]:
        svg = (result.folder / figure["file"]).read_text("utf-8")
        data = {"image/svg+xml": svg, "text/plain": figure["alt"]}
        shown.append(v4.new_output("display_data", data))
    source = in_jupyter(cell.source, name)
    return v4.new_code_cell(source, outputs=shown, **_about(cell))


def _about(cell: Cell) -> dict[str, Any]:
    # The number instead of nbformat's random id: the same chapter, the same bytes.
    tags = {"tags": list(cell.tags)} if cell.tags else {}
    return {"id": f"cell-{cell.number}", "metadata": tags}


def in_jupyter(source: str, name: str) -> str:
    """Mend what a notebook lacks: a command line of its own, and a file."""
    source = START.sub(_without_arguments, source)
    return source.replace("Path(__file__)", f'Path("{name}.ipynb").resolve()')


def _without_arguments(match: re.Match[str]) -> str:
    """A notebook's command line is Jupyter's, and no business of the chapter."""
    return f"{match[1].rstrip().rstrip(',')}, arguments=[])"


def clean(text: str, page: References) -> str:
    """Turn what only the site understands into plain Markdown."""
    parts = [p if fenced else _open(p, page) for fenced, p in pieces(_boxes(text))]
    return "\n".join(parts).strip()


def _open(text: str, page: References) -> str:
    text = VALUE.sub(lambda m: page.values[m[1]], text)
    text = outside_spans(lambda t: CITATION.sub(lambda m: _cite(m[1], page), t), text)
    text = LINK.sub(_link, SYMBOL.sub(_symbol, text))
    text = ATTRIBUTES.sub("", text)
    return "\n".join(_directive(line, page) for line in text.split("\n"))


def _cite(inside: str, page: References) -> str:
    links = []
    for item in inside.split("; "):
        key, comma, place = item[1:].partition(", ")
        work = page.works[key]
        links.append(f"[{work.label}]({work.url}){comma}{place}")
    return f"({'; '.join(links)})"


def _symbol(match: re.Match[str]) -> str:
    """Link to a symbol's place in the reference pages."""
    name = match[2] or match[1].strip("`")
    parts = name.split(".")
    if parts[0] != "minipeft" or len(parts) < 3:
        return match[0]
    return f"[{match[1]}]({SITE}api/{parts[1]}/{parts[2]}.html#{name})"


def _link(match: re.Match[str]) -> str:
    folder = "" if match["up"] else "book/"
    return f"]({SITE}{folder}{match['page']}.html{match['anchor'] or ''})"


def _directive(line: str, page: References) -> str:
    if found := DIRECTIVE.match(line):
        source = page.source(found["name"])
        return f"\n`{source.name}`\n\n```{source.language}\n{source.text}\n```\n"
    if line.strip() == "@references":
        return ATTRIBUTES.sub("", shelf.references(page.cited, page.works))
    return line


def _boxes(text: str) -> str:
    """Admonitions become quotations; folded ones become `<details>`."""

    def box(match: re.Match[str]) -> str:
        title = match["title"] or match["kind"].capitalize()
        body = re.sub(r"^ {4}", "", match["body"], flags=re.M).strip()
        if match["mark"].startswith("?"):
            return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>\n\n"
        lines = f"**{title}**\n\n{body}".split("\n")
        return "\n".join(f"> {line}".rstrip() for line in lines) + "\n\n"

    return BOX.sub(box, text + "\n")
