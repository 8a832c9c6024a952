"""The task that the chapters share: `tiny` learns The Devil's Dictionary.

All chapters use one training set, one held-out set and one length of an example, so
their losses can be compared. `--data` replaces the task by a file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minipeft.errors import InputError
from minipeft.lab import chat, data, text
from minipeft.lab.train import Batch, Batches
from minipeft.values import checked

LENGTH = 64
"""Tokens that an example may have: longer ones are cut."""
CHAT_LENGTH = 128
"""The same for conversations, of which a template takes a part."""
BEFORE = "tiny before training, loss on the held-out definitions"
"""The label of the loss that every chapter on this task begins with."""
FORMS = (
    '{"word": …, "definition": …}, {"prompt": …, "completion": …}, '
    '{"messages": [{"role": …, "content": …}, …]} or {"text": …}'
)
"""What a line of a JSONL file may be."""
FEWEST = 40
"""Examples that a file must hold: some are set apart, and some start a prompt."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """The training and the held-out examples: (prompt, answer) pairs.

    Attributes:
        train: examples to learn.
        validation: examples that no run trains on.
        length: tokens that an example may have.
        rows: held-out examples a batch.
        chats: the conversations that pairs come from.
    """

    train: list[Pair]
    validation: list[Pair]
    length: int = LENGTH
    rows: int = 25
    chats: Mapping[Pair, chat.Messages] = field(default_factory=dict)

    def training(self, tokenizer: Any, rows: int = 8, seed: int = 0) -> Batches:
        """Return batches of training examples, each epoch in a new order.

        Args:
            tokenizer: The model's.
            rows: Examples a batch.
            seed: Of the order.
        """
        return text.examples(tokenizer, self.train, (rows, self.length), seed)

    def held_out(self, tokenizer: Any) -> list[Batch]:
        """Return every example that no chapter trains on, once."""
        size = (self.rows, self.length)
        return text.example_batches(tokenizer, self.validation, size)

    def written_for(self, tokenizer: Any) -> "Task":
        """Return the task with its conversations in the tokenizer's chat template.

        Without a template, or without conversations, it is this task.

        Raises:
            InputError: as `chat.written`.
        """
        if not self.chats or not getattr(tokenizer, "chat_template", None):
            return self

        def pair(one: Pair) -> Pair:
            found = self.chats.get(one)
            return chat.written(tokenizer, found) if found else one

        train, validation = map(pair, self.train), map(pair, self.validation)
        return Task([*train], [*validation], max(self.length, CHAT_LENGTH), self.rows)

    def judged_by(self, count: int) -> "Task":
        """Return the task with so many held-out examples, evenly from all of them."""
        every = len(self.validation)
        chosen = [self.validation[i * every // count] for i in range(min(count, every))]
        return replace(self, validation=chosen if count < every else self.validation)


def dictionary() -> Task:
    """Return the definitions, on the two sides of their split.

    As conversations they are answers to `Define: Politician, n.`.
    """
    sides = [data.devils_dictionary(split) for split in ("train", "validation")]
    train, validation = ([(e.prompt, e.answer) for e in side] for side in sides)
    chats = {pair: _asked(*pair) for pair in (*train, *validation)}
    return Task(train, validation, chats=chats)


@checked
def from_file(path: Path) -> Task:
    """Return the examples of a JSONL file; one in ten, by hash, is held out.

    All examples of a prompt are on one side. At least one is on each.

    Args:
        path: UTF-8, an object a line: see `FORMS`. Each answer of the assistant in
            messages is an example, and all of a line are on one side; a text's first
            word is its prompt.

    Raises:
        InputError: The file cannot be read, a line is none of these, there are fewer
            than `FEWEST` examples, or all have the same prompt.
    """
    try:
        # Not splitlines: it cuts at characters that may stand in a JSON string.
        lines = path.read_text("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error})") from None
    rows: list[tuple[bytes, Pair]] = []
    chats: dict[Pair, chat.Messages] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = [*_examples(line, f"line {number} of {path}")]
        digest = _digest(line, found[0][0])
        rows += [(digest, pair) for pair, _ in found]
        chats |= {pair: messages for pair, messages in found if messages}
    if len(rows) < FEWEST:
        count = "1 example" if len(rows) == 1 else f"{len(rows)} examples"
        raise InputError(f"{path} holds {count}; give at least {FEWEST}")
    train, held = _sides(rows, path)
    return Task(train, held, chats=chats)


def _sides(rows: list[tuple[bytes, Pair]], path: Path) -> tuple[list[Pair], list[Pair]]:
    """Return what is trained on and what is held out; neither is empty."""
    digests = {digest for digest, _ in rows}
    if len(digests) < 2:
        raise InputError(
            f"all {len(rows)} examples of {path} have the same prompt or text, and "
            "such examples stay together; give two different ones or more"
        )
    chosen = {digest for digest in digests if digest[0] < 26} or {min(digests)}
    chosen -= {max(digests)}  # one side cannot take all
    train = dict.fromkeys(pair for digest, pair in rows if digest not in chosen)
    held = dict.fromkeys(pair for digest, pair in rows if digest in chosen)
    return [*train], [*held]


def _digest(line: str, first: Pair) -> bytes:
    """Return the hash of a line's prompt, or of a whole text.

    Many texts begin with the same word, so that word does not choose their side.
    """
    text, whole = json.loads(line).get("text"), "".join(first)
    is_text = isinstance(text, str) and text.strip() == whole
    return hashlib.sha256((whole if is_text else first[0] or whole).encode()).digest()


def _examples(line: str, where: str) -> Iterator[tuple[Pair, chat.Messages | None]]:
    """Yield the pairs of a line, each with the conversation that it stands for."""
    entry = _entry(line, where)
    found = _messages(entry.get("messages")) if isinstance(entry, dict) else None
    if found:
        for messages in chat.answers(found):
            pair = chat.lines(messages)
            _check_answer(pair, where)
            yield pair, messages
        return
    fields = _fields(entry) if isinstance(entry, dict) else None
    if fields is None or not all(isinstance(field, str) for field in fields):
        if isinstance(entry, dict) and _one_message(entry.get("messages")):
            raise InputError(
                f"{where} is a conversation of one message; give a question and its "
                "answer, or leave the line out"
            )
        raise InputError(f"{where} is none of {FORMS}")
    _check_answer(fields, where)
    yield fields, _asked(*fields) if "definition" in entry else None


def _entry(line: str, where: str) -> Any:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON ({error}); give one object a line: {FORMS}"
        ) from None
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InputError(
            f"{where} holds {half!r}, which is half of a character; write the whole "
            "character, or leave it out"
        ) from None
    return entry


def _check_answer(pair: Pair, where: str) -> None:
    if not pair[1].strip():
        raise InputError(f"{where} has an empty answer; leave the line out")


def _asked(prompt: str, answer: str) -> chat.Messages:
    """Return a definition as a conversation."""
    return [
        {"role": "user", "content": f"Define: {prompt}"},
        {"role": "assistant", "content": answer.strip()},
    ]


def _fields(entry: Mapping[str, Any]) -> tuple[Any, Any] | None:
    if {"word", "definition"} <= entry.keys():
        part = entry.get("part")
        prompt = f"{entry['word']}, {part}" if part else entry["word"]
        return prompt, f" {entry['definition']}"
    if {"prompt", "completion"} <= entry.keys():
        return entry["prompt"], entry["completion"]
    if isinstance(entry.get("text"), str):
        first, space, rest = entry["text"].strip().partition(" ")
        return first, space + rest
    return None


def _one_message(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) == 1


def _messages(messages: Any) -> chat.Messages | None:
    """Return a conversation if these are two messages or more."""
    if not isinstance(messages, list) or len(messages) < 2:
        return None
    for m in messages:
        if not isinstance(m, dict) or not {"role", "content"} <= m.keys():
            return None
        if not isinstance(m["role"], str) or not isinstance(m["content"], str):
            return None
    return messages
