"""What a synthetic task is: rows made from counted random words, by split and number."""

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hackle.zoo.errors import UserError

SPLITS = ("train", "validation", "test")

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A map from token rows to an answer at some of their positions.

    Rows are dicts of int32 arrays `[N, T]`: "tokens" in `[0, vocab_size)`, "targets" in
    `[0, classes)`, and "mask", 1 where the target is asked for; elsewhere the target is 0. Row i
    of a split depends on the task, the seed, the split and i alone.

    Attributes:
      length: T.

    Raises:
      UserError: a size that makes no task.
    """

    name: ClassVar[str]
    length: int = 100

    def __post_init__(self):
        require(self, "length", self.length >= 1, "at least 1")

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens that can come."""

    @property
    @abc.abstractmethod
    def classes(self) -> int:
        """Number of answers that there can be."""

    @property
    def words(self) -> int:
        """Random words that one row takes; by default one a token."""
        return self.length

    @abc.abstractmethod
    def make(self, words: np.ndarray) -> Rows:
        """Rows from uint64 `[N, words]`, uniform and independent."""

    def rows(self, split: str, start: int, stop: int, *, seed: int = 0) -> Rows:
        """Rows `[start, stop)` of a split, all made at once.

        Raises:
          UserError: unknown split, a negative seed, or a range that is none.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if seed < 0:
            raise UserError(f"seed={seed}; expected at least 0")
        if not 0 <= start <= stop:
            raise UserError(f"rows [{start}, {stop}); expected 0 <= start <= stop")
        # Philox (Salmon et al. 2011) counts: any row can be drawn without those before it. numpy
        # keeps the raw words of a bit generator from release to release. Four words a count.
        counts = -(-self.words // 4)
        generator = np.random.Philox(key=[seed, SPLITS.index(split)])
        generator.advance(start * counts)
        drawn = generator.random_raw((stop - start) * 4 * counts)
        return self.make(drawn.reshape(stop - start, 4 * counts)[:, : self.words])


class TaskSource:
    """The first `size` rows of a split by number, for `grain.MapDataset.source`.

    Item i is a dict of int32 arrays `[T]`, as in `Task`.
    """

    def __init__(self, task: Task, split: str, size: int, *, seed: int = 0):
        if size < 1:
            raise UserError(f"size={size}; expected at least 1")
        self._task, self._split, self._size, self._seed = task, split, size, seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Rows:
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        rows = self._task.rows(self._split, int(index), int(index) + 1, seed=self._seed)
        return {name: array[0] for name, array in rows.items()}

    def __repr__(self) -> str:
        return f"TaskSource({self._task}, {self._split}, {self._size}, seed={self._seed})"


def rows_of(tokens: np.ndarray, targets: np.ndarray, mask: ArrayLike) -> Rows:
    """The dict of `Task` from arrays that broadcast to `tokens`."""
    mask = np.broadcast_to(mask, tokens.shape)
    arrays = {"tokens": tokens, "targets": np.where(mask, targets, 0), "mask": mask}
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def require(task: Any, name: str, holds: bool, expected: str) -> None:
    """Raises the one-line error about field `name` of a task unless it `holds`."""
    if not holds:
        raise UserError(f"{task.name}: {name}={getattr(task, name)}; expected {expected}")
