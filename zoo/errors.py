"""The one error class that means "the person who called us gave a bad input"."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A bad input from a person.

    The message is one line that names the thing, the value and what was expected. Scripts print
    it as ``error: <message>`` and exit with code 2; any other exception is a defect of ours and
    keeps its traceback.
    """


def unknown(kind: str, name: str, known: Iterable[str], also: Iterable[str] = ()) -> UserError:
    """The error about a `name` that is none of `known`: it says the nearest, or all of them.

    Args:
      kind: what it should be a name of.
      also: names that there are besides, too many to list.
    """
    known = list(known)
    lower = {one.lower(): one for one in reversed([*known, *also])}
    near = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(lower[one] for one in near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}; {hint or 'known: ' + ', '.join(known)}")
