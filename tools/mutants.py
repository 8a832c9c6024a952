"""Change the reference in one place at a time, and see whether the vectors notice.

    make mutants                              # every module; takes long
    python tools/mutants.py lora dora         # some

A mutant swaps an operator, moves a number by one, negates a condition or drops a check.
Each runs in a fork, on the vectors of its row and of the rows that use it, until the
first that fails. What no vector runs is counted apart, and so are checks of arguments:
many repeat each other, or refuse what no vector can hold, and other tests answer for
them. Survivors with a reason are in `tools/mutants.toml`; any other fails the run.
"""

import argparse
import ast
import copy
import importlib.util
import os
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np

from minipeft.golden.operations import OPERATIONS
from minipeft.golden.runner import implementation, judge
from minipeft.golden.vectors import VectorFile, load_all

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "minipeft" / "reference"
EQUIVALENT = Path(__file__).with_suffix(".toml")
SECONDS = 60  # a mutant that runs longer is found
FOUND, SURVIVED, UNREACHED = 1, 0, 2
OTHER: dict[type[ast.AST], type[Any]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr},
}


def main() -> int:
    """Report what survives; return 1 if something does without a reason."""
    parser = argparse.ArgumentParser(prog="python tools/mutants.py")
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    names = parser.parse_args().modules or [
        path.stem for path in sorted(REFERENCE.glob("[a-z]*.py"))
    ]
    listed = tomllib.loads(EQUIVALENT.read_text("utf-8"))["survivor"]
    total: Counter[str] = Counter()
    for name in names:
        known = {(e["at"], e["change"]) for e in listed if e["module"] == name}
        total += module(name, known)
    found, survived = total["found"], total["survived"]
    asked = found + survived
    print(
        f"{found} of {asked} found ({found / max(asked, 1):.2%}); "
        f"{total['listed']} survive with a reason, {total['checks']} in checks of "
        f"arguments; {total['unreached']} not run by a vector"
    )
    return int(survived > 0)


def module(name: str, listed: set[tuple[str, str]]) -> Counter[str]:
    """Run every mutant of a module."""
    text = (REFERENCE / f"{name}.py").read_text("utf-8")
    tree, source = ast.parse(text), text.splitlines()
    rows = [name, *users(name)]
    files = [file for row in rows for file in load_all(operations(row))]
    lines = reached(name, tree, files)
    count: Counter[str] = Counter()
    for said, line, mutant in mutants(tree):
        if line not in lines:
            count["unreached"] += 1
        elif fork(name, mutant, files) == FOUND:
            count["found"] += 1
        elif line in checking(tree):
            count["checks"] += 1
        elif (source[line - 1].strip(), said) in listed:
            count["listed"] += 1
        else:
            count["survived"] += 1
            print(f"{name}:{line}: {source[line - 1].strip()}: {said}", flush=True)
    print(f"{name}: {dict(count)}", flush=True)
    return count


def checking(tree: ast.Module) -> set[int]:
    """Return the lines of checks: calls of a function that checks, and its body."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
        elif isinstance(node, ast.FunctionDef):
            name = node.name
        if name.strip("_").startswith("check") and isinstance(
            node, ast.expr | ast.stmt
        ):
            lines |= {*range(node.lineno, (node.end_lineno or 0) + 1)}
    return lines


def operations(row: str) -> list[str]:
    """Return the operations of a row; a name that cannot be, where it has none."""
    return [o for o, about in OPERATIONS.items() if about.row == row] or ["no vectors"]


def users(name: str) -> list[str]:
    """Return the modules of the reference that import this one, and theirs."""
    imports = {
        path.stem: path.read_text("utf-8") for path in REFERENCE.glob("[a-z]*.py")
    }
    found, new = set[str](), {name}
    while new:
        new = {
            user
            for user, text in imports.items()
            for used in new
            if f"reference.{used} " in text
            or any(
                isinstance(node, ast.ImportFrom)
                and node.module == "minipeft.reference"
                and used in {alias.name for alias in node.names}
                for node in ast.parse(text).body
            )
        } - found
        found |= new
    return sorted(found - {name})


def mutants(tree: ast.Module) -> Iterator[tuple[str, int, ast.Module]]:
    """Yield what each mutant changes, where, and the module with the change."""
    places = [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    quiet = {id(part) for node in places for part in unasked(node)}
    for index, node in enumerate(places):
        if id(node) in quiet:
            continue
        for number in range(len(changes(node))):
            mutant = copy.deepcopy(tree)
            again = [n for n in ast.walk(mutant) if hasattr(n, "lineno")][index]
            changes(again)[number]()
            said = f"{ast.unparse(node)} -> {ast.unparse(again)}"
            yield (
                said.replace("\n", " "),
                node.lineno,
                ast.fix_missing_locations(mutant),
            )


def unasked(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what no vector can ask: messages, annotations, imports, and defaults."""
    parts: list[ast.AST | None] = []
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        parts = [node]
    elif isinstance(node, ast.FunctionDef):
        given = [default for default in node.args.kw_defaults if default is not None]
        parts = [node.returns, *node.decorator_list, *node.args.defaults, *given]
    elif isinstance(node, ast.ClassDef):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        parts = [*node.decorator_list, *fields]
    elif isinstance(node, ast.AnnAssign | ast.arg):
        parts = [node.annotation]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        parts = [node]
    for part in parts:
        yield from ast.walk(part) if part is not None else ()


