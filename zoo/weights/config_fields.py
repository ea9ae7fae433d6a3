"""Reading a published config.json so that no field goes unseen.

A field is translated, or is on the written list of those that change nothing here, or must have
the one value that the model code means, or it is refused by name. A config that says something
this code does not do is an error and never a model that runs and answers wrongly.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

_MISSING: Any = object()


class Fields:
    """The fields of one config.json, and the problems found in them so far.

    Every method marks its field as seen; `problems()` adds one for each field that nobody asked
    for. Where a `default` is None, a missing field is a problem.

    Args:
      within: stands before the names of fields in messages.
    """

    def __init__(self, fields: Mapping[str, Any], within: str = ""):
        self._fields = dict(fields)
        self._within = within
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self._objects: list[Fields] = []

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value."""
        self._seen.add(key)
        return self._fields.get(key, default)

    def object(self, key: str) -> "Fields | None":
        """The fields of an object, whose problems are among those of this one; None for null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.problem(key, value, "an object")
            return None
        self._objects.append(Fields(value, f"{self._within}{key}."))
        return self._objects[-1]

    def integer(self, key: str, default: int | None) -> int:
        """A positive integer; `default` is that of the published config class."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problem(key, value, "a positive integer")
            return 1 if default is None else default
        return value

    def number(
        self, key: str, default: float | None, low: float, high: float = float("inf")
    ) -> float:
        """A number in [low, high]."""
        value = self.get(key, default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not (numeric and math.isfinite(value) and low <= value <= high):
            bound = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
            self.problem(key, value, f"a number {bound}")
            return low if default is None else default
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, value, "true or false")
            return default
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """A field with no counterpart here: missing, or one of the values the model code means."""
        value = self.get(key, _MISSING)
        if value is not _MISSING and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            self.problem(key, value, " or ".join(_shown(one) for one in allowed))

    def ignore(self, keys: Mapping[str, str]) -> None:
        """Fields that change nothing here; the mapping says why for each."""
        self._seen.update(keys)

    def problem(self, key: str, value: Any, expected: str) -> None:
        """Records that `key` has an unsupported value."""
        self._problems.append(
            f"field {self._within}{key}={_shown(value)} is not supported; expected {expected}"
        )

    def problems(self) -> list[str]:
        """All problems; a field that no method was called for is one."""
        unknown = [key for key in self._fields if key not in self._seen]
        return [
            *self._problems,
            *(problem for inside in self._objects for problem in inside.problems()),
            *(f"unknown field {self._within}{key}={_shown(self._fields[key])}" for key in unknown),
        ]


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
