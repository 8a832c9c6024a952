"""Answer cases line by line: `python -m minipeft.golden.worker IMPL`.

The other end of `processes.Worker`. What a library prints goes to stderr, so that
stdout holds answers alone.
"""

import json
import os
import sys
from typing import Any, TextIO

from minipeft.errors import InputError
from minipeft.golden.errors import Accident, Refused, Unsupported
from minipeft.golden.implementations import Functions, functions
from minipeft.golden.vectors import Question


def main(name: str) -> None:
    """Greet, then answer until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdin.readline()
    try:
        implementation = functions(name)
    except InputError as error:
        return _send(answers, {"unavailable": str(error)})
    except Exception as error:  # a module may fail in any way while it is imported
        why = f"cannot import {name!r}: {type(error).__name__}: {error}"
        return _send(answers, {"unavailable": why})
    _send(answers, {"ready": name})
    for line in sys.stdin:
        _send(answers, answer(implementation, Question.from_json(json.loads(line))))


def answer(implementation: Functions, question: Question) -> dict[str, Any]:
    """Return the answer as a program would print it."""
    try:
        outputs = implementation.answer(question)
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Refused as reason:
        return {"refused": str(reason)}
    except Accident as reason:
        return {"accident": str(reason)}
    return {"outputs": {name: tensor.to_json() for name, tensor in outputs.items()}}


def _send(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
