"""The one exception that means "the input was wrong, and here is what to do"."""

import errno

IN_CLONE = "'.[{}]' in the clone of minipeft"
"""What pip installs for an extra; no package index has minipeft."""


class InputError(ValueError):
    """Bad input: one sentence that names the value and the remedy.

    The command line and the chapters print the sentence and exit with code 2; any
    other exception is a defect and keeps its traceback.
    """


def cannot_write(path: object, error: OSError) -> InputError:
    """Return the error for a path that cannot be written.

    Args:
        path: of the file or folder.
        error: of the system.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space" if full else "choose another place"
    return InputError(f"cannot write {path}: {error.strerror or error}; {remedy}")
