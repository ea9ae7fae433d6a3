"""Where batches come from: a prepared corpus, or random tokens; and a thread that places them."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import jax
import numpy as np

from hackle.zoo.data import PACKINGS, Packing, Prepared, batches, prepare
from hackle.zoo.errors import UserError
from hackle.zoo.train.recipe import Recipe

RANDOM = "random"
HostBatch = dict[str, np.ndarray]
DataState = Any


class BatchIterator(Protocol):
    """Batches of this process, and a place among them that JSON can hold."""

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> DataState: ...

    def set_state(self, state: DataState) -> None: ...


def fields(packing: str) -> tuple[str, ...]:
    """Names of the arrays of a batch, each int32 `[B, L]`.

    Packed documents are told apart by segment ids. Whole rows ("stream") have none, so that
    attention need not honour any; `loss_mask` says where the padding of the last one is.
    """
    return ("tokens", "positions", "segment_ids" if packing == "documents" else "loss_mask")


class WholeRows:
    """A batch iterator of whole rows; see `fields`."""

    def __init__(self, packed: BatchIterator):
        self._packed = packed
        self.get_state, self.set_state = packed.get_state, packed.set_state

    def __next__(self) -> HostBatch:
        return whole_rows(next(self._packed))


def whole_rows(batch: HostBatch) -> HostBatch:
    """The batch without segment ids; see `fields`."""
    batch = dict(batch)
    batch["loss_mask"] = (batch.pop("segment_ids") != 0).astype(np.int32)
    return batch


class RandomBatches:
    """Uniform random tokens in whole rows, from the seed and the number of the batch alone."""

    def __init__(self, recipe: Recipe, salt: int):
        self._recipe, self._salt, self._index = recipe, salt, 0

    def __next__(self) -> HostBatch:
        recipe = self._recipe
        rows = recipe.batch // jax.process_count()
        key = np.random.SeedSequence([recipe.seed, self._salt, self._index, jax.process_index()])
        shape = (rows, recipe.length)
        tokens = np.random.default_rng(key).integers(0, recipe.vocab_size, shape, dtype=np.int32)
        positions = np.broadcast_to(np.arange(recipe.length, dtype=np.int32), shape).copy()
        self._index += 1
        return {
            "tokens": tokens,
            "positions": positions,
            "segment_ids": np.ones(shape, np.int32),
        }

    def get_state(self) -> DataState:
        return {"next": self._index}

    def set_state(self, state: DataState) -> None:
        self._index = int(state["next"])


class Source:
    """The data of a run.

    Attributes:
      prepared: the corpus on disk; None for random tokens.
      fingerprint: two runs with the same one read the same tokens.
      description: one line for people.
    """

    def __init__(self, recipe: Recipe):
        """Prepares the corpus, or finds it.

        Raises:
          UserError: see `hackle.zoo.data.prepare`.
        """
        self._recipe = recipe
        self.prepared: Prepared | None = None
        if recipe.corpus == RANDOM:
            self.fingerprint = f"{RANDOM} {recipe.vocab_size}"
            self.description = "data: random tokens"
            return
        self.prepared = prepare(
            recipe.corpus,
            Path(recipe.data_dir).expanduser(),
            vocab_size=recipe.vocab_size,
            tokenizer=recipe.tokenizer,
        )
        self.prepared.require_vocabulary(recipe.vocab_size)
        self.fingerprint = self.prepared.fingerprint
        self.description = self.prepared.describe()

    def train(self) -> BatchIterator:
        """Endless, in the order of the seed."""
        packed = self._packed()
        return packed if self._recipe.packing == "documents" else WholeRows(packed)

    def _packed(self) -> BatchIterator:
        recipe = self._recipe
        if self.prepared is None:
            return RandomBatches(recipe, 0)
        return batches(
            self.prepared,
            "train",
            batch=recipe.batch,
            length=recipe.length,
            seed=recipe.seed,
            packing=cast(Packing, recipe.packing),
        )

    def validation(self) -> list[HostBatch]:
        """The batches of every validation: the first ones of the split in stored order."""
        recipe = self._recipe
        if not recipe.eval_batches:
            return []
        found: Iterator[HostBatch]
        if self.prepared is None:
            random = RandomBatches(recipe, 1)
            found = (next(random) for _ in range(recipe.eval_batches))
        else:
            found = self._stored_validation()
        first = (batch for batch, _ in zip(found, range(recipe.eval_batches), strict=False))
        return list(first if recipe.packing == "documents" else map(whole_rows, first))

    def _stored_validation(self) -> Iterator[HostBatch]:
        recipe = self._recipe
        assert self.prepared is not None
        return batches(
            self.prepared,
            "validation",
            batch=recipe.batch,
            length=recipe.length,
            shuffle=False,
            epochs=1,
            packing=cast(Packing, recipe.packing),
            threads=0,
        )


def check_packing(recipe: Recipe) -> None:
    """Raises UserError for a packing that `hackle.zoo.data` does not know."""
    if recipe.packing not in PACKINGS:
        raise UserError(f"packing={recipe.packing!r}; expected one of {', '.join(PACKINGS)}")


def place(batch: HostBatch, sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Global arrays of which this process holds its rows."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


class Prefetch:
    """A thread that keeps placed batches ready, each with the data state that follows it.

    The state of the iterator itself runs ahead; the state to save is that of the last batch
    taken.

    Args:
      ahead: placed batches that may wait.
    """

    def __init__(
        self,
        iterator: BatchIterator,
        put: Callable[[HostBatch], dict[str, jax.Array]],
        ahead: int = 2,
    ):
        self._queue: queue.Queue = queue.Queue(ahead)
        self._stop = threading.Event()
        self.state: DataState = iterator.get_state()
        self.waited = 0.0
        """Seconds that `next` has blocked so far."""
        self._thread = threading.Thread(
            target=self._fill, args=(iterator, put), name="prefetch", daemon=True
        )
        self._thread.start()

    def _fill(self, iterator: BatchIterator, put: Callable) -> None:
        try:
            while not self._stop.is_set():
                batch = next(iterator)
                self._offer((put(batch), iterator.get_state(), None))
        except BaseException as error:
            self._offer((None, None, error))

    def _offer(self, item: tuple) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __next__(self) -> dict[str, jax.Array]:
        start = time.perf_counter()
        batch, state, error = self._queue.get()
        self.waited += time.perf_counter() - start
        if error is not None:
            raise error
        self.state = state
        return batch

    def close(self) -> None:
        """Stops the thread; batches made ahead are dropped."""
        self._stop.set()
        self._thread.join(timeout=10)
