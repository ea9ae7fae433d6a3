"""The grain pipeline: packed batches with exact state, the same on any number of processes."""

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hackle.zoo.data.packing import PACKINGS, Batch, Packing, Rows
from hackle.zoo.data.prepared import Prepared
from hackle.zoo.errors import UserError

if TYPE_CHECKING:
    import grain

# A few batches ahead is enough for a source that is faster than any model.
BUFFER = 4


class RowSource(Protocol):
    """The rows of a run by number; any of them can be made without the others. Picklable."""

    def take(self, rows: np.ndarray) -> Batch:
        """Arrays int32 [B, ...] of these rows; a negative number gives a row of padding."""
        ...


class StoredRows:
    """Packed rows of a prepared split; see `packing.Rows`."""

    def __init__(
        self, prepared: Prepared, split: str, *, length: int, seed: int | None, packing: Packing
    ):
        self._prepared = prepared
        self._split = split
        self._length = length
        self._seed = seed
        self._packing: Packing = packing

    @cached_property
    def _rows(self) -> Rows:
        return Rows(
            self._prepared.tokens(self._split),
            self._prepared.offsets(self._split),
            length=self._length,
            seed=self._seed,
            packing=self._packing,
        )

    @property
    def per_epoch(self) -> int:
        return self._rows.per_epoch

    def take(self, rows: np.ndarray) -> Batch:
        return self._rows.take(rows)

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files themselves instead of being sent their content.
        return {name: value for name, value in self.__dict__.items() if name != "_rows"}

    def __repr__(self) -> str:
        return f"StoredRows({self._prepared.folder.name}, {self._split})"


class Batches:
    """Random access to this process's part of every batch; what grain reads from.

    Batch b holds rows [b * batch, (b + 1) * batch) of the run, whatever the number of processes;
    each takes its equal share of them. So a run continues with the same data on more or fewer
    processes, and no rank runs dry before another.

    Args:
      rows: of the run.
      batch: rows of the whole batch, over all processes.
      count: rows in the run; None never ends.
      process_index, process_count: which share to give. Left out, jax is asked when
        `jax.distributed` is running, and it is 0 of 1 otherwise.

    Raises:
      UserError: a batch that does not divide, or processes that can't be.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        batch: int,
        count: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        if process_index is None or process_count is None:
            if (process_index is None) != (process_count is None):
                raise UserError("give process_index and process_count together or neither")
            process_index, process_count = _process()
        require_least(batch=(batch, 1), process_count=(process_count, 1))
        if not 0 <= process_index < process_count:
            raise UserError(
                f"process_index {process_index} is not one of {process_count} processes"
            )
        if batch % process_count:
            raise UserError(f"batch {batch} does not divide among {process_count} processes")
        self._rows = rows
        self._batch = batch
        self._count = count
        self._local = batch // process_count
        self._first = process_index * self._local

    def __len__(self) -> int:
        if self._count is None:
            return sys.maxsize
        return -(-self._count // self._batch)

    def __getitem__(self, index: int) -> Batch:
        first = int(index) * self._batch + self._first
        rows = np.arange(first, first + self._local, dtype=np.int64)
        if self._count is not None:
            rows[rows >= self._count] = -1
        return self._rows.take(rows)

    def __repr__(self) -> str:
        return f"Batches({self._rows!r})"


def batches(
    prepared: Prepared,
    split: str,
    *,
    batch: int,
    length: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    packing: Packing = "documents",
    process_index: int | None = None,
    process_count: int | None = None,
    threads: int = 1,
    workers: int = 0,
    buffer: int = BUFFER,
) -> "grain.DatasetIterator":
    """An iterator over packed batches.

    It yields dicts of int32 arrays [batch / process_count, length]: "tokens"; "positions", which
    restart with every document; "segment_ids", from 1 in each row, 0 for padding. Only the last
    row of an epoch is padded, and the end of a finite run to a whole batch; no token is dropped
    and none comes twice in an epoch. `get_state()` and `set_state()` are exact and cheap, and
    orbax takes the iterator as a checkpointable. The state is a place; it means the same batches
    only with the same `prepared.fingerprint`, batch, length, seed and packing.

    Args:
      batch: rows of the whole batch, over all processes.
      seed: decides the order of documents and of rows, anew in each epoch. The same everywhere.
      shuffle: False keeps the stored order.
      epochs: None never ends.
      packing: see `hackle.zoo.data.packing.Rows`.
      process_index, process_count: which share to yield. Left out, jax is asked when
        `jax.distributed` is running, and it is 0 of 1 otherwise.
      threads: that make batches ahead; 0 makes each when it is asked for.
      workers: processes that make batches ahead, instead. They start slowly (every one imports
        anew) and are not needed for speed.
      buffer: batches made ahead by each.

    Raises:
      UserError: a size that can't be, an unknown split or packing, a batch that does not divide.
    """
    source = batch_source(
        prepared,
        split,
        batch=batch,
        length=length,
        seed=seed,
        shuffle=shuffle,
        epochs=epochs,
        packing=packing,
        process_index=process_index,
        process_count=process_count,
    )
    return iterate(source, threads=threads, workers=workers, buffer=buffer)


def iterate(
    source: Batches, *, threads: int = 1, workers: int = 0, buffer: int = BUFFER
) -> "grain.DatasetIterator":
    """An iterator over the batches of a source; see `batches`."""
    import grain  # brings jax with it, so not at the top

    dataset = grain.MapDataset.source(source).to_iter_dataset(
        grain.ReadOptions(
            num_threads=0 if workers else threads,
            prefetch_buffer_size=0 if workers or not threads else buffer,
        )
    )
    if workers:
        _mark_flags_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=buffer
        )
        dataset = dataset.mp_prefetch(options)
    return iter(dataset)


def batch_source(
    prepared: Prepared,
    split: str,
    *,
    batch: int,
    length: int,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    packing: Packing = "documents",
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """The batches of `batches` by number: `len()` and `[b]`; for counting and for tests."""
    require_least(length=(length, 2), epochs=(1 if epochs is None else epochs, 1))
    if packing not in PACKINGS:
        raise UserError(f"unknown packing {packing!r}; expected one of {', '.join(PACKINGS)}")
    if not prepared.splits or prepared.offsets(split)[-1] == 0:
        raise UserError(f"split {split!r} of {prepared.folder} holds no tokens")
    rows = StoredRows(
        prepared, split, length=length, seed=seed if shuffle else None, packing=packing
    )
    return Batches(
        rows,
        batch=batch,
        count=None if epochs is None else epochs * rows.per_epoch,
        process_index=process_index,
        process_count=process_count,
    )


def require_least(**sizes: tuple[int, int]) -> None:
    """Raises UserError for the first of `name=(value, least)` that is too small."""
    for name, (value, least) in sizes.items():
        if value < least:
            raise UserError(f"{name} {value} is too small; expected at least {least}")


def _process() -> tuple[int, int]:
    """This process among all: asks jax only if it already runs on several."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1


def _mark_flags_parsed() -> None:
    """grain's workers read absl flags, which a program without absl's main never parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
