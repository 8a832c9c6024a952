"""What an implementation may say instead of an answer."""

from minipeft.errors import InputError

LONGEST = 500  # characters of a message that a report shows


class Unsupported(Exception):  # noqa: N818  # a statement, not an error
    """The implementation does not offer this: the case is skipped, and listed."""


class Refused(Exception):  # noqa: N818  # a statement, not an error
    """The implementation rejects this input: right where the result is `invalid`."""


class Accident(Exception):  # noqa: N818  # a statement, not an error
    """The implementation stumbled (index, key, attribute, arithmetic): always wrong."""


class NoAnswer(Accident):
    """The process ended, was silent, or wrote what is no answer."""


class Late(NoAnswer):
    """No answer came in time."""


class Unavailable(InputError):  # noqa: N818  # a statement, not an error
    """The whole implementation cannot run here: a package or a device is missing."""


def describe(error: BaseException) -> str:
    """Return type and message of somebody's exception, whatever its `__str__` does."""
    name = type(error).__name__
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return f"{name}: {message[:LONGEST]}" if message else name


def printable(text: str) -> str:
    """Return one line that a terminal, JSON and XML can hold: the rest as escapes."""
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST])
    return "".join(shown) + (" ..." if len(text) > LONGEST else "")
