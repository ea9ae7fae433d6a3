"""The error of this package."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A mesh, rule or preset that cannot be, or that does not fit the arrays or devices at hand.

    One line that names the thing, the value and what was expected. Callers that talk to a person
    turn it into their own kind of user error.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error about a `name` that is none of `known`: it says the nearest, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")
