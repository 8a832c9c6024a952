"""A hash of every case, so that a published case never changes.

`manifest.json` lists, for each operation, one hash for each case in order: parameters,
inputs and outputs, and how the outputs are compared. New cases are added only at the
end of a file. What a case says, its flags, and the answers of others may be mended.
"""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from minipeft.errors import InputError

MANIFEST = Path(__file__).with_name("manifest.json")
DIGITS = 16  # 64 bits: enough to detect a change

Hashes = dict[str, list[str]]


def read() -> Hashes:
    """Return the hashes of every operation."""
    found: Hashes = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return found


def grown(known: Hashes, operation: str, content: Mapping[str, Any]) -> list[str]:
    """Return the hashes of a file's cases.

    Args:
        known: the earlier manifest.
        operation: the name of the file.
        content: what the file holds now.

    Raises:
        InputError: if a case of the manifest has changed or is gone.
    """
    hashes = [
        _hash(group, test) for group in content["testGroups"] for test in group["tests"]
    ]
    before = known.get(operation, [])
    for number, old in enumerate(before, start=1):
        if number > len(hashes) or hashes[number - 1] != old:
            raise InputError(
                f"{operation} tcId {number} is not what it was; v1 never changes: add "
                "the new case at the end of its file."
            )
    return hashes


def check_operations(known: Hashes, operations: Iterable[str]) -> None:
    """Refuse to lose the cases of an operation.

    Raises:
        InputError: if an operation of the manifest is not among those given.
    """
    if gone := sorted(set(known) - set(operations)):
        raise InputError(
            f"{gone[0]} has cases in v1 and is no operation any more; v1 never "
            "changes: give the operation its name again."
        )


def _hash(group: Mapping[str, Any], test: Mapping[str, Any]) -> str:
    case = [group["parameters"], test["inputs"], test.get("outputs")]
    if bounds := test.get("magnitudes"):
        case += [group["compare"], bounds]
    return sha256(json.dumps(case, sort_keys=True).encode()).hexdigest()[:DIGITS]
