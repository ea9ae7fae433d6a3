"""Tasks that ask for tokens that came before."""

import dataclasses
from typing import ClassVar

import numpy as np

from hackle.zoo.tasks.task import Rows, Task, require, rows_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepNth(Task):
    """The n-th token of uniform ones, asked for from position n to the end.

    ParaRNN (arXiv 2510.21450) names the task and does not say where it is asked for.

    Attributes:
      n: which token, from 1.
      symbols: V.
    """

    name: ClassVar[str] = "keep-nth"
    n: int = 5
    symbols: int = 128

    def __post_init__(self):
        super().__post_init__()
        require(self, "n", 1 <= self.n <= self.length, f"1 to length={self.length}")
        require(self, "symbols", self.symbols >= 2, "at least 2")

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def classes(self) -> int:
        return self.symbols

    def make(self, words: np.ndarray) -> Rows:
        tokens = words % self.symbols
        asked = np.arange(self.length) >= self.n - 1
        return rows_of(tokens, tokens[:, self.n - 1 : self.n], asked)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Multi-query associative recall of Zoology (arXiv 2312.04927, section 4 and appendix).

    A row begins with `pairs` keys, each followed by its value. Every key comes once more, at one
    of the even places that follow, and its value is asked for there; all else is token 0. Of the
    g = 1, 2, ... places, place g is drawn with weight g^(a - 1), a = 0.01, as there, so most
    queries come soon. Keys are tokens 1 to V/2 - 1, values V/2 to V - 1.

    Attributes:
      pairs: key-value pairs, ParaRNN's kappa.
      symbols: V.
    """

    name: ClassVar[str] = "recall"
    pairs: int = 2
    symbols: int = 128

    def __post_init__(self):
        super().__post_init__()
        most = min(self.length // 4, self.symbols // 2 - 1)
        require(self, "symbols", self.symbols >= 4, "at least 4")
        require(self, "pairs", 1 <= self.pairs <= most,
                f"1 to {most} with length={self.length} and symbols={self.symbols}")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def classes(self) -> int:
        return self.symbols

    @property
    def _places(self) -> int:
        return (self.length - 2 * self.pairs) // 2

    @property
    def words(self) -> int:
        return 2 * self.pairs + self._places

    def make(self, words: np.ndarray) -> Rows:
        at = [self.pairs, 2 * self.pairs]
        for_keys, for_values, for_places = np.split(words, at, axis=1)
        half = self.symbols // 2
        keys = 1 + distinct(for_keys, half - 1)
        values = half + distinct(for_values, self.symbols - half)
        # The first arrivals of exponential clocks are draws without replacement.
        weights = np.arange(1, self._places + 1) ** (0.01 - 1)
        arrivals = -np.log((for_places + 1.0) / 2.0**64) / weights
        queries = 2 * self.pairs + 2 * np.argsort(arrivals, axis=1)[:, : self.pairs]

        tokens = np.zeros((len(words), self.length), np.int64)
        tokens[:, 0 : 2 * self.pairs : 2] = keys
        tokens[:, 1 : 2 * self.pairs : 2] = values
        np.put_along_axis(tokens, queries, keys, axis=1)
        targets = np.zeros_like(tokens)
        np.put_along_axis(targets, queries, values, axis=1)
        return rows_of(tokens, targets, targets > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hops(Task):
    """k-hop induction heads (arXiv 2402.09268, definition 4.1) on uniform tokens.

    One hop from position i leads to the position after the last earlier occurrence of i's token.
    Asked for everywhere: the token that k hops lead to, or class V where a hop leads nowhere.

    Attributes:
      hops: k.
      symbols: V.
    """

    name: ClassVar[str] = "hops"
    hops: int = 1
    symbols: int = 10

    def __post_init__(self):
        super().__post_init__()
        require(self, "hops", self.hops >= 1, "at least 1")
        require(self, "symbols", self.symbols >= 2, "at least 2")

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def classes(self) -> int:
        return self.symbols + 1

    def make(self, words: np.ndarray) -> Rows:
        tokens = (words % self.symbols).astype(np.int64)
        count = np.arange(len(tokens))
        # Positions count from 1 here, and 0 is nowhere, from where hops lead nowhere.
        hop = np.zeros((len(tokens), self.length + 1), np.int64)
        following = np.zeros((len(tokens), self.symbols), np.int64)
        for time in range(self.length):
            hop[:, time + 1] = following[count, tokens[:, time]]
            following[count, tokens[:, time]] = time + 2
        place = np.broadcast_to(np.arange(self.length + 1), hop.shape)
        for _ in range(self.hops):
            place = np.take_along_axis(hop, place, axis=1)
        found = np.pad(tokens, ((0, 0), (1, 0)), constant_values=self.symbols)
        return rows_of(tokens, np.take_along_axis(found, place[:, 1:], axis=1), True)


def distinct(words: np.ndarray, count: int) -> np.ndarray:
    """Uniform draws without replacement of range(count): int `[N, k]` of words `[N, k]`."""
    drawn = np.empty(words.shape, np.int64)
    for column in range(words.shape[1]):
        # The number among those that are left, counted up past each one taken below it.
        one = (words[:, column] % (count - column)).astype(np.int64)
        for taken in np.sort(drawn[:, :column], axis=1).T:
            one += one >= taken
        drawn[:, column] = one
    return drawn
