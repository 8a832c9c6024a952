"""Promises of the repository: chapters, map, budgets, examples."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
from book import Folders, api, chapter, methods, shelf, source
from generate import book_nav, group, map_link

ROOT = Path(__file__).parents[2]
LAYOUT = Folders(ROOT)
CHAPTERS = chapter.read_all(LAYOUT.chapters)
PARTS = ROOT / "site" / "hooks" / "parts.yml"
FRONT = re.compile(r'^chapter = start\(\s*(?:name=)?"(\w+)"', re.M)

# Public functions of the reference that no chapter shows yet. This list may only become
# shorter.
NOT_YET_SHOWN: set[str] = set()

# Functions beyond the budget, with reasons. An entry that is not needed is an error.
WIDER = {
    "minipeft/reference/lora.py:init": "the signature that every column shares",
    "minipeft/reference/loftq.py:init": "the signature that every column shares",
    "minipeft/torch/adamw.py:__init__": "what torch's own optimizer takes",
    "minipeft/torch/lora.py:init": "the signature that every column shares",
    "minipeft/torch/loftq.py:init": "the signature that every column shares",
    "minipeft/torch/paged.py:__init__": "what torch's own optimizer takes",
    "minipeft/torch/virtual.py:generate": "hands on what transformers' own takes",
    "minipeft/torch/experts.py:forward": "hands on what the wrapped module takes",
    "minipeft/torch/qlora.py:forward": "hands on what the wrapped module takes",
    "minipeft/torch/stack.py:_to": "hands on what `Tensor.to` takes",
    "minipeft/torch/saving.py:__call__": "refuses whatever transformers' own takes",
    "minipeft/values.py:call": "hands on what the checked function takes",
}
# Here a function's parameters are the inputs of a golden vector, by name.
VECTOR_FUNCTIONS = ("minipeft/golden/drivers/", "minipeft/golden/cases/")


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda c: c.name)
def test_the_first_code_cell_starts_the_chapter(script):
    first = script.code[0].source
    assert "from minipeft.lab.chapter import start" in first
    found = FRONT.search(first)
    assert found, "the first code cell has no `chapter = start(...)`"
    assert found[1] == script.name
    assert script.title
    assert script.limit <= chapter.LONGEST_LIMIT


SHAPE = ["problem", "formula|mechanism", "code", "proof", "experiment"]
END = ["What goes wrong in practice", "Exercises", "References"]
# These chapters have no method to derive or to prove; only their end is prescribed.
ESSAYS = ("00_", "17_", "18_", "19_", "22_", "23_", "24_", "25_", "26_", "27_")
ESSAYS += ("28_",)
ESSAYS += ("29_", "30_", "31_", "32_")


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda c: c.name)
def test_chapters_have_one_shape(script):
    text = (LAYOUT.chapters / f"{script.name}.py").read_text("utf-8")
    headings = re.findall(r"^# ## (.+)", text, re.M)
    assert headings[-3:] == END
    if not script.name.startswith(ESSAYS):
        first = [
            next((i for i, h in enumerate(headings) if re.search(part, h)), None)
            for part in SHAPE
        ]
        assert None not in first, (SHAPE, headings)
        assert first == sorted(first), headings


# Private names that a chapter may use, and why.
PRIVATE = {"08_dora": {"_merge", "_forward"}}  # the norm is an argument


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda c: c.name)
def test_a_chapter_uses_public_names(script):
    code = "\n".join(c.source for c in (*script.code, *script.solutions))
    used = {n.attr for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Attribute)}
    private = {name for name in used if re.match("_[^_]", name)}
    assert private == PRIVATE.get(script.name, set())


def test_every_chapter_is_in_the_navigation_in_the_order_of_the_files():
    nav = book_nav(group(CHAPTERS, PARTS))
    pages = [
        page
        for part in nav
        for chapters in part.values()
        for entry in chapters
        for page in entry.values()
    ]
    scripts = sorted((ROOT / "chapters").glob("*.py"))
    assert pages == [f"book/{path.stem}.md" for path in scripts]


def public_functions() -> set[str]:
    found = set()
    for path in (ROOT / "minipeft" / "reference").glob("[!_]*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.add(f"minipeft.reference.{path.stem}.{node.name}")
    return found


def shown() -> set[str]:
    lines = [line for c in CHAPTERS for p in c.prose for line in p.source.splitlines()]
    return {m["name"] for line in lines if (m := source.DIRECTIVE.match(line))}


def test_every_public_function_of_the_reference_is_shown_in_a_chapter():
    missing = public_functions() - shown()
    assert sorted(missing - NOT_YET_SHOWN) == [], "no chapter shows these with @source"
    assert sorted(NOT_YET_SHOWN - missing) == [], "shown by now: take them off the list"


def test_every_source_and_citation_of_a_chapter_exists():
    for name in shown():
        source.find(name, LAYOUT.package)
    keys = set(shelf.works(LAYOUT.docs / "bibliography.yml"))
    for script in CHAPTERS:
        for cell in script.prose:
            assert set(re.findall(r"\[@([\w-]+)", cell.source)) <= keys


def test_the_map_in_the_readme_is_the_one_that_the_files_draw():
    readme = (ROOT / "README.md").read_text()
    remedy = "run: python site/hooks/book/methods.py --write"
    assert methods.between(readme) == methods.table(ROOT), remedy


def holes(drawn: str) -> list[str]:
    rows = [line for line in drawn.splitlines() if line.startswith("| `")]
    return [row for row in rows if "" in map(str.strip, row.strip("|").split("|"))]


def test_the_map_has_no_hole():
    drawn = methods.table(ROOT)
    assert holes(drawn) == []
    assert holes(drawn.replace("[✓](tests/agreement/test_lora.py)", ""))  # a gap shows


def test_a_dash_in_the_map_stands_where_there_is_no_file():
    drawn = methods.table(ROOT)
    cupy = {row: methods.cells(ROOT, row)["cupy"] for row in methods.rows(ROOT)}
    dashed = {row for row, files in cupy.items() if not files}
    assert dashed == set(cupy) - methods.LAYOUT
    assert drawn.count(f"| {methods.DASH} |") == len(dashed)


def test_a_tick_of_the_map_leads_to_a_page():
    drawn = methods.table(ROOT, lambda column, file: map_link(LAYOUT, column, file))
    linked = set(re.findall(r"\(api/([^)]*)\)", drawn))
    assert linked
    assert linked <= {module.page for module in api.modules(LAYOUT)}


def test_the_map_ticks_exactly_what_exists(tmp_path):
    (tmp_path / "minipeft/reference").mkdir(parents=True)
    (tmp_path / "minipeft/golden/v1").mkdir(parents=True)
    (tmp_path / "chapters").mkdir()
    (tmp_path / "minipeft/reference/lora.py").touch()
    assert methods.table(tmp_path).splitlines()[2] == (
        "| `lora` | [✓](minipeft/reference/lora.py) |  |  |  |  |  |  |"
    )
    vector = {"testGroups": [{"source": {"name": "minipeft.reference.lora.merge"}}]}
    (tmp_path / "minipeft/golden/v1/lora_merge.json").write_text(json.dumps(vector))
    (tmp_path / "chapters/01_thin.py").write_text(
        "# @source minipeft.reference.lora.merge\n"
    )
    (tmp_path / "minipeft/torch").mkdir()
    (tmp_path / "minipeft/torch/lora.py").touch()
    assert methods.table(tmp_path).splitlines()[2] == (
        "| `lora` | [✓](minipeft/reference/lora.py) | [✓](minipeft/torch/lora.py) |"
        "  |  |  | [1](minipeft/golden/v1/lora_merge.json) |"
        " [01](chapters/01_thin.py) |"
    )


def sources(*patterns: str) -> list[Path]:
    return [
        path
        for pattern in patterns
        for path in sorted(ROOT.glob(pattern))
        if "site/book" not in path.as_posix()
    ]


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT_TOKENS = (
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT),
    *(tokenize.DEDENT, tokenize.ENDMARKER),
)


def code_lines(text: str) -> int:
    """Count lines of code: no docstring, comment or blank; a signature is one line."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT_TOKENS:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [a for a in ast.walk(node.args) if hasattr(a, "end_lineno")]
            annotated = [*arguments, *filter(None, [node.returns])]
            last = max((a.end_lineno for a in annotated), default=node.lineno)
            if last > node.lineno:
                found -= set(range(node.lineno + 1, last + 1 + (not node.returns)))
    return len(found)


