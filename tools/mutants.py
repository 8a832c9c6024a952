"""Change a column in one place at a time, and see whether the vectors notice.

    make mutants                                      # the reference; takes long
    make mutants ARGS="--column torch --rows"         # its modules that have vectors
    python tools/mutants.py lora dora                 # some
    python tools/mutants.py --laws lora               # and the tests, where none does
    python tools/mutants.py --part 1/3                # a third of them, at random

A mutant swaps an operator, moves a number by one, negates a condition or drops a check.
Each runs in a fork, on the vectors of its row and of the rows that use it, until the
first that fails. What no vector runs is counted apart, and so are checks of arguments:
many repeat each other, or refuse what no vector can hold. With `--laws` the tests of
the row answer for both, and for what the vectors let pass. Survivors with a reason are
in `tools/mutants.toml`; any other fails the run.
"""

import argparse
import ast
import copy
import importlib
import importlib.util
import os
import random
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from minipeft.golden.operations import OPERATIONS
from minipeft.golden.runner import implementation, judge
from minipeft.golden.vectors import VectorFile, load_all

ROOT = Path(__file__).parents[1]
COLUMNS = ("reference", "torch", "cupy")
EQUIVALENT = Path(__file__).with_suffix(".toml")
SECONDS = 5  # of processor time: a mutant is found that takes more,
TIMES = 10  # and so many times as much as the column
WAIT = 600  # or that waits so long
FOUND, SURVIVED = 1, 0
UNSEEN = ("survived", "check", "unreached")  # by the vectors
TESTS = {  # of a row, by column
    "reference": (
        *("properties/test_reference.py", "properties/test_{}.py"),
        "agreement/test_{}.py",
    ),
    "torch": ("properties/test_torch_{}.py", "agreement/test_{}.py"),
    "cupy": ("cuda/test_{}.py",),
}
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
    parser.add_argument("--column", choices=COLUMNS, default=COLUMNS[0])
    parser.add_argument("--laws", action="store_true", help="ask the tests too")
    parser.add_argument("--rows", action="store_true", help="modules that have vectors")
    parser.add_argument("--part", default="1/1", help="a random part, such as 1/3")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    column = ROOT / "minipeft" / asked.column
    names = asked.modules or [path.stem for path in sorted(column.glob("[a-z]*.py"))]
    if asked.rows:
        names = [n for n in names if n in {o.row for o in OPERATIONS.values()}]
    importlib.import_module(f"minipeft.{asked.column}")
    if asked.column == "torch":  # so that no mutant has to
        importlib.import_module("minipeft.golden.drivers.bridge")
    listed = tomllib.loads(EQUIVALENT.read_text("utf-8"))["survivor"]
    total: Counter[str] = Counter()
    for name in names:
        known = {
            (e["at"], e["change"])
            for e in listed
            if (e.get("column", COLUMNS[0]), e["module"]) == (asked.column, name)
        }
        drawn = Drawn(part - 1, parts, random.Random(name))
        total += module(Module(column, name), known, asked.laws, drawn)
    report(total)
    return int(total["survived"] > 0)


def report(total: Counter[str]) -> None:
    """Print the sums."""
    total["found"] += total["survived, law"]
    asked = total["found"] + total["survived"]
    print(
        f"{total['found']} of {asked} found ({total['found'] / max(asked, 1):.2%}), "
        f"{total['survived, law']} by tests alone; "
        f"{total['listed']} survive with a reason. Checks of arguments that survive: "
        f"{total['check, law']} found by tests, {total['check']} not. Lines that no "
        f"vector runs: {total['unreached, law']} found by tests, "
        f"{total['unreached']} not."
    )


class Drawn(NamedTuple):
    """One of several parts, drawn at random; all parts together are all mutants."""

    number: int
    of: int
    rng: random.Random

    def has_next(self) -> bool:
        """Tell whether the next mutant is in this part."""
        return self.rng.randrange(self.of) == self.number


class Module(NamedTuple):
    """A module of a column."""

    column: Path
    name: str

    @property
    def path(self) -> Path:
        """Where its code is."""
        return self.column / f"{self.name}.py"

    @property
    def full(self) -> str:
        """Its name in Python."""
        return f"minipeft.{self.column.name}.{self.name}"


def module(
    of: Module, listed: set[tuple[str, str]], laws: bool, drawn: Drawn
) -> Counter[str]:
    """Run every mutant of a module that is drawn."""
    text = of.path.read_text("utf-8")
    tree, source = ast.parse(text), text.splitlines()
    rows = [of.name, *users(of)]
    known = [row for row in rows if operations(row)]
    files = [file for row in known for file in load_all(operations(row))]
    lines, checks = reached(of, tree, files), checking(tree)
    limit = usual(partial(run, of, tree, files))
    longer = usual(partial(tested, of, tree)) if laws else limit
    count: Counter[str] = Counter()
    for said, line, mutant in mutants(tree):
        if not drawn.has_next():
            continue
        kind, at = "unreached", source[line - 1].strip()
        if line in lines:
            found = fork(partial(run, of, mutant, files), limit) == FOUND
            kind = "found" if found else "check" if line in checks else "survived"
        if kind == "survived" and (at, said) in listed:
            kind = "listed"
        if laws and kind in UNSEEN:
            broken = fork(partial(tested, of, mutant), longer) == FOUND
            kind = f"{kind}, law" if broken else kind
        count[kind] += 1
        if kind == "survived" or (laws and kind in UNSEEN):
            print(f"{kind}: {of.name}:{line}: {at}: {said}", flush=True)
    print(f"{of.name}: {dict(count)}", flush=True)
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
    """Return the operations of a row."""
    return [o for o, about in OPERATIONS.items() if about.row == row]


