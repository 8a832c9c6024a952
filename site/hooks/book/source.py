"""Show the source of a symbol, found by its name; nothing is imported for it.

`@source minipeft.reference.lora.merge` is a function, class, method or constant;
`@source minipeft.kernels.blockwise:dequantize` is a kernel in a `.cu` file, or a
function of a header, `.cuh`.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import BookError

COLUMNS = {"reference": "NumPy", "torch": "torch", "cupy": "CuPy"}
DIRECTIVE = re.compile(r"^(?P<indent> *)@source +(?P<name>[\w.]+(?::\w+)?) *$")
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Source:
    """A symbol's source, and how the book refers to it."""

    name: str
    language: str
    text: str
    anchor: str

    @property
    def column(self) -> str:
        """The label of its tab."""
        if self.language == "cuda":
            return "CUDA"
        return COLUMNS.get(self.name.split(".")[1], self.name.split(".")[1])


def find(name: str, package: Path) -> Source:
    """Find a symbol of the package in this folder."""
    if ":" in name:
        return _kernel(name, package)
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = package.joinpath(*parts[1:cut]).with_suffix(".py")
        if parts[0] == package.name and path.is_file():
            text = _python(path, parts[cut:], name)
            return Source(name, "python", text, _anchor(parts, cut, text))
    raise BookError(f"@source {name}: no module of that name below {package.name}/")


def _anchor(parts: list[str], cut: int, text: str) -> str:
    """Where the reference pages describe it: constants and private names by module."""
    described = re.search(r"^ *(def|class) ", text, re.M)
    private = any(part.startswith("_") for part in parts[cut:])
    return ".".join(parts if described and not private else parts[:cut])


@cache
def _parse(path: Path, _changed: float) -> tuple[str, ast.Module]:
    text = path.read_text("utf-8")
    return text, ast.parse(text)


def _python(path: Path, names: list[str], whole: str) -> str:
    """Return the lines of a definition, decorators included, at the left margin."""
    text, tree = _parse(path, path.stat().st_mtime)
    body: list[ast.stmt] = tree.body
    node: Definition | None = None
    for name in names:
        node = next((n for n in body if name in _defined(n)), None)  # type: ignore[assignment]
        if node is None:
            raise BookError(f"@source {whole}: {path.name} defines no {name!r}")
        body = getattr(node, "body", [])
    assert node is not None
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines)


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def _kernel(name: str, package: Path) -> Source:
    module, kernel = name.split(":")
    path = package.joinpath(*module.split(".")[1:]).with_suffix(".cu")
    if not path.is_file() and path.with_suffix(".cuh").is_file():
        path = path.with_suffix(".cuh")
    if not path.is_file():
        raise BookError(f"@source {name}: there is no {path.name} in {package.name}/")
    found = kernels(path.read_text("utf-8"))
    if kernel not in found:
        raise BookError(f"@source {name}: {path.name} has no function {kernel!r}")
    return Source(name, "cuda", found[kernel], name.replace(":", "."))


FUNCTION = re.compile(
    r"^(?=\S)(?:template\s*<[^{;]*?>\s*)?(?:extern\s+\"C\"\s+)?"
    r"[\w\s:<>,*&]*?__(?:global|device)__[^;{]*?\b(?!__launch)(?P<name>\w+)\s*\([^;{]*\)[^;{()]*\{",
    re.M,
)


def kernels(text: str) -> dict[str, str]:
    """Return every CUDA function of a file, with the comment right above it."""
    found = {}
    bare = _blank(text)
    for match in FUNCTION.finditer(bare):
        end = _closing(bare, match.end() - 1)
        lines = text[: match.start()].rstrip("\n").split("\n")
        first = len(lines)
        while first and re.match(r"\s*(//|/\*|\*)", lines[first - 1]):
            first -= 1
        comment = "\n".join(lines[first:])
        body = text[match.start() : end + 1].strip("\n")
        found[match["name"]] = f"{comment}\n{body}" if comment else body
    return found


def _blank(text: str) -> str:
    """Overwrite comments and strings with spaces, so that braces can be counted."""
    token = re.compile(
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'", re.S
    )

    def spaces(match: re.Match[str]) -> str:
        if match[0] == '"C"':
            return match[0]
        return re.sub(r"[^\n]", " ", match[0])

    return token.sub(spaces, text)


def _closing(text: str, start: int) -> int:
    """Return where the brace at `start` is closed."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return at
    raise BookError(f"a CUDA function is never closed: {text[start - 60 : start]!r}")
