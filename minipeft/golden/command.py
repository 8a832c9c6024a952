"""`minipeft verify`: its options, the run, and the reports."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread

from minipeft.errors import IN_CLONE, InputError, cannot_write
from minipeft.golden import diagnosis, known, processes, profiles, report
from minipeft.golden.drivers import need
from minipeft.golden.errors import Unavailable, printable
from minipeft.golden.implementations import BUILT_IN, Implementation
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.report import Run
from minipeft.golden.runner import Outcome, implementation, judge, unasked, verify
from minipeft.golden.vectors import VectorFile, load_all
from minipeft.values import check_device

REPORTS = ("json", "junit", "badge")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand to the `minipeft` command."""
    parser = commands.add_parser(
        "verify",
        help="run the golden vectors on an implementation",
        description="Run the golden vectors on an implementation. Exit code 0: all "
        "pass; 1: a vector fails; 2: the implementation cannot run.",
    )
    parser.add_argument(
        "implementation",
        nargs="?",
        metavar="IMPL",
        help=f"{', '.join(BUILT_IN)}, or package.module with plain functions",
    )
    parser.add_argument(
        "--exec",
        metavar="PROGRAM",
        dest="program",
        help="a program: one JSON case on stdin, one JSON answer on stdout",
    )
    _add_conditions(parser)
    _add_choices(parser)
    parser.set_defaults(run=run)


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--persistent",
        action="store_true",
        help="the program is started once and answers line by line",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="how long a case may take (default: 10 for a program, 120 for a module)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="where torch and the libraries on it compute: cpu, cuda or cuda:N "
        "(default: cpu)",
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="an operation or a row of methods, such as nf4_quantize or lora",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the functions that are called"
    )
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"make a library's choices the rule: {', '.join(profiles.load_all())}",
    )
    _add_files(parser)
    parser.add_argument(
        "--explain",
        metavar="CASE",
        help="print one case in full, such as nf4_quantize:26, and the answer to it",
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--known-failures",
        metavar="FILE",
        help="text: cases that may fail, one operation:tcId on a line",
    )
    parser.add_argument(
        "--write-known-failures",
        action="store_true",
        help="write what fails now into that file; cases not asked stay in it",
    )
    parser.add_argument("--json", metavar="FILE", help="write a report")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML")
    parser.add_argument("--badge", metavar="FILE", help="write JSON for shields.io")


def run(options: argparse.Namespace) -> int:
    """Print a list or a case, or run the cases; return the exit code."""
    if options.list:
        print("\n".join(op.signature(name) for name, op in OPERATIONS.items()))
        return 0
    name = _check(options)
    return _ask(options, name) if options.explain is None else _explain(options)


def _ask(options: argparse.Namespace, name: str) -> int:
    """Run the cases, report, and return the exit code."""
    files = list(load_all(options.only))
    hold, listed = _rule(options), _listed(options)
    excused = frozenset() if options.write_known_failures else listed
    outcomes: list[Outcome] = []
    stopped = ""
    try:
        with _terminated_like_interrupted(), closing(_subject(options)) as subject:
            for outcome in verify(subject, files):
                outcomes.append(known.excuse(excused, hold(outcome)))
    except Unavailable as reason:
        stopped = printable(str(reason))
    except KeyboardInterrupt:
        stopped = f"interrupted after {len(outcomes)} cases."
    outcomes += _rest(files, outcomes, stopped)
    once = options.program is not None and not options.persistent
    stopped = stopped or _nothing(name, outcomes, once)
    if options.write_known_failures and not stopped:
        outcomes = [known.excuse(_failing(outcomes), o) for o in outcomes]
    found = Run(name, tuple(outcomes), stopped, options.profile or "", excused)
    unwritten = _write(options, found, listed)
    _print(report.text(found))
    if stopped or unwritten:
        raise InputError(stopped or unwritten)
    return 1 if any(outcome.status == "fail" for outcome in outcomes) else 0


def _explain(options: argparse.Namespace) -> int:
    operation, _, number = options.explain.partition(":")
    (file,) = load_all([operation]) if operation in OPERATIONS else (None,)
    cases = {str(case.tcId): case for case in file.cases} if file else {}
    if file is None or number not in cases:
        raise InputError(
            f"there is no case {options.explain!r}; write operation:tcId, such as "
            "nf4_quantize:26."
        )
    hold, listed = _rule(options), _listed(options)
    with closing(_subject(options)) as subject:
        outcome = known.excuse(listed, hold(judge(subject, file, cases[number])))
    _print(diagnosis.explain(outcome))
    return 1 if outcome.status == "fail" else 0


def _check(options: argparse.Namespace) -> str:
    """Refuse wrong options before a case runs; return the implementation."""
    name, program = options.implementation, options.program
    if (name is None) == (program is None):
        raise InputError(
            f"give one implementation: {', '.join(BUILT_IN)}, package.module, or "
            "--exec PROGRAM."
        )
    if options.persistent and program is None:
        raise InputError("--persistent is for a program; give --exec PROGRAM.")
    if program is not None:
        processes.split(program)
    processes.check_timeout(options.timeout, "--timeout")
    _check_files(options)
    _place(options)
    return printable(program or name)