def test_code_is_counted_without_what_explains_it():
    text = '''"""A docstring
of two lines."""

def f(
    x: int,  # the first
    y: int,
) -> int:
    """One line."""
    # A comment.
    return g(
        x,
        y,
    )


def h(
    x
):
    return x
'''
    assert code_lines(text) == 1 + 4 + 1 + 1


def test_files_are_short():
    budgets = {path: 150 for path in sources("minipeft/reference/*.py")}
    python = sources("minipeft/**/*.py", "tests/**/*.py", "site/**/*.py")
    lengths = {path: code_lines(path.read_text()) for path in [*budgets, *python]}
    for path in sources("minipeft/**/*.cu*"):
        lengths[path] = len(path.read_text().splitlines())
    for script in CHAPTERS:  # prose may be longer
        lengths[script.path] = sum(code_lines(c.source) for c in script.code)
    long = {
        path.relative_to(ROOT).as_posix(): length
        for path, length in lengths.items()
        if length > budgets.get(path, 400)
    }
    assert long == {}


def too_large(function: ast.FunctionDef) -> str:
    """List the functions over budget: 30 lines without docstring, 5 parameters."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function):
        doc = function.body[0]
        lines -= (doc.end_lineno or 0) - doc.lineno + 1
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    parameters = len([name for name in names if name not in ("self", "cls")])
    kwargs = "takes **kwargs" if a.kwarg else ""
    long = f"{lines} lines" if lines > 30 else ""
    wide = f"{parameters} parameters" if parameters > 5 else ""
    return ", ".join(filter(None, (long, wide, kwargs)))


def test_functions_are_small():
    found = {}
    for path in sources("minipeft/**/*.py", "site/**/*.py", "tools/*.py"):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            excess = too_large(node) if isinstance(node, ast.FunctionDef) else ""
            if name.startswith(VECTOR_FUNCTIONS) and "lines" not in excess:
                continue
            if excess:
                found[f"{name}:{node.name}"] = excess
    assert {k: v for k, v in found.items() if k not in WIDER} == {}
    assert sorted(set(WIDER) - set(found)) == [], "within the budget now: take them off"


def explained(path: Path) -> dict[str, list[str]]:
    """Return the lines of each docstring after its first, without errors and source."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = re.split("\n\n(?:Raises|Source):", ast.get_docstring(node) or "")[0]
            lines = [line.strip() for line in text.split("\n")[1:]]
            found[node.name] = [line for line in lines if line not in ("", "Args:")]
    return found


