"""The fingerprint of a base: a SHA-256 of each tensor, and one of all."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor, nn

from minipeft.errors import InputError, OtherBaseError
from minipeft.interop.spelling import counterpart
from minipeft.interop.tensors import PIECE, About, Tensors, bytes_of

BASE = "minipeft.base"
"""The key of a file's metadata with the fingerprint of its base."""
THREADS = 4
"""How many tensors are hashed at one time, at most."""


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 by name of tensor; dtype and shape are hashed with the values."""

    tensors: Mapping[str, str]

    @property
    def whole(self) -> str:
        """The SHA-256 of all names and hashes."""
        text = json.dumps(dict(self.tensors), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text for a file's metadata."""
        return json.dumps({"whole": self.whole, "tensors": dict(self.tensors)})

    @classmethod
    def from_json(cls, text: str) -> "Fingerprint":
        """Read the text that `to_json` wrote.

        Raises:
            InputError: the text is no fingerprint, or its hashes do not belong
                together.
        """
        try:
            fields = json.loads(text)
            found = cls({str(n): str(h) for n, h in fields["tensors"].items()})
            right = fields["whole"] == found.whole
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"the fingerprint of the base is malformed ({error}); write the file "
                "again"
            ) from None
        if not right:
            raise InputError(
                "the fingerprint of the base was changed by hand; write the file again"
            )
        return found


def of_tensor(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and values."""
    digest = _begun(About(tensor.dtype, tuple(tensor.shape)))
    digest.update(bytes_of(tensor))
    return digest.hexdigest()


def of_files(tensors: Tensors) -> Fingerprint:
    """Hash every tensor of a file or folder, a piece at a time, some in parallel."""

    def hashed(name: str) -> str:
        digest = _begun(tensors.about[name])
        for piece in tensors.pieces(name):
            digest.update(piece)  # while other threads run
        return digest.hexdigest()

    names = sorted(tensors.about)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return Fingerprint(dict(zip(names, pool.map(hashed, names), strict=True)))


class Hashing:
    """Tensors of a base, each hashed and compared in the pass that reads it.

    Args:
        source: of the tensors.
        saved: fingerprint of the base to compare with, if there is one.
        without: names of tensors that the file with this fingerprint contains itself.

    Raises:
        InputError: a tensor differs, is missing or is new; names are compared here,
            values when a tensor is read.
    """

    def __init__(
        self,
        source: Tensors,
        saved: Fingerprint | None = None,
        without: Collection[str] = (),
    ):
        self._source, self._without = source, without
        self._saved = saved or Fingerprint({})
        self._hashes: dict[str, str] = {}
        self.about: Mapping[str, About] = source.about
        self.metadata: Mapping[str, str] = source.metadata
        self._expected = {
            counterpart(name, source.about) or name: digest
            for name, digest in self._saved.tensors.items()
        }
        brought = {counterpart(name, source.about) for name in without}
        own = {n for n in source.about if n not in brought or n in self._expected}
        if saved and own != self._expected.keys():
            check(saved, of_files(source), without)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        tensor = self._source.read(name)
        self._keep(name, of_tensor(tensor))
        return tensor

    def pieces(self, name: str, size: int = PIECE) -> Iterator[memoryview]:
        """Yield the bytes of one tensor, a piece at a time."""
        digest = _begun(self.about[name])
        for piece in self._source.pieces(name, size):
            digest.update(piece)
            yield piece
        self._keep(name, digest.hexdigest())

    def _keep(self, name: str, digest: str) -> None:
        self._hashes[name] = digest
        if self._expected.get(name, digest) != digest:
            # Another tensor may come before this one in the order of names.
            check(self._saved, of_files(self._source), self._without)
            raise _changed(name)

    def check_unchanged(self, before: Fingerprint) -> None:
        """Refuse a base if a tensor was read and is not as it was.

        Raises:
            InputError: another program changed the base meanwhile.
        """
        for name, digest in self._hashes.items():
            if before.tensors[name] != digest:
                raise _changed(name)

    def unknown(self) -> Fingerprint:
        """Return a fingerprint as long as that of the base, to be replaced by it."""
        return Fingerprint(dict.fromkeys(sorted(self.about), "0" * 64))

    def fingerprint(self) -> Fingerprint:
        """Return the hash of every tensor; one that was not read is read now."""
        for name in self.about.keys() - self._hashes.keys():
            for _ in self.pieces(name):
                pass
        return Fingerprint({name: self._hashes[name] for name in sorted(self.about)})


def _changed(name: str) -> InputError:
    return InputError(
        f"{name} of the base changed while it was read; do it again when no other "
        "program writes there"
    )


def of_model(model: nn.Module) -> Fingerprint:
    """Hash the tensors of a model's state dict, which are those of its files."""
    state = model.state_dict()
    return Fingerprint({name: of_tensor(state[name]) for name in sorted(state)})


def _begun(about: About) -> "hashlib._Hash":
    return hashlib.sha256(f"{about.dtype} {[*about.shape]}\n".encode())


def check(saved: Fingerprint, own: Fingerprint, without: Collection[str] = ()) -> None:
    """Refuse another base.

    Args:
        saved: fingerprint of the base in the metadata of a file.
        own: fingerprint of the present base.
        without: names of tensors that the file contains itself.

    Raises:
        OtherBaseError: a tensor differs, is missing or is new; the message names the
            first.
    """
    first = difference(saved, own, without)
    if first is not None:
        what = " (its numbers, dtype or shape)" if first.endswith(" differs") else ""
        raise OtherBaseError(f"{first} here{what}")


def difference(
    saved: Fingerprint, own: Fingerprint, without: Collection[str] = ()
) -> str | None:
    """Say which tensor is missing or new first, or else differs; None if none does.

    Checkpoints of transformers 4 and 5 name the same tensors differently.

    Args:
        saved: fingerprint of the base in the metadata of a file.
        own: fingerprint of the present base.
        without: names of tensors that the file contains itself.
    """
    if saved.whole == own.whole:
        return None
    then = {counterpart(n, own.tensors) or n: h for n, h in saved.tensors.items()}
    brought = {counterpart(n, own.tensors) for n in without}
    now = {n: h for n, h in own.tensors.items() if n not in brought or n in then}
    for name in sorted(then.keys() | now.keys()):
        if name not in now:
            return f"{name} is missing"
        if name not in then:
            return f"{name} is new"
    changed = sorted(name for name in then if then[name] != now[name])
    return f"{changed[0]} differs" if changed else None
