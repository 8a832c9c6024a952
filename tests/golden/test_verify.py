"""`minipeft verify`: exit codes, the report, skips, crashes, and programs."""

import json
import os
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest

from minipeft import __version__
from minipeft.golden.implementations import Functions
from minipeft.golden.runner import verify
from minipeft.golden.vectors import load_all
from tests.golden.commands import ROOT, here, minipeft

pytestmark = pytest.mark.slow

# CPU cores are shared; the book's time limits allow for it in the same way.
SLOWNESS = float(os.environ.get("BOOK_SLOWNESS", "1"))
ONE = ("--only", "lora_merge")  # all vectors take longer to read
PLAIN = f"{sys.executable} tests/impls/plain_program.py"


@pytest.mark.parametrize("column", ["reference", "torch"])
def test_our_columns_pass(column, tmp_path):
    if column == "torch":
        pytest.importorskip("torch")
    begun = time.perf_counter()
    done = minipeft("verify", column, "--json", str(tmp_path / "report.json"))
    assert time.perf_counter() - begun < 15 * SLOWNESS
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    # Its pages are objects, so no number can name a missing page.
    skipped = 2 if column == "torch" else 0
    assert f" 0 failed, {skipped} skipped" in done.stdout
    # As the page says, only where a bound is the comparison is a right answer inexact.
    cases = {(f.name, c.tcId): c for f in load_all() for c in f.cases}
    said = json.loads((tmp_path / "report.json").read_text("utf-8"))["cases"]
    inexact = [cases[c["file"], c["tcId"]] for c in said if c.get("exact") is False]
    assert inexact
    for case in inexact:
        assert any(rule.startswith("gamma:") for rule in case.compare.values()), case


