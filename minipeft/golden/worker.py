"""A program that calls Python functions by JSON lines; `processes.worker` starts it.

Printed text of a library goes to stderr, and a library that reads stdin gets nothing.
So stdin carries only cases and stdout only answers.
"""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from minipeft.errors import InputError
from minipeft.golden.errors import Accident, Refused, Unsupported, describe
from minipeft.golden.implementations import Functions, functions
from minipeft.golden.operations import OPERATIONS
from minipeft.golden.vectors import Question


def main(name: str) -> None:
    """Greet, then answer until `stop` or the end of stdin."""
    requests = os.fdopen(os.dup(sys.stdin.fileno()))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    process = os.getpid()
    requests.readline()
    implementation, greeting = greet(name)
    if os.getpid() != process:  # the module has forked; this is the child
        os._exit(0)
    _send(answers, greeting)
    for line in requests:
        request = json.loads(line)
        if implementation is None or request["command"] == "stop":
            break
        said = answer(implementation, Question.from_json(request))
        if os.getpid() != process:  # the function has forked; this is the child
            os._exit(0)
        _send(answers, {"id": request["id"], **said})
    os._exit(0)  # do not wait for threads or exit hooks of a library


def greet(name: str) -> tuple[Functions | None, dict[str, Any]]:
    """Find the implementation; report its functions, or why it cannot run."""
    try:
        implementation = functions(name)
        offers = [op for op in OPERATIONS if implementation.offers(op)]
    except InputError as error:
        return None, {"unavailable": str(error)}
    except BaseException as error:  # the import of a module may raise any exception
        return None, {"unavailable": f"cannot import {name!r}: {describe(error)}"}
    return implementation, {"ready": name, "offers": offers}


def answer(implementation: Functions, question: Question) -> dict[str, Any]:
    """Return the answer as a line of JSON."""
    try:
        outputs = implementation.answer(question)
        return {"outputs": {name: t.to_json() for name, t in outputs.items()}}
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Refused as reason:
        return {"refused": str(reason)}
    except Accident as reason:
        return {"accident": str(reason)}
    except BaseException as error:
        return {"accident": describe(error)}


def _send(answers: TextIO, content: Mapping[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()
