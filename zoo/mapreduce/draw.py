"""Random choices that hang on their key alone, whatever the machine and the versions."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Draw:
    """The random choices of one problem, by splitmix64 (Steele, Lea, Flood 2014).

    Args:
      key: integers; other keys give independent choices.
    """

    def __init__(self, *key: int):
        self._state = 0
        for word in key:
            self._state = self._word() ^ (word & _MASK)

    def _word(self) -> int:
        self._state = x = (self._state + _GOLDEN) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return x ^ (x >> 31)

    def between(self, least: int, most: int) -> int:
        """A whole number, `least` and `most` among the possible ones."""
        return least + self._word() % (most - least + 1)

    def choose(self, items: Sequence[Item]) -> Item:
        """One of the items, of which there is at least one."""
        return items[self._word() % len(items)]

    def shuffle(self, items: Sequence[Item]) -> list[Item]:
        """The items in another order (Fisher and Yates)."""
        found = list(items)
        for last in range(len(found) - 1, 0, -1):
            other = self._word() % (last + 1)
            found[last], found[other] = found[other], found[last]
        return found
