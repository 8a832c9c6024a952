"""One chapter as a Markdown page."""

import re
from pathlib import Path
from typing import Any

from . import figures, write
from .chapter import FENCE, Cell, Chapter
from .prose import References, expand, indent
from .run import Result

FOLDED = '??? code "{}"\n\n{}'


class Setter:
    """Sets one chapter: goes through its cells, and numbers figures on the way."""

    def __init__(self, chapter: Chapter, result: Result, page: References, docs: Path):
        self.chapter = chapter
        self.result = result
        self.page = page
        self.folder = docs / "book" / chapter.name
        self.count = 0
        self.solutions = iter(result.solutions)

    def set(self, part: str) -> str:
        """Return the whole page."""
        outputs = iter(self.result.cells)
        blocks = []
        for cell in self.chapter.cells:
            if cell.kind == "markdown":
                blocks.append(self.prose(cell))
            elif cell.source:
                blocks.append(self.code(cell, next(outputs)))
            else:
                next(outputs)
        body = "\n\n".join(block for block in blocks if block)
        return head(self.chapter, self.result, part, body) + "\n"

    def prose(self, cell: Cell) -> str:
        """Expand a prose cell, the output of its solutions included."""
        return expand(self.with_solutions(cell.source), self.page)

    def code(self, cell: Cell, output: dict[str, Any]) -> str:
        """Set a code cell and what it printed and showed, as its tags ask."""
        source = f"```python\n{cell.source}\n```"
        shown = self.output(output)
        if "solution" in cell.tags:
            return FOLDED.format("Solution", indent(f"{source}\n\n{shown}"))
        if "hide" in cell.tags:
            return shown
        if "fold" in cell.tags:
            source = FOLDED.format("Code", indent(source))
        return f"{source}\n\n{shown}".rstrip()

    def output(self, output: dict[str, Any]) -> str:
        """Set printed text, then figures."""
        parts = []
        if text := output["stdout"].rstrip():
            parts.append(printed(text))
        for figure in output["figures"]:
            self.count += 1
            label = f"Figure {self.chapter.number}.{self.count}"
            parts.append(
                figures.publish(figure, self.result.folder, self.folder, label)
            )
        return "\n\n".join(parts)

    def with_solutions(self, text: str) -> str:
        """Put below the code of each solution what it printed."""
        lines: list[str] = []
        inside, fenced, ours = False, False, False
        for line in text.split("\n"):
            lines.append(line)
            if line.strip() and not line.startswith("    "):
                inside, fenced = line.startswith("???"), False
            elif inside and (fence := FENCE.match(line)):
                fenced = not fenced
                if fenced:
                    ours = fence["info"].strip() == "python"
                elif ours and (shown := self.output(next(self.solutions))):
                    lines += ["", indent(shown), ""]
        return "\n".join(lines)


def printed(text: str) -> str:
    """Set printed text in a fence that nothing in it can close."""
    ticks = max([2, *(len(run) for run in re.findall(r"`+", text))]) + 1
    fence = "`" * ticks
    return f"{fence} {{ .text .output .no-copy }}\n{text}\n{fence}"


def head(chapter: Chapter, result: Result, part: str, body: str) -> str:
    """Put the part above the title, and the cost and the downloads below it."""
    name = chapter.name
    above = f'<p class="part">Chapter {chapter.number} · {part}</p>'
    below = (
        f'<p class="cost">Ran in {result.seconds:.1f} s on one CPU core · '
        f'<a href="{name}.py" download>script</a> · '
        f'<a href="{name}.ipynb" download>notebook</a></p>'
    )
    title, rest = body.split("\n", 1) if "\n" in body else (body, "")
    return f"{above}\n\n{title}\n\n{below}\n{rest}"


def publish(chapter: Chapter, text: str, notebook: str, docs: Path) -> list[Path]:
    """Write the page and its two downloads."""
    base = docs / "book" / chapter.name
    return [
        write(base.with_suffix(".md"), text),
        write(base.with_suffix(".py"), chapter.path.read_bytes()),
        write(base.with_suffix(".ipynb"), notebook),
    ]
