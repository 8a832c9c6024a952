"""A pytest plugin: one test for each case, `-p minipeft.golden.pytest_plugin`.

The plugin adds the tests; no test file is needed. The options of `minipeft verify` are
`--minipeft-...` options here, or settings in pytest's configuration.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minipeft.errors import InputError
from minipeft.golden import known, processes, profiles
from minipeft.golden.errors import Unavailable
from minipeft.golden.implementations import Implementation
from minipeft.golden.report import failure
from minipeft.golden.runner import (
    PATIENCE,
    Outcome,
    implementation,
    judge,
    unasked,
)
from minipeft.golden.vectors import Case, VectorFile, load_all

OPTIONS = {
    "minipeft": "the implementation: a built-in name, or package.module",
    "minipeft-exec": "a program that speaks JSON lines, in place of a module",
    "minipeft-only": "operations or rows, separated by spaces",
    "minipeft-profile": "whose choices are the rule",
    "minipeft-known-failures": "a file of cases that may fail",
    "minipeft-timeout": "seconds that a case may take",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add each option to the command line and to the configuration."""
    group = parser.getgroup("minipeft", "golden vectors of minipeft")
    for name, meaning in OPTIONS.items():
        group.addoption(f"--{name}", help=meaning)
        parser.addini(name.replace("-", "_"), meaning, default="")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test for each case, before pytest selects by `-k` and `-m`."""
    if not any(_either(config)):
        return
    try:
        subject = Subject(config)
    except InputError as error:
        raise pytest.UsageError(f"minipeft: {error}") from None
    config.add_cleanup(subject.close)
    for file in subject.files:
        for case in file.cases:
            name = f"{case.operation}:{case.tcId}"
            item = Golden.from_parent(session, name=name, nodeid=f"minipeft::{name}")
            item.ask(subject, file, case)
            items.append(item)


class Subject:
    """The implementation, and the state of the whole run."""

    def __init__(self, config: pytest.Config) -> None:
        self.files = list(load_all(_option(config, "minipeft-only").split()))
        profile = _option(config, "minipeft-profile")
        self._rule = profiles.load(profile) if profile else None
        listed = _option(config, "minipeft-known-failures")
        typed = _typed(config, "minipeft-known-failures")
        path = (config.invocation_params.dir if typed else config.rootpath) / listed
        self.known = known.read(path, load_all()) if listed else frozenset()
        self._name, self._program = _either(config)
        typed = _typed(config, "minipeft") or _typed(config, "minipeft-exec")
        # A setting means the same wherever pytest starts.
        self._folder = None if typed else config.rootpath
        self._paths = [Path(path) for path in config.getini("pythonpath")]
        self._timeout = _seconds(config, bool(self._program))
        if self._name and self._program:
            raise InputError("give --minipeft or --minipeft-exec, not both.")
        if self._program:
            processes.split(self._program)
        self._late: Counter[str] = Counter()
        self._started: Implementation | Unavailable | None = None

    def outcome(self, file: VectorFile, case: Case) -> Outcome:
        """Judge a case; after three time-outs skip the rest of the operation."""
        if self._late[file.name] == PATIENCE:
            return unasked(file, case, f"not asked after {PATIENCE} time-outs")
        outcome = judge(self._implementation(), file, case)
        self._late[file.name] += outcome.late
        return profiles.hold(self._rule, outcome) if self._rule else outcome

    def close(self) -> None:
        """End the process of the implementation."""
        if isinstance(self._started, Implementation):
            self._started.close()

    def _implementation(self) -> Implementation:
        if self._started is None:
            try:
                self._started = self._start()
            except Unavailable as reason:
                self._started = reason
        if isinstance(self._started, Unavailable):
            raise self._started
        return self._started

    def _start(self) -> Implementation:
        if self._program:
            return processes.program(self._program, self._timeout, self._folder)
        return implementation(self._name, self._timeout, self._folder, self._paths)


class Golden(pytest.Item):
    """One case as a test."""

    def ask(self, subject: Subject, file: VectorFile, case: Case) -> None:
        """Set the implementation and the case."""
        self._subject, self._file, self._case = subject, file, case
        self.add_marker(pytest.mark.minipeft)
        if self.name in subject.known:
            self.add_marker(pytest.mark.xfail(reason="a known failure", strict=False))

    def runtest(self) -> None:
        """Run the case, then pass, skip or fail; a policy never fails."""
        outcome = self._subject.outcome(self._file, self._case)
        if outcome.way:
            self.user_properties.append(("way", outcome.way))
        if outcome.status == "skip":
            pytest.skip(outcome.detail)
        if outcome.status == "fail":
            raise Failed(failure(outcome))

    def repr_failure(
        self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None
    ) -> str:
        """Show the text of the report without a traceback."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Name the file and the case."""
        return Path(self._file.name), None, f"{self.name}: {self._case.comment}"


class Failed(Exception):  # noqa: N818  # the outcome of a test
    """A failed case, with the text of the report."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, so that `-m minipeft` selects these tests."""
    config.addinivalue_line("markers", "minipeft: a case of the golden vectors")


def _either(config: pytest.Config) -> tuple[str, str]:
    """Return the module and the program; the command line goes before the settings."""
    names = ("minipeft", "minipeft-exec")
    typed = [_typed(config, name) for name in names]
    module, program = typed if any(typed) else [_option(config, n) for n in names]
    return module, program


def _seconds(config: pytest.Config, program: bool) -> float:
    default = processes.PROGRAM_TIMEOUT if program else processes.MODULE_TIMEOUT
    text = _option(config, "minipeft-timeout") or str(default)
    try:
        seconds = float(text)
    except ValueError:
        raise InputError(f"--minipeft-timeout is {text!r}; give seconds.") from None
    processes.check_timeout(seconds, "--minipeft-timeout")
    return seconds


def _typed(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"--{name}") or "")


def _option(config: pytest.Config, name: str) -> str:
    setting = config.getini(name.replace("-", "_"))
    return _typed(config, name) or str(setting or "")
