"""Documents laid end to end and cut into rows, as plain index arithmetic.

Within an epoch the documents are put in a seeded order and joined; row r is tokens
[r * length, (r + 1) * length) of that joined text, and the rows are then visited in a second
seeded order. So every token of the epoch is in exactly one row, only the last row has padding,
and any row of any epoch can be made on its own. That is why grain's ConcatThenSplit is not used:
it joins and cuts the same way, but as a stream, whose neighbouring rows come from one document
(no second shuffle), whose ranks get unequal numbers of rows, and whose state is a replay.
"""

import threading
from typing import Literal, get_args

import numpy as np

Packing = Literal["documents", "stream"]
PACKINGS: tuple[str, ...] = get_args(Packing)

Batch = dict[str, np.ndarray]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), uint64 to uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seeded_order(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64, that depends on `key` alone.

    Sorting by a counter's hash instead of numpy's generators: those may change their stream with
    a numpy release, and a resumed run must not.
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix((state ^ np.uint64(word & _MASK)) + np.uint64(_GOLDEN))
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return np.argsort(_mix(counter + state), kind="stable")


class Rows:
    """Rows of `length` tokens over all epochs: row i of the endless sequence, for any i.

    Args:
      tokens: [N] all documents one after the other, each with its end-of-text token.
      offsets: [documents + 1] int64, where each document starts, and N.
      length: tokens in a row.
      seed: of the order; None keeps documents and rows in stored order.
      packing: "documents" gives each document in a row its own segment and restarts positions;
        "stream" makes a row one segment, for attention that can't honour segments.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        *,
        length: int,
        seed: int | None,
        packing: Packing = "documents",
    ):
        self._tokens = tokens
        self._offsets = np.asarray(offsets, np.int64)
        self._length = length
        self._seed = seed
        self._packing = packing
        self._total = int(self._offsets[-1])
        self._plans: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        self.per_epoch = -(-self._total // length)

    def document_order(self, epoch: int) -> np.ndarray:
        """[documents] int64, the order in which documents are joined in `epoch`."""
        documents = len(self._offsets) - 1
        if self._seed is None:
            return np.arange(documents)
        return seeded_order(documents, self._seed, epoch, 0)

    def row_order(self, epoch: int) -> np.ndarray:
        """[per_epoch] int64, the order in which the rows of `epoch` are visited."""
        if self._seed is None:
            return np.arange(self.per_epoch)
        return seeded_order(self.per_epoch, self._seed, epoch, 1)

    def take(self, rows: np.ndarray) -> Batch:
        """The batch of these rows; a negative row number gives a row of padding.

        Args:
          rows: [B] int64 places in the endless sequence of rows.

        Returns:
          "tokens", "positions", "segment_ids", each int32 [B, length]. Padding is 0 in all three.
        """
        batch = {
            name: np.zeros((len(rows), self._length), np.int32)
            for name in ("tokens", "positions", "segment_ids")
        }
        epochs = np.where(rows < 0, -1, rows // self.per_epoch)
        for epoch in np.unique(epochs[epochs >= 0]):
            here = np.flatnonzero(epochs == epoch)
            filled = self._take(int(epoch), rows[here] % self.per_epoch)
            for name, values in filled.items():
                batch[name][here] = values
        return batch

    def _take(self, epoch: int, places: np.ndarray) -> Batch:
        starts, shifts, row_order = self._plan(epoch)
        first = row_order[places][:, None] * self._length
        at = first + np.arange(self._length)  # [B, length] places in the joined text
        real = at < self._total
        at = np.minimum(at, self._total - 1)
        document = np.searchsorted(starts, at, side="right") - 1
        tokens = self._tokens[at + shifts[document]]
        if self._packing == "stream":
            positions = np.broadcast_to(np.arange(self._length), at.shape)
            segments = np.ones_like(at)
        else:
            positions = at - np.maximum(starts[document], first)
            segments = document - document[:, :1] + 1
        return {
            "tokens": np.where(real, tokens, 0),
            "positions": np.where(real, positions, 0),
            "segment_ids": np.where(real, segments, 0),
        }

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each document of the epoch starts in the joined text, what to add to get from
        there to its place in `tokens`, and the row order."""
        with self._lock:
            plan = self._plans.get(epoch)
            if plan is None:
                order = self.document_order(epoch)
                lengths = np.diff(self._offsets)[order]
                starts = np.cumsum(lengths) - lengths
                plan = starts, self._offsets[order] - starts, self.row_order(epoch)
                # Threads work on neighbouring batches: two epochs at a time, oldest out first.
                while len(self._plans) > 1:
                    del self._plans[next(iter(self._plans))]
                self._plans[epoch] = plan
        return plan
