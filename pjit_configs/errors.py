"""The error of this package."""


class ConfigError(ValueError):
    """A mesh, rule or preset that cannot be, or that does not fit the arrays or devices at hand.

    One line that names the thing, the value and what was expected. Callers that talk to a person
    turn it into their own kind of user error.
    """