def users(of: Module) -> list[str]:
    """Return the modules of the column that import this one, and theirs."""
    imports = {
        path.stem: path.read_text("utf-8") for path in of.column.glob("[a-z]*.py")
    }
    package = f"minipeft.{of.column.name}"
    found, new = set[str](), {of.name}
    while new:
        new = {
            user
            for user, text in imports.items()
            for used in new
            if f"{package}.{used} " in text
            or any(
                isinstance(node, ast.ImportFrom)
                and node.module == package
                and used in {alias.name for alias in node.names}
                for node in ast.parse(text).body
            )
        } - found
        found |= new
    return sorted(found - {of.name})


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

    def to(name: str, value: Any) -> Any:
        return lambda: setattr(node, name, value)

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OTHER:
        return [to("op", OTHER[type(node.op)]())]
    if isinstance(node, ast.Compare):
        return [
            to("ops", [*node.ops[:i], OTHER[type(op)](), *node.ops[i + 1 :]])
            for i, op in enumerate(node.ops)
        ]
    if isinstance(node, ast.UnaryOp):
        same = ast.UAdd() if isinstance(node.op, ast.USub) else None
        return [to("op", same)] if same else []
    if isinstance(node, ast.If | ast.IfExp):
        return [to("test", ast.UnaryOp(ast.Not(), node.test))]
    if isinstance(node, ast.Expr):
        return [to("value", ast.Constant(None))]
    return [to("value", other) for other in values(node)]


def values(node: ast.AST) -> list[float]:
    """Return what a number is changed to."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, int | float):
        return []
    return [not node.value if isinstance(node.value, bool) else node.value + 1]


def reached(of: Module, tree: ast.Module, files: list[VectorFile]) -> set[int]:
    """Return the lines that the vectors run."""
    path = str(of.path)
    lines: set[int] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != path:
            return None
        lines.add(frame.f_lineno)
        return trace

    read, write = os.pipe()
    if not os.fork():
        sys.settrace(trace)
        status = run(of, tree, files)
        sys.settrace(None)
        os.write(write, repr((status, lines)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        status, lines = ast.literal_eval(said.read().decode())
    os.wait()
    if status != SURVIVED:
        raise SystemExit(f"{of.name} fails its vectors as it is")
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


def usual(judged: Callable[[], int]) -> float:
    """Judge the column as it is; return how much processor time a mutant may take."""
    before = sum(os.times()[2:4])
    if fork(judged, WAIT) == FOUND:
        raise SystemExit("the column fails as it is")
    return SECONDS + TIMES * (sum(os.times()[2:4]) - before)


def fork(judged: Callable[[], int], limit: float) -> int:
    """Judge a mutant in a process of its own; return FOUND or SURVIVED."""
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.alarm(WAIT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = FOUND
        try:
            status = judged()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended) and FOUND


def put(of: Module, tree: ast.Module) -> None:
    """Put a module in its place."""
    spec = importlib.util.find_spec(of.full)
    if spec is None:
        raise SystemExit(f"there is no {of.full}")
    made = ModuleType(of.full)
    made.__dict__.update(__spec__=spec, __file__=spec.origin)
    sys.modules[of.full] = made
    setattr(sys.modules[of.full.rpartition(".")[0]], of.name, made)
    exec(compile(tree, str(spec.origin), "exec"), made.__dict__)


def tested(of: Module, tree: ast.Module) -> int:
    """Run the laws of the module's functions, and of its row, until one is broken."""
    put(of, tree)
    options = ["-q", "-x", "-o", "addopts="]
    options += ["-o", "filterwarnings=", "-p", "no:cacheprovider"]
    paths = (ROOT / "tests" / p.format(of.name) for p in TESTS[of.column.name])
    files = [str(path) for path in paths if path.exists()]
    if not files:
        return SURVIVED
    chosen = f"{of.name}. or test_{of.name}"  # functions of the row, its own files
    return FOUND if pytest.main([*options, *files, "-k", chosen]) else SURVIVED


def run(of: Module, tree: ast.Module, files: list[VectorFile]) -> int:
    """Ask a mutant until something is wrong."""
    np.seterr(all="ignore")
    put(of, tree)
    with on_a_cpu(of.column.name):
        column = implementation(of.column.name)
        for file in files:
            for case in file.cases:
                if judge(column, file, case).status in ("fail", "policy"):
                    return FOUND
    return SURVIVED


def on_a_cpu(column: str) -> AbstractContextManager[Any]:
    """Run kernels as the tests do: compiled for this CPU."""
    if column != "cupy":
        return nullcontext()
    sys.path.append(str(ROOT))
    from minipeft.cupy.executor import use
    from tests.cuda.executors import CpuExecutor

    return use(CpuExecutor())


if __name__ == "__main__":
    sys.exit(main())
