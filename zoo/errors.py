"""The one error class that means "the person who called us gave a bad input"."""


class UserError(ValueError):
    """A bad input from a person.

    The message is one line that names the thing, the value and what was expected. Scripts print
    it as ``error: <message>`` and exit with code 2; any other exception is a defect of ours and
    keeps its traceback.
    """