def test_a_torch_docstring_is_no_copy_of_the_reference():
    copies = []
    for path in sources("minipeft/torch/*.py"):
        if (definition := ROOT / "minipeft/reference" / path.name).exists():
            said = explained(definition)
            for name, lines in explained(path).items():
                same = [line for line in lines if line in said.get(name, [])]
                copies += [(path.name, name)] * (len(same) > len(lines) / 2)
    assert copies == []


def fences(page: str) -> list[str]:
    text = (ROOT / "site" / page).read_text()
    return re.findall(r"^```\w+[^\n]*\n(.*?)^```$", text, re.M | re.S)


def test_the_example_on_the_page_verify_is_true(tmp_path):
    module, said = fences("verify.md")[1:3]
    (tmp_path / "mine.py").write_text(module)
    command = [sys.executable, "-m", "minipeft.cli", "verify", "mine"]
    ran = subprocess.run(
        [*command, "--only", "lora_merge"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout.strip() == said.strip()
    assert ran.returncode == 1
    (tmp_path / "mine.py").write_text(re.sub("s = alpha.*", "s = alpha", module))
    ran = subprocess.run(
        [*command, "--only", "lora_merge"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "25 failed, 0 skipped of 46" in ran.stdout


def test_the_messages_on_the_page_verify_are_true():
    from minipeft.golden.implementations import functions
    from minipeft.golden.vectors import Question

    question, answer = map(json.loads, fences("verify.md")[3:5])
    outputs = functions("reference").answer(Question.from_json(question))
    assert {k: v.to_json() for k, v in outputs.items()} == answer["outputs"]


def test_every_file_of_the_package_is_installed_with_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, globs in patterns.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
        if path.is_file()
    }
    listed = ["git", "ls-files", "-z", "minipeft"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    data = {ROOT / name for name in tracked.decode().split("\0") if name}
    assert {p for p in data if p.suffix != ".py"} <= installed


def test_a_python_started_beside_a_clone_finds_the_package_in_it(tmp_path):
    """The folder of the clone has the name of the package, and is none."""
    pytest.importorskip("setuptools", "77")  # what pyproject.toml asks for
    package = "minipeft/__init__.py"
    licences = ("LICENSE", "minipeft/golden/LICENSE")
    for name in ("pyproject.toml", "README.md", package, *licences):
        copy = tmp_path / "minipeft" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; build_meta.build_editable('..')"
    clone = tmp_path / "minipeft"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    found = (
        "import site, sys; site.addsitedir(sys.argv[1])\n"
        "import minipeft; print(minipeft.__file__)"
    )
    command = [sys.executable, "-S", "-c", found, tmp_path / "installed"]
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    said = subprocess.check_output(command, cwd=tmp_path, env=bare, text=True)
    assert said.strip() == str(clone / package)
