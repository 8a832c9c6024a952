"""Say below each bug of the page whether this build has seen it.

A library that is installed in the version of the page is asked the vectors again. Where
it is not, the committed result shows the bug.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from . import Folders, matrix, write
from .run import ENVIRONMENT, digest_of_library, slowness

SCRIPT = Path(__file__).with_name("reproduce.py")
LONGEST = 120  # seconds for all
STORY = re.compile(r"^\*\*.*?(?=\n\n|\Z)", re.S | re.M)
VECTOR = re.compile(r"`(\w+:\d+)`")
VERSION = re.compile(r"([\w-]+) (\d[\d.]+\d)")

Verdicts = dict[str, dict[str, str]]  # by library and vector


@dataclass(frozen=True)
class Told:
    """What the page tells of one library in one entry: its version, and vectors."""

    library: str
    version: str
    vectors: tuple[str, ...]
    date: str  # of the committed result


def page(markdown: str, layout: Folders) -> str:
    """Add a line to each entry."""
    entries = [told(story, layout) for story in STORY.findall(markdown)]
    verdicts = reproduce([one for entry in entries for one in entry], layout)
    lines = iter([" ".join(shown(one, verdicts) for one in entry) for entry in entries])
    return STORY.sub(
        lambda story: f"{story[0]}\n\n{next(lines)}\n{{ .shown }}", markdown
    )


def told(story: str, layout: Folders) -> list[Told]:
    """Return the libraries of an entry, each with those vectors that it fails."""
    text = story.replace("\n", " ")
    found = []
    for library, version in dict.fromkeys(VERSION.findall(text)):
        path = layout.root / "results" / library / f"{version}.json"
        if path.exists():
            result = json.loads(path.read_text("utf-8"))
            failing = matrix.failing(result)
            vectors = tuple(v for v in VECTOR.findall(text) if v in failing)
            found.append(Told(library, version, vectors, result["date"]))
    return found


def installed(library: str) -> str:
    """Return the version that is installed, without what pip adds; or nothing."""
    try:
        return metadata.version(library).partition("+")[0]
    except metadata.PackageNotFoundError:
        return ""


def reproduce(entries: list[Told], layout: Folders) -> Verdicts:
    """Ask what is installed in the version that is told; keep the answers."""
    asked: dict[str, list[str]] = {}
    for one in entries:
        if installed(one.library) == one.version:
            asked.setdefault(one.library, []).extend(one.vectors)
    if not asked:
        return {}
    names = implementations(layout.root)
    job = json.dumps({names[library]: cases for library, cases in asked.items()})
    versions = [(library, installed(library)) for library in asked]
    drivers = sorted((layout.root / "tools" / "implementations").glob("*.py"))
    texts = [path.read_text("utf-8") for path in (SCRIPT, *drivers)]
    state = f"{digest_of_library(layout)} {versions} {job} {texts}"
    name = hashlib.sha256(state.encode()).hexdigest()[:16]
    kept = layout.cache / "bugs" / f"{name}.json"
    if not kept.exists():
        answer = run(job, layout.root / "tools" / "implementations")
        if answer is None:
            return {}
        write(kept, answer)
    verdicts: Verdicts = json.loads(kept.read_text("utf-8"))
    return {library: verdicts.get(names[library], {}) for library in asked}


def run(job: str, folder: Path) -> str | None:
    """Run the script where the drivers are; return nothing if it does not end well."""
    environment = {**os.environ, **ENVIRONMENT, "TORCHDYNAMO_DISABLE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT)],
            input=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            text=True,
            timeout=LONGEST * slowness(),
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"book: the bugs were not reproduced: {error}", flush=True)
        return None
    return done.stdout


def implementations(root: Path) -> dict[str, str]:
    """Return the implementation to ask, by library, as `make matrix` has them."""
    spec = util.spec_from_file_location("tools_matrix", root / "tools" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    tool = util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found: dict[str, str] = tool.LIBRARIES
    return found


def shown(one: Told, verdicts: Verdicts) -> str:
    """Say what shows that the library has the bug."""
    name, here = f"{one.library} {one.version}", installed(one.library)
    result = f"[the result of {one.date}](matrix.md#{one.library})"
    seen = verdicts.get(one.library, {})
    if not seen:
        why = f"no {one.library}" if not here else f"{one.library} {here}"
        has = f"did not run {name}" if here == one.version else f"has {why}"
        return f"This build {has}; {result} shows it."
    failed = [vector for vector in one.vectors if seen[vector] == "fail"]
    if not failed:
        return f"Not reproduced in this build, by {name}; {result} shows it."
    if len(failed) == len(one.vectors):
        vectors = {1: f"`{failed[0]}`", 2: "both vectors"}
        said = vectors.get(len(failed), f"all {len(failed)} vectors")
        return f"Reproduced in this build: {name} fails {said}."
    return (
        f"Reproduced in this build: {name} fails {len(failed)} of {len(one.vectors)} "
        f"vectors; {result} has the others."
    )
