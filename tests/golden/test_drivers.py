"""A driver of our own columns only translates: the column itself refuses bad input."""

import ast
from pathlib import Path

import pytest

import minipeft.golden.drivers

DRIVERS = Path(minipeft.golden.drivers.__file__).parent
OURS = [
    path
    for column in ("reference", "torch", "cupy")
    for path in sorted(DRIVERS.glob(f"{column}/*.py"))
]
SIZES = ("shape", "ndim", "size", "len(", ".dim(", "numel", "nelement")
RANKS = {"r", "rank", "axis", "axes", "experts", "in_features", "out_features"}


def checks(text: str) -> list[str]:
    """Return the checks of operands in a driver; a driver may say "not offered"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        said = ast.unparse(node)
        judges = {
            ast.Assert: True,
            ast.Raise: "Unsupported" not in said and "Unavailable" not in said,
            ast.Compare: any(word in said for word in SIZES) or _names(node) & RANKS,
            ast.Call: ".check_" in said.split("(")[0],
        }
        if judges.get(type(node), False):
            found.append(said)
    return found


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


@pytest.mark.parametrize("path", OURS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_driver_checks_nothing(path):
    assert checks(path.read_text()) == []


def test_a_check_is_found():
    bad = (
        "assert x",
        "raise ValueError(x)",
        "A.shape == B.shape",
        "A.numel() == B.numel()",
        "A.dim() > 1",
        "r < 1",
        "0 <= axis",
        "lora.check_rank(r)",
    )
    assert all(map(checks, bad))
    assert not checks("raise Unsupported('not offered')")
