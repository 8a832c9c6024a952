"""A deliberate mistake in a kernel, and the checks that must find it."""

from dataclasses import dataclass

CHECKS = ("values", "races", "addresses", "ptx")


@dataclass(frozen=True)
class Mutation:
    """One edit of a kernel's source.

    Args:
        name: the mistake in words.
        old: the text to replace.
        new: what replaces it.
        occurrence: which `old` it is, counted from 1.
        caught_by: the checks that must fail, from `CHECKS`.
    """

    name: str
    old: str
    new: str
    occurrence: int
    caught_by: tuple[str, ...]

    def apply(self, text: str) -> str:
        """Return the source with the mistake."""
        parts = text.split(self.old)
        assert self.occurrence < len(parts), f"{self.name}: {self.old!r} is not there"
        before = self.old.join(parts[: self.occurrence])
        return before + self.new + self.old.join(parts[self.occurrence :])
