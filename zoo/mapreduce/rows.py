"""Endless rows of problems, each made from its number alone; what grain reads from."""

from collections.abc import Sequence

import numpy as np

from hackle.zoo.data.packing import Batch
from hackle.zoo.data.pipeline import require_least
from hackle.zoo.data.whole import Document, lay
from hackle.zoo.errors import UserError
from hackle.zoo.mapreduce import sets
from hackle.zoo.mapreduce.alphabet import encode, given
from hackle.zoo.mapreduce.problem import Kind, Problem

# Row r is filled from problems r * SLOTS, r * SLOTS + 1, ...; one that does not fit into what is
# left of it is passed over, and after some of those the rest stays empty. With tags or without, it
# is the tagged text that must fit, so that twins are trained on the same problems.
SLOTS = 4096
PATIENCE = 4


class ProblemRows:
    """Rows of whole problems, without end; a `RowSource` for `Batches`.

    Args:
      kinds: take turns.
      length: tokens in a row.
      tagged: with tags, or the sequential twins.
      seed: other seeds give other problems.

    Raises:
      UserError: rows are too short for a problem.
    """

    def __init__(
        self, kinds: Sequence[Kind], split: str, *, length: int, tagged: bool, seed: int = 0
    ):
        require_least(length=(length, 2))
        self._kinds, self._split = tuple(kinds), split
        self._length, self._tagged, self._seed = length, tagged, seed
        self._fill(0)

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, as `lay` makes it; a negative number gives a row of padding."""
        return lay([self._fill(int(row)) if row >= 0 else [] for row in rows], self._length)

    def _fill(self, row: int) -> list[Document]:
        found: list[Document] = []
        left, passed = self._length, 0
        for slot in range(SLOTS):
            one = sets.problem(self._kinds, self._split, row * SLOTS + slot, seed=self._seed)
            size = len(one.prompt) + len(one.trace)
            if size <= left:
                found.append(document_of(one, self._tagged))
                left -= size
            else:
                passed += 1
            # A first problem is looked for longer.
            if passed >= PATIENCE and (found or passed >= 16 * PATIENCE):
                break
        if not found:
            raise UserError(
                f"length {self._length} is too small for the problems: "
                f"one of them has {size} tokens"
            )
        return found

    def __repr__(self) -> str:
        return f"ProblemRows({self._kinds}, {self._split}, {self._length}, {self._tagged})"


def document_of(problem: Problem, tagged: bool) -> Document:
    """A problem as tokens; with tags, what the decoder writes is not trained."""
    tokens = encode(problem.prompt + (problem.trace if tagged else problem.sequential))
    return Document(tokens, len(problem.prompt), given(tokens) if tagged else None)
