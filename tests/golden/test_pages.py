"""The pages about verification are true: the tests run the commands that they show."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.M)
ACTION = ROOT / ".github" / "actions" / "verify" / "action.yml"
BIN = Path(sys.executable).parent


def shell(folder, script, **variables):
    """Run a command that a reader would type, in this environment."""
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, **paths, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Make `minipeft` run this source, whatever is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    called = {"minipeft": "-m minipeft", "pytest": "-m pytest", "python3": ""}
    for name, how in called.items():
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {how} "$@"\n')
        command.chmod(0o755)
    monkeypatch.setattr(sys.modules[__name__], "BIN", folder)


def project(folder, last):
    """Follow the page in order, up to the heading that starts with `last`."""
    page = (ROOT / "site" / "ci.md").read_text(encoding="utf-8")
    said, done = "", None
    for language, title, text in BLOCK.findall(page.partition(f"\n## {last}")[0]):
        if language in ("python", "toml", "yaml"):
            path = folder / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif language == "sh" and title != "in your project" and has_programs(text):
            done = shell(folder, text)
            said = done.stdout
            assert f"exit code {done.returncode}" == title, text + said + done.stderr
        elif language == "text":
            if title:  # a file is shown whole, what a command prints in whole lines
                assert text == (folder / title).read_text()
            else:
                assert f"\n{text}" in f"\n{said}"
    return done


def has_programs(text):
    """Tell whether Node or Rust is here, where a command needs it; in CI it is."""
    needed = [program for program in ("node", "rustc") if f"{program} " in text]
    return all(map(shutil.which, needed)) or os.environ.get("CI")


@pytest.mark.usefixtures("commands")
def test_from_nothing_to_a_green_ci(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    done = project(folder, "no such heading")
    assert "the rule: profile peft" in done.stdout


@pytest.mark.usefixtures("commands")
def test_the_workflow_of_the_page_runs_the_action(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    project(folder, "In another language")
    workflow = yaml.safe_load((folder / ".github/workflows/golden.yml").read_text())
    step = workflow["jobs"]["verify"]["steps"][-1]
    action = yaml.safe_load(ACTION.read_text())
    assert step["uses"].rpartition("@")[0] == "minipeft/minipeft/" + str(
        ACTION.parent.relative_to(ROOT)
    )
    assert set(step["with"]) <= set(action["inputs"])
    done = act(folder, action, step["with"])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(folder)
    assert re.search(r"[1-9]\d+ passed, 0 failed, [1-9]\d* failed as known", summary)
    reports = {path.name for path in (folder / "minipeft-report").iterdir()}
    assert reports == {"report.json", "report.xml", "report.txt", "badge.json"}
    failing = act(folder, action, {**step["with"], "known-failures": ""})
    assert failing.returncode == 1
    for odd in ({"implementation": "golden; touch harm"}, {"profile": "$(touch harm)"}):
        assert act(folder, action, {**step["with"], **odd}).returncode == 2
    assert not (folder / "harm").exists()
    assert "minipeft: there is no profile '$(touch harm)'" in summary_of(folder)
    star = act(folder, action, {"implementation": "golden", "only": "*"})
    assert "there are no vectors for *; choose" in star.stderr


def summary_of(folder):
    return (folder / "summary").read_text()


def act(folder, action, given):
    """Run the last step of the action as GitHub does, with these inputs."""
    inputs = {k: v["default"] for k, v in action["inputs"].items()} | given
    step = action["runs"]["steps"][-1]
    variables = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: inputs[m[1]], value)
        for name, value in step["env"].items()
    }
    assert "${{" not in step["run"]  # an input is never run as code
    variables["GITHUB_STEP_SUMMARY"] = str(folder / "summary")
    return shell(folder, step["run"], **variables)
