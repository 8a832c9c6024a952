"""The bibliography and the glossary, each from one data file."""

import html
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from . import BookError


@dataclass(frozen=True)
class Work:
    """A paper or a program that the book cites."""

    key: str
    authors: list[str]
    year: int
    title: str
    venue: str
    url: str

    @property
    def label(self) -> str:
        """How the text names it: `Hu et al., 2021`."""
        names = [author.split(", ")[0] for author in self.authors]
        if len(names) > 2:
            return f"{names[0]} et al., {self.year}"
        return f"{' and '.join(names)}, {self.year}"

    @property
    def entry(self) -> str:
        """The whole reference."""
        people = [" ".join(reversed(name.split(", "))) for name in self.authors]
        if len(people) > 8 or people[-1] == "others":
            people = [*people[: min(6, len(people) - 1)], "and others"]
        names = ", ".join(people)
        return f"{names} ({self.year}). [{self.title}]({self.url}). {self.venue}."


@dataclass(frozen=True)
class Term:
    """An entry of the glossary; `short` is the hover text."""

    term: str
    short: str
    text: str
    also: list[str] = field(default_factory=list)
    hover: bool = True

    @property
    def anchor(self) -> str:
        """Its place on the glossary page."""
        return re.sub(r"\W+", "-", self.term.lower()).strip("-")


def works(path: Path) -> dict[str, Work]:
    """Read the bibliography, by key."""
    return {key: _make(Work, path, {"key": key, **entry}) for key, entry in load(path)}


def terms(path: Path) -> list[Term]:
    """Read the glossary, in alphabetical order."""
    found = [_make(Term, path, {"term": term, **entry}) for term, entry in load(path)]
    return sorted(found, key=lambda term: term.term.lower())


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuse a name that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise BookError(f"{name!r} stands twice; give each entry its own name")
        return dict(super().construct_mapping(node, deep))


def load(path: Path) -> list[tuple[str, Any]]:
    """Read a data file: names, and what stands below each."""
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except BookError as error:
        raise BookError(f"{path.name}: {error}") from None
    return list(content.items())


def _make(kind: Any, path: Path, entry: dict[str, Any]) -> Any:
    try:
        return kind(**entry)
    except TypeError as error:
        name = next(iter(entry.values()))
        raise BookError(f"{path.name}, {name!r}: {error}") from None


def bibliography(entries: list[Work], cited_in: dict[str, list[str]]) -> str:
    """List works by first author, each with the chapters that cite it."""
    lines = []
    for work in sorted(
        entries, key=lambda work: (work.authors[0], work.year, work.key)
    ):
        chapters = cited_in.get(work.key, [])
        where = f" *Cited in {', '.join(chapters)}.*" if chapters else ""
        lines.append(f"{work.entry}{where}\n{{ #{work.key} .work }}")
    return "\n\n".join(lines)


def references(keys: list[str], every: dict[str, Work]) -> str:
    """List the works that one chapter cites, in the order of the bibliography."""
    chosen = sorted((every[key] for key in keys), key=lambda w: (w.authors[0], w.year))
    return "\n\n".join(f"{work.entry}\n{{ .work }}" for work in chosen)


def glossary(entries: list[Term]) -> str:
    """Write the glossary as a list of definitions."""
    lines = []
    for term in entries:
        also = f" *Also called {', '.join(term.also)}.*" if term.also else ""
        body = f"{term.short} {term.text}".strip().replace("\n", " ")
        lines.append(f'<span id="{term.anchor}">{term.term}</span>\n:   {body}{also}')
    return "\n\n".join(lines)


def hover(entries: list[Term]) -> str:
    """Write the abbreviation list that gives terms their hover text."""
    return "\n".join(
        f"*[{term.term}]: {html.escape(term.short)}" for term in entries if term.hover
    )


def first_only(page: str) -> str:
    """Keep the hover text of a term where it first stands in running text."""
    seen: set[str] = set()
    token = re.compile(
        r"<(h[1-6]|dt|a|pre|code)\b[^>]*>.*?</\1>|<abbr [^>]*>(.*?)</abbr>", re.S
    )

    def choose(match: re.Match[str]) -> str:
        if match[1]:
            return re.sub(r"</?abbr[^>]*>", "", match[0])
        if match[2] in seen:
            return match[2]
        seen.add(match[2])
        return match[0]

    return token.sub(choose, page)