def changes(node: ast.AST) -> list[Any]:
    """Return the changes of one place, each to be called on it."""

    def put(name: str, value: Any) -> Any:
        return lambda: setattr(node, name, value)

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OTHER:
        return [put("op", OTHER[type(node.op)]())]
    if isinstance(node, ast.Compare):
        return [
            put("ops", [*node.ops[:i], OTHER[type(op)](), *node.ops[i + 1 :]])
            for i, op in enumerate(node.ops)
        ]
    if isinstance(node, ast.UnaryOp):
        same = ast.UAdd() if isinstance(node.op, ast.USub) else None
        return [put("op", same)] if same else []
    if isinstance(node, ast.If | ast.IfExp):
        return [put("test", ast.UnaryOp(ast.Not(), node.test))]
    if isinstance(node, ast.Expr):
        return [put("value", ast.Constant(None))]
    return [put("value", other) for other in values(node)]


def values(node: ast.AST) -> list[float]:
    """Return what a number is changed to."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, int | float):
        return []
    return [not node.value if isinstance(node.value, bool) else node.value + 1]


def reached(name: str, tree: ast.Module, files: list[VectorFile]) -> set[int]:
    """Return the lines that the vectors run."""
    path = str(REFERENCE / f"{name}.py")
    lines: set[int] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != path:
            return None
        lines.add(frame.f_lineno)
        return trace

    read, write = os.pipe()
    if not os.fork():
        sys.settrace(trace)
        status = run(name, tree, files)
        sys.settrace(None)
        os.write(write, repr((status, lines)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        status, lines = ast.literal_eval(said.read().decode())
    os.wait()
    if status != SURVIVED:
        raise SystemExit(f"{name} fails its vectors as it is")
    several = (n for n in ast.walk(tree) if isinstance(n, ast.stmt) and not body(n))
    return lines | {
        line
        for node in several
        if lines & {*range(node.lineno, (node.end_lineno or 0) + 1)}
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


def body(node: ast.stmt) -> bool:
    """Tell whether a statement holds others."""
    return hasattr(node, "body")


def fork(name: str, tree: ast.Module, files: list[VectorFile]) -> int:
    """Run a mutant in a process of its own; return FOUND or SURVIVED."""
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = FOUND
        try:
            status = run(name, tree, files)
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended) and FOUND


def run(name: str, tree: ast.Module, files: list[VectorFile]) -> int:
    """Put the module in its place, and ask until something is wrong."""
    full = f"minipeft.reference.{name}"
    spec = importlib.util.find_spec(full)
    if spec is None:
        raise SystemExit(f"there is no {full}")
    made = ModuleType(full)
    made.__dict__.update(__spec__=spec, __file__=spec.origin)
    sys.modules[full] = made
    setattr(sys.modules["minipeft.reference"], name, made)
    np.seterr(all="ignore")
    exec(compile(tree, str(spec.origin), "exec"), made.__dict__)
    column = implementation("reference")
    for file in files:
        for case in file.cases:
            if judge(column, file, case).status in ("fail", "policy"):
                return FOUND
    return SURVIVED


if __name__ == "__main__":
    sys.exit(main())
