"""The one exception that means "the input was wrong, and here is what to do"."""

import errno

IN_CLONE = "'.[{}]' in the clone of minipeft"
"""What pip installs for an extra; no package index has minipeft."""


class InputError(ValueError):
    """Bad input: one sentence that names the value and the remedy.

    The command line and the chapters print the sentence and exit with code 2; any
    other exception is a defect and keeps its traceback.
    """


class OtherBaseError(InputError):
    """An adapter was made for another base.

    Args:
        found: what is other here.
        anyway: how the caller goes on all the same; the command line has its own way.

    Attributes:
        found: as given.
        sentence: without that way.
    """

    def __init__(self, found: str, anyway: str = "") -> None:
        self.found = found
        self.sentence = (
            f"the adapter was made for another base: {found}; load the base it was "
            "made for"
        )
        super().__init__(f"{self.sentence}, or {anyway}" if anyway else self.sentence)


def cannot_write(path: object, error: OSError) -> InputError:
    """Return the error for a path that cannot be written.

    Args:
        path: of the file or folder.
        error: of the system.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space" if full else "choose another place"
    return InputError(f"cannot write {path}: {error.strerror or error}; {remedy}")
