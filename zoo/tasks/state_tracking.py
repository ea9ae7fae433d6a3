"""Tasks that ask for the state of a finite automaton after every token.

The paper's tables grade all positions, it seems: a transformer's 53 % on parity of length 100 is
more than the chance of one answer a row, and what the first few positions add. The state-tracking
literature does too (arXiv 2404.08819).
"""

import abc
import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from hackle.zoo.tasks.task import Rows, Task, require, rows_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateTracking(Task):
    """An automaton that starts in state 0; tokens are uniform unless `tokens` says otherwise."""

    @abc.abstractmethod
    def transitions(self) -> np.ndarray:
        """int `[states, vocab_size]`: the state after, of a state and a token."""

    def answers(self) -> np.ndarray:
        """int `[states]`: what is asked of a state; by default the state itself."""
        return np.arange(len(self.transitions()))

    def tokens(self, words: np.ndarray) -> np.ndarray:
        """int `[N, T]` of random words `[N, T]`."""
        return (words % self.vocab_size).astype(np.int64)

    @property
    def vocab_size(self) -> int:
        return self.transitions().shape[1]

    @property
    def classes(self) -> int:
        return int(self.answers().max()) + 1

    def make(self, words: np.ndarray) -> Rows:
        tokens, table = self.tokens(words), self.transitions()
        states = np.empty_like(tokens)
        state = np.zeros(len(tokens), np.int64)
        for time in range(self.length):
            state = table[state, tokens[:, time]]
            states[:, time] = state
        return rows_of(tokens, self.answers()[states], True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(StateTracking):
    """Is the number of ones so far odd? (arXiv 2207.02098, there of the whole row.)"""

    name: ClassVar[str] = "parity"

    def transitions(self) -> np.ndarray:
        return np.array([[0, 1], [1, 0]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CycleNavigation(StateTracking):
    """The place on a cycle after moves; tokens are stay, forward, back (arXiv 2207.02098).

    Attributes:
      places: of the cycle.
    """

    name: ClassVar[str] = "cycle-navigation"
    places: int = 5

    def __post_init__(self):
        super().__post_init__()
        require(self, "places", self.places >= 2, "at least 2")

    def transitions(self) -> np.ndarray:
        return (np.arange(self.places)[:, None] + np.array([0, 1, -1])) % self.places


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmetic(StateTracking):
    """The value modulo 5 of digits with + - * between them, `*` binding first, without brackets
    (arXiv 2207.02098); asked for after every digit, of the row so far.

    Tokens 0 to 4 are digits; 5, 6, 7 are + - *. Digits stand at even positions. Two numbers are
    the state: the sum s before the open term, and the factor k that the open term has so far;
    state `5 s + k - 1 mod 25`, so that state 0 is s = 0, k = 1.
    """

    name: ClassVar[str] = "modular-arithmetic"

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        state = np.arange(25) + 1
        return state // 5 % 5, state % 5

    def transitions(self) -> np.ndarray:
        s, k = self._parts()
        digits = [(s, k * digit) for digit in range(5)]
        # A digit has closed the factor: k is the open term's value when an operation comes.
        operations = [(s + k, np.ones_like(k)), (s + k, np.full_like(k, -1)), (s, k)]
        after = [(5 * (s % 5) + k % 5 - 1) % 25 for s, k in digits + operations]
        return np.stack(after, axis=1)

    def answers(self) -> np.ndarray:
        s, k = self._parts()
        return (s + k) % 5

    def tokens(self, words: np.ndarray) -> np.ndarray:
        is_digit = np.arange(self.length) % 2 == 0
        return np.where(is_digit, words % 5, 5 + words % 3).astype(np.int64)

    def make(self, words: np.ndarray) -> Rows:
        rows = super().make(words)
        return rows_of(rows["tokens"], rows["targets"], np.arange(self.length) % 2 == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class A5(StateTracking):
    """The product so far of elements of the alternating group A5 (arXiv 2404.08819).

    Tokens and answers number the 60 even permutations of 5 things in the order of
    `permutations`; 0 is the identity. Each token permutes what those before it left.
    """

    name: ClassVar[str] = "a5"

    @staticmethod
    def permutations() -> np.ndarray:
        """int `[60, 5]`: thing i goes to place `permutation[i]`."""
        every = np.array(list(itertools.permutations(range(5))))
        inversions = sum(every[:, i] > every[:, j] for i, j in itertools.combinations(range(5), 2))
        return every[inversions % 2 == 0]

    def transitions(self) -> np.ndarray:
        elements = self.permutations()
        after = elements[:, elements].swapaxes(0, 1)  # [state, token, thing]: token of state's
        number = lambda p: p @ 5 ** np.arange(5)
        order = np.argsort(number(elements))
        return order[np.searchsorted(number(elements)[order], number(after))]
