"""The table of methods and columns, drawn from the files that exist.

`python site/hooks/book/methods.py` prints it, `--write` puts it into README.md between
`<!-- map -->` and `<!-- /map -->`. A test holds that the two are the same.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROWS = ["codebook", "blockwise", "double_quant", "adamw", "paged", "linear", "lora"]
ROWS += ["dora", "vera", "ia3", "pissa", "loftq", "qlora", "experts"]
ROWS += ["attention", "bottleneck", "prefix", "prompt"]
COLUMNS = ("reference", "torch", "cupy", "laws", "agreement", "vectors", "chapter")
# A column of kernels is written only where memory layout is the point.
LAYOUT = {"codebook", "blockwise", "double_quant", "adamw", "paged"}
LAYOUT |= {"lora", "dora", "qlora", "lora_batched"}
# Files are read and written outside of the column.
TORCH = {"adapter_files": "interop/peft_update.py"}
DASH = "–"
NOTE = f"{DASH} means: no CUDA kernel of its own; on a GPU the torch code runs."
BEGIN, END = "<!-- map -->", "<!-- /map -->"
TICK = "✓"


def rows(root: Path) -> list[str]:
    """The methods of the reference column, in reading order; new ones come last."""
    found = {path.stem for path in _modules(root / "minipeft" / "reference")}
    return [r for r in ROWS if r in found] + sorted(found - set(ROWS))


def cells(root: Path, row: str) -> dict[str, list[Path]]:
    """The files of one row, by column."""
    package, tests = root / "minipeft", root / "tests"
    places = {
        "reference": [package / "reference" / f"{row}.py"],
        "torch": [package / TORCH.get(row, f"torch/{row}.py")],
        "cupy": sorted((package / "cupy").glob(f"{row}*.py"))[:1],
        "laws": [tests / "properties" / f"test_{row}.py"],
        "agreement": [tests / "agreement" / f"test_{row}.py"],
        "vectors": _vectors(root, row),
        "chapter": _chapters(root, row)[:1],
    }
    return {name: [p for p in paths if p.is_file()] for name, paths in places.items()}


def table(root: Path, link: Callable[[str, Path], str] | None = None) -> str:
    """Draw the map; `link(column, file)` says where a tick leads.

    What should be there and is not leaves its cell empty: a hole.
    """
    link = link or (lambda _, path: path.relative_to(root).as_posix())
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|:--|" + ":-:|" * len(COLUMNS)]
    for row in rows(root):
        marks = []
        for column, paths in cells(root, row).items():
            mark = _mark(column, paths)
            missing = DASH if column == "cupy" and row not in LAYOUT else ""
            marks.append(f"[{mark}]({link(column, paths[0])})" if paths else missing)
        lines.append(f"| `{row}` | {' | '.join(marks)} |")
    return "\n".join([*lines, "", NOTE])


def between(text: str) -> str:
    """Return what stands between the marks of README.md."""
    return text.split(BEGIN)[1].split(END)[0].strip()


def _mark(column: str, paths: list[Path]) -> str:
    """A tick; how many files of vectors; or the chapter's number."""
    if column == "vectors":
        return str(len(paths))
    return paths[0].stem.split("_")[0] if column == "chapter" and paths else TICK


def _modules(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*.py") if not p.stem.startswith("_")]


def _vectors(root: Path, row: str) -> list[Path]:
    """The vector files whose first group names this module as its source."""
    wanted = f"minipeft.reference.{row}"
    found = []
    for path in sorted((root / "minipeft" / "golden" / "v1").glob("*.json")):
        source = json.loads(path.read_text("utf-8"))["testGroups"][0]["source"]["name"]
        if source == wanted or source.startswith(f"{wanted}."):
            found.append(path)
    return found


def _chapters(root: Path, row: str) -> list[Path]:
    """The chapters that show this module, the one that shows most of it first."""
    shows = re.compile(rf"^# @source minipeft\.reference\.{row}\.", re.M)
    paths = sorted((root / "chapters").glob("[0-9][0-9]_*.py"))
    counts = {path: len(shows.findall(path.read_text("utf-8"))) for path in paths}
    return sorted((p for p in paths if counts[p]), key=lambda p: -counts[p])


def main(root: Path) -> None:
    """Print the map, or write it into README.md."""
    drawn = table(root)
    if "--write" not in sys.argv:
        print(drawn)
        return
    readme = root / "README.md"
    text = readme.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{drawn}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main(Path(__file__).parents[3])
