"""What an implementation may say instead of an answer."""

from minipeft.errors import InputError


class Unsupported(Exception):  # noqa: N818  # a statement, not an error
    """The implementation does not offer this: the case is skipped, and listed."""


class Refused(Exception):  # noqa: N818  # a statement, not an error
    """The implementation rejects this input: right where the result is `invalid`."""


class Accident(Exception):  # noqa: N818  # a statement, not an error
    """The implementation stumbled (index, key, attribute, arithmetic): always wrong."""


class Unavailable(InputError):  # noqa: N818  # a statement, not an error
    """The whole implementation cannot run here: a package or a device is missing."""
