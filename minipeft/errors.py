"""The one exception that means "the input was wrong, and here is what to do"."""


class InputError(ValueError):
    """Bad input: one sentence that names the value and the remedy.

    The command line and the chapters print the sentence and exit with code 2; any
    other exception is a defect and keeps its traceback.
    """
