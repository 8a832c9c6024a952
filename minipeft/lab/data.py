"""The two texts of the laboratory: Jane Austen's novels and The Devil's Dictionary.

Both are in the public domain and are stored, compressed, beside this module;
`data/README.md` gives their sources. Loading checks every file against
`data/SHA256SUMS`.
"""

import hashlib
import json
import lzma
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from minipeft.errors import InputError
from minipeft.values import checked

DATA = Path(__file__).with_name("data")

AUSTEN_TRAIN = (
    "emma",
    "mansfield_park",
    "northanger_abbey",
    "pride_and_prejudice",
    "sense_and_sensibility",
)
HELD_OUT = "persuasion"
"""The novel that `tiny` has never read; chapters measure forgetting on it."""

VALIDATION_SHARE = 0.1
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Entry:
    """One definition of The Devil's Dictionary."""

    word: str
    part: str
    definition: str

    @property
    def prompt(self) -> str:
        """The prompt. Not in capitals, which a small vocabulary splits into letters."""
        return f"{self.word.capitalize()}, {self.part}"

    @property
    def answer(self) -> str:
        """The correct continuation."""
        return f" {self.definition}"

    @property
    def split(self) -> Split:
        """The side of the word, by its hash; other entries do not change it."""
        digest = hashlib.sha256(self.word.encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        return "validation" if share < VALIDATION_SHARE else "train"


@checked
def austen(novel: str) -> str:
    """Return a novel as text, one paragraph a line.

    Args:
        novel: One of `AUSTEN_TRAIN`, or `HELD_OUT`.

    Raises:
        InputError: No such novel, or its file is damaged.
    """
    if novel not in (*AUSTEN_TRAIN, HELD_OUT):
        choices = ", ".join((*AUSTEN_TRAIN, HELD_OUT))
        raise InputError(f"there is no novel {novel!r}; choose one of {choices}")
    return _read(f"{novel}.txt.xz")


@checked
def devils_dictionary(split: Split | None = None) -> list[Entry]:
    """Return the entries of one side of the split, or all, in the order of the book.

    Raises:
        InputError: The file is damaged.
    """
    lines = _read("devils_dictionary.jsonl.xz").splitlines()
    entries = [Entry(**json.loads(line)) for line in lines]
    return [entry for entry in entries if split in (None, entry.split)]


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def checksums() -> dict[str, str]:
    """Return {file: sha256} of everything under `data/`, as committed."""
    lines = (DATA / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


@cache
def _read(name: str) -> str:
    """Return a compressed text after checking its hash."""
    path = DATA / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read; install minipeft again") from error
    if sha256(data) != checksums()[name]:
        raise InputError(f"{path} is damaged (wrong sha256); install minipeft again")
    return lzma.decompress(data).decode()