def _check_files(options: argparse.Namespace) -> None:
    written = {f"--{name}": getattr(options, name) for name in REPORTS}
    written = {flag: path for flag, path in written.items() if path is not None}
    for path in written.values():
        _check_writable(path)
    if options.explain is not None and (written or options.write_known_failures):
        what = " ".join(written) or "--write-known-failures"
        raise InputError(f"--explain prints one case and writes no file; omit {what}.")
    _check_apart({**written, "--known-failures": options.known_failures})
    if options.write_known_failures:
        if options.known_failures is None:
            raise InputError("--write-known-failures needs --known-failures FILE.")
        _check_writable(options.known_failures)


def _check_apart(named: dict[str, str | None]) -> None:
    """Refuse two options that name one file."""
    flags: dict[str, str] = {}
    for flag, path in named.items():
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue  # such as /dev/null
        first = flags.setdefault(os.path.realpath(path), flag)
        if first != flag:
            raise InputError(f"{first} and {flag} both name {path}; give two files.")


def _check_writable(path: str) -> None:
    folder = os.path.dirname(path) or "."
    if not path or os.path.isdir(path):
        what = "a folder" if path else "no name"
        raise InputError(f"cannot write {path!r}: it is {what}; name a file.")
    if not os.path.isdir(folder):
        raise InputError(f"cannot write {path}: there is no folder {folder}.")
    try:
        os.stat(path)
    except FileNotFoundError:
        return
    except OSError as error:  # the name is too long
        raise cannot_write(path, error) from None


def _place(options: argparse.Namespace) -> None:
    device: str = options.device
    if device == "cpu":
        return
    if options.program or options.implementation in ("reference", "cupy"):
        raise InputError(
            f"--device {device} is for torch and the libraries that compute with it; "
            f"leave it out for {options.program or options.implementation}."
        )
    need("torch", IN_CLONE.format("torch"))
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = check_device(device, ("cpu",), count, "leave out --device.")
    os.environ["MINIPEFT_DEVICE"] = found  # the drivers' bridge reads it


def _subject(options: argparse.Namespace) -> Implementation:
    if options.program is None:
        return implementation(
            options.implementation, options.timeout or processes.MODULE_TIMEOUT
        )
    start = processes.program if options.persistent else processes.Program
    return start(options.program, options.timeout or processes.PROGRAM_TIMEOUT)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """On SIGTERM and SIGHUP too, end the run with a report and end all processes."""
    if current_thread() is not main_thread():  # Python sets no handler there
        yield
        return
    ends = [signal.SIGTERM, signal.SIGHUP] if os.name == "posix" else [signal.SIGTERM]
    before = {number: signal.getsignal(number) for number in ends}
    for number in ends:
        if before[number] != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rest(
    files: list[VectorFile], outcomes: list[Outcome], why: str
) -> Iterator[Outcome]:
    """Return an outcome for each case that was not run."""
    cases = ((file, case) for file in files for case in file.cases)
    for number, (file, case) in enumerate(cases):
        if number >= len(outcomes):
            yield unasked(file, case, f"not asked: {why}")


def _nothing(name: str, outcomes: list[Outcome], once: bool) -> str:
    """Say why no case could be run, if no case was answered.

    A program that is started once for each case cannot report this in another way.
    """
    asked = [outcome for outcome in outcomes if outcome.status != "skip"]
    if not asked:
        return f"{name} answered no case; name its functions as the operations."
    if once and not any(outcome.answered for outcome in outcomes):
        return f"{name!r} answered no case: {asked[0].detail}."
    return ""


def _rule(options: argparse.Namespace) -> Callable[[Outcome], Outcome]:
    """Return what holds an outcome to the profile."""
    if options.profile is None:
        return lambda outcome: outcome
    return partial(profiles.hold, profiles.load(options.profile))


def _listed(options: argparse.Namespace) -> known.Known:
    path = options.known_failures
    if path is None or (options.write_known_failures and not os.path.isfile(path)):
        return frozenset()
    return known.read(Path(options.known_failures), load_all())


def _failing(outcomes: list[Outcome]) -> known.Known:
    return frozenset(known.name(o) for o in outcomes if o.status == "fail")


def _write(options: argparse.Namespace, found: Run, listed: known.Known) -> str:
    """Write each requested report, a list of failures of a whole run; return errors."""
    listing = options.write_known_failures and not found.stopped
    wanted: list[tuple[str | None, Callable[[Run], str]]] = [
        (options.json, report.as_json),
        (options.junit, report.as_junit),
        (options.badge, report.as_badge),
        (
            options.known_failures if listing else None,
            lambda found: known.write(found.outcomes, listed, load_all()),
        ),
    ]
    failed = ""
    for path, render in wanted:
        try:
            if path is not None:
                _replace(Path(path), render(found))
        except OSError as error:
            failed = f"cannot write {path}: {error.strerror}."
    return failed


def _replace(path: Path, text: str) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _print(text: str) -> None:
    """Print to stdout in any encoding, also if the reader has closed the pipe."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:  # a stream of another kind takes any text
        reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head`: Python flushes stdout again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
