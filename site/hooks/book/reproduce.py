"""Ask libraries some cases of the vectors; `bugs` starts this in a process of its own.

Each case has a fork, because some of them end the process that answers. So a library
is imported once, and whatever it needs as well.
"""

import json
import os
import signal
import sys

from minipeft.golden.errors import describe
from minipeft.golden.implementations import Functions, functions
from minipeft.golden.runner import judge
from minipeft.golden.vectors import Case, VectorFile, load_all

SECONDS = 20  # for one case
VERDICTS = ("pass", "fail", "policy", "skip")


def main() -> None:
    """Read which cases to ask which implementation, and write the verdicts."""
    job: dict[str, list[str]] = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with answers:
        json.dump({name: ask(name, cases) for name, cases in job.items()}, answers)


def ask(name: str, cases: list[str]) -> dict[str, str]:
    """Return the verdict of each case; nothing if the implementation cannot run."""
    try:
        implementation = functions(name)
    except Exception as error:  # the import of a library may raise any
        print(f"{name}: {describe(error)}")
        return {}
    verdicts = {}
    for said in cases:
        operation, _, number = said.partition(":")
        implementation.offers(operation)  # imports here, once, what the forks need
        (file,) = load_all([operation])
        (case,) = (case for case in file.cases if case.tcId == int(number))
        verdicts[said] = verdict(implementation, file, case)
    return verdicts


def verdict(implementation: Functions, file: VectorFile, case: Case) -> str:
    """Judge a case in a fork; a crash fails it, and no answer in time says nothing."""
    child = os.fork()
    if not child:
        code = VERDICTS.index("fail")
        signal.alarm(SECONDS)
        try:
            code = VERDICTS.index(judge(implementation, file, case).status)
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended == -signal.SIGALRM:
        return "skip"
    return VERDICTS[ended] if ended >= 0 else "fail"


if __name__ == "__main__":
    main()
