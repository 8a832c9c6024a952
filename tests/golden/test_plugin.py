"""The pytest plugin in another project: one test for each case, and no test file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minipeft.golden.vectors import load_all

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NF4 = len(next(load_all(["nf4_quantize"])).cases)
PLAIN = "from minipeft.golden.drivers.reference.blockwise import nf4_quantize\n"
SWAPPED = """
right = nf4_quantize
def nf4_quantize(W, blocksize):
    packed, absmax = right(W=W, blocksize=blocksize)
    return packed >> 4 | packed << 4, absmax
"""


def pytest_in(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "minipeft.golden.pytest_plugin"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        # Without the other plugins installed here; some of them are slow.
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    counts = re.findall(r"(\d+) (\w+)", done.stdout.strip().splitlines()[-1])
    return done, {what: int(number) for number, what in counts}


@pytest.fixture
def project(tmp_path):
    (tmp_path / "mine.py").write_text(PLAIN)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nminipeft = mine\nminipeft_only = nf4_quantize\n"
    )
    return tmp_path


def test_each_case_is_a_test(project):
    done, counts = pytest_in(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts["passed"] == NF4


def test_without_an_implementation_it_does_nothing(tmp_path):
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    done, counts = pytest_in(tmp_path)
    assert (done.returncode, counts["passed"]) == (0, 1)


def test_keywords_and_marks_choose(project):
    (project / "test_own.py").write_text("def test_own(): pass\n")
    assert pytest_in(project)[1]["passed"] == NF4 + 1
    assert pytest_in(project, "-k", "nf4_quantize:26")[1]["passed"] == 1
    assert pytest_in(project, "-m", "not minipeft")[1]["passed"] == 1


def test_a_failure_says_what_breaks_without_a_traceback(project):
    (project / "mine.py").write_text(PLAIN + SWAPPED)
    done, counts = pytest_in(project)
    assert done.returncode == 1
    assert counts["failed"] > 10
    assert "effect: Neighbouring weights are swapped" in done.stdout
    assert "runtest" not in done.stdout


def test_known_failures_are_expected(project):
    (project / "mine.py").write_text(PLAIN + SWAPPED)
    failed = re.findall(r"FAILED minipeft::(\S+)", pytest_in(project)[0].stdout)
    (project / "known.txt").write_text("nf4_quantize:26\n" + "\n".join(failed[1:]))
    done, counts = pytest_in(project, "--minipeft-known-failures", "known.txt")
    assert counts["failed"] == 1
    assert counts["xfailed"] == len(failed) - 1
    assert f"FAILED minipeft::{failed[0]}" in done.stdout
    assert ("xpassed" in counts) == ("nf4_quantize:26" not in failed)


def test_a_module_that_is_missing_fails_every_test(project):
    done, counts = pytest_in(project, "--minipeft", "absent")
    assert done.returncode == 1
    assert counts["failed"] == NF4
    assert "cannot import 'absent'" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minipeft-only", "lore"], "minipeft: there are no vectors for lore"),
        (["--minipeft-profile", "own"], "minipeft: there is no profile 'own'"),
        (["--minipeft-known-failures", "no.txt"], "minipeft: cannot read"),
        (["--minipeft-timeout", "soon"], "--minipeft-timeout is 'soon'; give seconds"),
        (["--minipeft-timeout", "-1"], "--minipeft-timeout is -1; give seconds above"),
        (["--minipeft-timeout", "nan"], "--minipeft-timeout is nan; give seconds"),
        (["--minipeft-exec", "'half"], 'minipeft: cannot run "\'half"'),
        (
            ["--minipeft=mine", "--minipeft-exec=x"],
            "give --minipeft or --minipeft-exec",
        ),
    ],
)
def test_bad_options_are_one_sentence(arguments, said, project):
    done, _ = pytest_in(project, *arguments)
    assert done.returncode == 4
    assert said in done.stdout + done.stderr


def test_a_program_and_a_profile(project):
    program = f"{sys.executable} -c 'import sys; from minipeft.golden.worker import "
    program += 'main; main("mine")\''
    done, counts = pytest_in(project, "--minipeft-exec", program)
    assert counts["passed"] == NF4, done.stdout
    done, counts = pytest_in(project, "--minipeft-profile", "bnb-cuda")
    assert counts["failed"] > 0
    assert "profile bnb-cuda has" in done.stdout


def test_settings_mean_the_same_in_every_folder(project):
    (project / "known.txt").write_text("nf4_quantize:26\n")
    with (project / "pytest.ini").open("a") as settings:
        settings.write("minipeft_known_failures = known.txt\n")
    (project / "tests").mkdir()
    done, counts = pytest_in(project / "tests")
    assert counts["passed"] == NF4 - 1, done.stdout
    (project / "program").write_text(
        f"#!{sys.executable}\nimport sys\n"
        "from minipeft.golden.worker import main\nmain('mine')\n"
    )
    (project / "program").chmod(0o755)
    (project / "pytest.ini").write_text(
        "[pytest]\nminipeft_exec = ./program\nminipeft_only = nf4_quantize\n"
    )
    done, counts = pytest_in(project / "tests")
    assert counts["passed"] == NF4, done.stdout


def test_a_module_is_found_on_the_path_of_the_tests(project):
    (project / "src").mkdir()
    (project / "mine.py").rename(project / "src" / "mine.py")
    assert pytest_in(project)[1]["failed"] == NF4
    with (project / "pytest.ini").open("a") as settings:
        settings.write("pythonpath = src\n")
    done, counts = pytest_in(project)
    assert counts["passed"] == NF4, done.stdout


def test_the_command_line_goes_before_the_settings(project):
    inside = project / "inside"
    inside.mkdir()
    (inside / "known.txt").write_text("nf4_quantize:26\n")
    (project / "pytest.ini").write_text("[pytest]\nminipeft_exec = false\n")
    only = ("--minipeft-only", "nf4_quantize", "--minipeft", "minipeft.no_such")
    done, counts = pytest_in(project, *only, "--maxfail=1")
    assert "cannot import 'minipeft.no_such'" in done.stdout
    module = ("--minipeft-only", "nf4_quantize", "--minipeft", "reference")
    done, counts = pytest_in(inside, *module, "--minipeft-known-failures=known.txt")
    assert counts == {"passed": NF4 - 1, "xpassed": 1} | counts, done.stdout
    assert "failed" not in counts
