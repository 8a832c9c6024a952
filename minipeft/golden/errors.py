"""The errors of an implementation that gives no answer."""

from minipeft.errors import InputError

LONGEST = 500  # characters of a message that a report shows
OTHER_CALL = "takes other arguments"
"""How the detail of a case starts whose function has not the table's signature."""


class Unsupported(Exception):  # noqa: N818  # a statement, not an error
    """The implementation lacks this function: the case is skipped, and listed."""


class Refused(Exception):  # noqa: N818  # a statement, not an error
    """The implementation refuses this input; correct if the result is `invalid`."""


class Accident(Exception):  # noqa: N818  # a statement, not an error
    """An accidental error (index, key, attribute, arithmetic); always a failure."""


class NoAnswer(Accident):
    """The process ended, was silent, or wrote something that is no answer."""


class Late(NoAnswer):
    """No answer came in time."""


class Unavailable(InputError):  # noqa: N818  # a statement, not an error
    """The whole implementation cannot run here: a package or a device is missing."""


def describe(error: BaseException) -> str:
    """Return type and message of any exception, even if its `__str__` fails."""
    name = type(error).__name__
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return f"{name}: {message[:LONGEST]}" if message else name


def printable(text: str) -> str:
    """Return one line for a terminal, JSON and XML; other characters are escaped."""
    shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST])
    return "".join(shown) + (" ..." if len(text) > LONGEST else "")
