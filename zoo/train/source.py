"""Where batches come from: a corpus, in the form that a packing gives it; and a thread that
places them."""

import itertools
import queue
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from hackle.layers.multiverse import Tags, branch_structure
from hackle.zoo.train.corpora import (
    BRANCHES,
    BatchIterator,
    DataState,
    HostBatch,
    has_prompts,
    open_corpus,
)
from hackle.zoo.train.recipe import Recipe


def fields(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Names of the arrays of a batch, each int32, and their axes after `[B, L]`.

    Packed documents are told apart by segment ids. Whole rows ("stream") have none, so that
    attention need not honour any; `loss_mask` says where the padding of the last one is, and
    where there are prompts it leaves them out. Branches have block and path ids at each depth,
    which come last, so that rows and tokens lie on the mesh as in every other array.
    """
    found: dict[str, tuple[int, ...]] = {"tokens": (), "positions": ()}
    if recipe.packing != "stream":
        found["segment_ids"] = ()
    if recipe.packing == "stream" or has_prompts(recipe.corpus):
        found["loss_mask"] = ()
    if recipe.packing == BRANCHES:
        found |= {"block": (recipe.branch_depth,), "path": (recipe.branch_depth,)}
    return found


def whole_rows(batch: HostBatch) -> HostBatch:
    """The batch without segment ids; see `fields`."""
    batch = dict(batch)
    batch["loss_mask"] = (batch.pop("segment_ids") != 0).astype(np.int32)
    return batch


def with_branches(batch: HostBatch, tags: Tags, depth: int) -> HostBatch:
    """The batch with the branches of its documents, which were checked whole before: one that is
    cut by the end of its row keeps the structure that it had."""
    found = branch_structure(
        batch["tokens"], tags, depth=depth, segment_ids=batch["segment_ids"], cut=True
    )
    block, path = (np.ascontiguousarray(np.moveaxis(ids, 1, 2)) for ids in found[:2])
    return {**batch, "positions": found.position, "block": block, "path": path}


class Formed:
    """A batch iterator whose batches pass through `form`."""

    def __init__(self, iterator: BatchIterator, form: Callable[[HostBatch], HostBatch]):
        self._iterator, self._form = iterator, form
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __next__(self) -> HostBatch:
        return self._form(next(self._iterator))


class Source:
    """The data of a run.

    Attributes:
      corpus: where the tokens come from.
      fingerprint: two runs with the same one read the same tokens.
      description: one line for people.
    """

    def __init__(self, recipe: Recipe):
        """Opens the corpus.

        Raises:
          UserError: see `corpora.open_corpus`.
        """
        self._recipe = recipe
        self.corpus = open_corpus(recipe)
        self.fingerprint = self.corpus.fingerprint
        self.description = self.corpus.description

    def train(self) -> BatchIterator:
        """In the order of the seed; at least as many batches as the run has steps."""
        return Formed(self.corpus.train(), self._form)

    def validation(self) -> list[HostBatch]:
        """The batches of every validation: the first ones of the split in stored order."""
        count = self._recipe.eval_batches
        if not count:
            return []
        return [self._form(batch) for batch in itertools.islice(self.corpus.validation(), count)]

    def _form(self, batch: HostBatch) -> HostBatch:
        """What the packing makes of a batch; see `fields`."""
        if self._recipe.packing == "stream":
            return whole_rows(batch)
        if self._recipe.packing == BRANCHES:
            assert self.corpus.tags is not None  # `check_packing`
            return with_branches(batch, self.corpus.tags, self._recipe.branch_depth)
        return batch


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