def test_reference_needs_only_numpy():
    script = (
        "import sys\n"
        "from minipeft.cli import main\n"
        "code = main(['verify', 'reference', '--only', 'lora_forward'])\n"
        "heavy = {'torch', 'ml_dtypes', 'jsonschema', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("verify torch", "torch", "'.[torch]'"),
        ("inspect {}", "torch", "'.[files]'"),
        ("memory tiny", "transformers", "'.[lab]'"),
        ("models list", "safetensors", "'.[lab]'"),
        ("gpu-report", "cupy", "'.[cupy]'"),
    ],
)
def test_a_missing_package_is_one_sentence(tmp_path, command, missing, extra):
    """As after `pip install .`, which brings NumPy alone."""
    script = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Bare(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        here = sys.stdlib_module_names | {'minipeft', 'numpy'}\n"
        "        found = name.partition('.')[0] in here\n"
        "        return super().find_spec(name, path, target) if found else None\n"
        "others = [f for f in sys.meta_path if f is not PathFinder]\n"
        "sys.meta_path[:] = [Bare, *others]\n"
        "from minipeft.cli import main\n"
        f"sys.exit(main({command.format(tmp_path).split()!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{missing} is not installed" in done.stderr.lower()
    assert f"pip install {extra} in the clone" in done.stderr.replace("`", "")


def test_without_ml_dtypes_the_bfloat16_cases_are_listed_skips(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    from minipeft.golden.runner import implementation

    outcomes = list(verify(implementation("reference"), load_all(["nf4_dequantize"])))
    skipped = [o for o in outcomes if o.status == "skip"]
    assert skipped
    assert all("ml_dtypes" in o.detail for o in skipped)
    assert all(o.status != "fail" for o in outcomes)


def test_a_broken_module_fails_and_the_report_says_why():
    done = minipeft("verify", "tests.impls.broken_nibbles")
    assert done.returncode == 1
    assert "FAIL  nf4_quantize.json tcId 6: -1 then 1" in done.stdout
    assert "NibbleOrder (HISTORIC_BUG): The first of two codes" in done.stdout
    assert "effect: Neighbouring weights are swapped" in done.stdout
    assert "bitsandbytes/pull/1472" in done.stdout


def test_a_missing_function_is_a_listed_skip():
    done = here("verify", "tests.impls.broken_nibbles", "--only", "nf4_dequantize")
    assert done.returncode == 0
    done = here("verify", "tests.impls.broken_nibbles", "--only", "blockwise")
    assert "has no function fp4_quantize" in done.stdout


def test_a_crash_fails_its_cases_and_the_run_goes_on():
    done = here("verify", "tests.impls.crashing", "--only", "lora_forward")
    assert done.returncode == 1
    assert "the process was ended by SIGSEGV" in done.stdout
    (file,) = load_all(["lora_forward"])
    crashes = sum("bias" in case.question.inputs for case in file.cases)
    assert f"{len(file.cases) - crashes} passed, {crashes} failed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify"], "give one implementation"),
        (["verify", "reference", "--exec", "true"], "give one implementation"),
        (["verify", "mine.py", *ONE], "there is no module 'mine.py'; give 'mine'"),
        (
            ["verify", "a/mine.py", *ONE],
            "there is no module 'a/mine.py'; give 'a.mine'",
        ),
        (["verify", "../a/mine.py", *ONE], "stand in ../a and give 'mine' for the"),
        (["verify", "/a/mine.py", *ONE], "stand in /a and give 'mine' for the file"),
        (["verify", "no.such.module", *ONE], "cannot import 'no.such.module'"),
        (["verify", "json", *ONE], "json answered no case"),
        (["verify", "torch", "--persistent"], "--persistent is for a program"),
        (["verify", "--exec", "'half"], "quote it again"),
        (["verify", "reference", "--json", ""], "it is no name"),
        (["verify", "reference", "--junit", "tests"], "it is a folder"),
        *(
            (["verify", "reference", "--timeout", seconds], "--timeout is")
            for seconds in ("nan", "inf", "1e10", "0", "-1")
        ),
        (["verify", "reference", *ONE, "--json", "n" * 300], "cannot write nnn"),
        (["verify", "reference", *ONE, "--profile", ""], "there is no profile ''"),
        (["verify", "reference", "--explain", ""], "there is no case ''"),
        (
            ["verify", "reference", "--explain", "lora_merge:1", "--json", "x"],
            "--explain prints one case and writes no file; omit --json",
        ),
        (
            ["verify", "reference", *ONE, "--json", "x", "--known-failures", "./x"],
            "--json and --known-failures both name ./x; give two files",
        ),
        (["verify", "reference", "--only", "lore"], "no vectors for lore; choose from"),
        (
            ["verify", "reference", "--only", "lora", "--json", "/no/x"],
            "cannot write /no",
        ),
        (["models", "fetch", "nothing"], "choose one of"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, said):
    done = here(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_version():
    assert minipeft("--version").stdout.split() == ["minipeft", __version__]


def test_reports(tmp_path):
    files = tmp_path / "report.json", tmp_path / "report.xml"
    done = here(
        "verify",
        "tests.impls.broken_nibbles",
        *("--only", "nf4_quantize", "--only", "fp4_quantize"),
        *("--json", str(files[0]), "--junit", str(files[1])),
    )
    assert done.returncode == 1
    report = json.loads(files[0].read_text())
    totals = report["totals"]
    assert totals["fail"] > 0
    assert sum(totals.values()) == len(report["cases"])
    suites = ElementTree.parse(files[1]).getroot()
    assert [s.get("name") for s in suites] == ["nf4_quantize.json", "fp4_quantize.json"]
    assert sum(int(s.get("failures", 0)) for s in suites) == totals["fail"]
    assert len(suites.findall(".//failure")) == totals["fail"]
    assert len(suites.findall(".//skipped")) == totals["skip"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.xml"]


def test_an_argument_that_is_overwritten_is_a_failure():
    def lora_merge(W, A, B, alpha, rank_stabilized):
        W += 1
        return W

    broken = Functions("broken", {"lora_merge": lora_merge}.get)
    details = {o.detail for o in verify(broken, load_all(["lora_merge"]))}
    assert "overwrote its argument W" in details


def test_a_second_opinion_without_numpy_agrees():
    done = minipeft("verify", "--exec", PLAIN, "--only", "lora_forward")
    assert done.returncode == 0, done.stdout
    done = minipeft("verify", "--exec", PLAIN, "--persistent", "--only", "nf4_quantize")
    assert done.returncode == 0, done.stdout
    assert " 0 failed, 0 skipped" in done.stdout


@pytest.mark.parametrize("command", ["./no/such/program", "tests/conftest.py", "''"])
def test_a_program_that_cannot_start_is_exit_code_2(command):
    done = here("verify", "--exec", command, *ONE)
    assert done.returncode == 2
    assert "cannot run" in done.stderr
