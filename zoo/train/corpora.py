"""What a recipe can name as its corpus: random tokens, text, problems, conversations."""

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import jax
import numpy as np

from hackle.layers.multiverse import Tags
from hackle.zoo.data import PACKINGS, Packing, batches, prepare
from hackle.zoo.data.pipeline import Batches, RowSource, iterate
from hackle.zoo.data.prepared import PYTHON
from hackle.zoo.errors import UserError, unknown
from hackle.zoo.local_path import local_path
from hackle.zoo.mapreduce import SETS, ProblemRows, alphabet, fingerprint, kinds_of
from hackle.zoo.multiverse.conversations import ConversationRows, encode_file, staged_order
from hackle.zoo.train.recipe import Recipe

RANDOM = "random"
BRANCHES = "branches"
HostBatch = dict[str, np.ndarray]
DataState = Any


class BatchIterator(Protocol):
    """Batches of this process, and a place among them that JSON can hold."""

    def __next__(self) -> HostBatch: ...

    def get_state(self) -> DataState: ...

    def set_state(self, state: DataState) -> None: ...


class Corpus(abc.ABC):
    """The tokens of a run, before anything is known of branches.

    Batches have "tokens", "positions" and "segment_ids", each int32 `[B, L]`, and "loss_mask"
    where a corpus has prompts.

    Attributes:
      fingerprint: two runs with the same one read the same tokens.
      description: one line for people.
      tokenizer_file: the tokenizer.json, or None.
      eos_id: the token that ends a text, or None.
      tags: where texts have tags.
    """

    fingerprint: str
    description: str
    tokenizer_file: Path | None = None
    eos_id: int | None = None
    tags: Tags | None = None

    @abc.abstractmethod
    def train(self) -> BatchIterator:
        """Batches in the order of the seed; they do not end before the run does."""

    @abc.abstractmethod
    def validation(self) -> Iterator[HostBatch]:
        """The same batches every time."""


def has_prompts(corpus: str) -> bool:
    """Whether a corpus, by its name in a recipe, holds prompts and what follows them."""
    return corpus in SETS or corpus.endswith(".jsonl")


def check_corpus(recipe: Recipe) -> None:
    """Raises UserError for a corpus or a tokenizer that is not there, without reading either, and
    for a tokenizer that has no use."""
    corpus, names = recipe.corpus, (PYTHON, RANDOM, *SETS)
    local_path(recipe.data_dir, "data_dir")
    if corpus not in names and not local_path(corpus, "corpus").exists():
        if "/" in corpus or "." in corpus:
            raise UserError(f"corpus={corpus!r} does not exist; expected a folder or a file")
        raise unknown("corpus", corpus, names)
    if (tokenizer := recipe.tokenizer) is None:
        return
    if corpus in SETS:
        raise UserError(f"tokenizer={tokenizer!r}: {corpus} has its own; expected none")
    # A trunk without tags makes them from words.
    if corpus == RANDOM and recipe.start_from is None:
        raise UserError(f"tokenizer={tokenizer!r}: {corpus} has no text; expected none")
    if not local_path(tokenizer, "tokenizer").exists():
        raise UserError(f"tokenizer={tokenizer!r} does not exist; expected a tokenizer.json")


def check_packing(recipe: Recipe) -> None:
    """Raises UserError for a packing that is none, or that the corpus does not have."""
    known = ("documents", BRANCHES) if has_prompts(recipe.corpus) else PACKINGS
    if recipe.packing not in known:
        raise UserError(
            f"packing={recipe.packing!r}; expected one of {', '.join(known)} "
            f"with corpus={recipe.corpus!r}"
        )


def open_corpus(recipe: Recipe) -> Corpus:
    """The corpus of a recipe; makes or finds what it needs on disk.

    Raises:
      UserError: there is no such corpus, or it does not fit the recipe.
    """
    kind: type[Any] = (
        Random if recipe.corpus == RANDOM
        else Problems if recipe.corpus in SETS
        else Conversations if recipe.corpus.endswith(".jsonl")
        else Text
    )  # fmt: skip
    if recipe.workers and kind in (Random, Conversations):
        raise UserError(
            f"workers={recipe.workers}: batches of {recipe.corpus} take no time; expected 0"
        )
    return kind(recipe)


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


class Random(Corpus):
    """Random tokens."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self.fingerprint = f"{RANDOM} {recipe.vocab_size}"
        self.description = "data: random tokens"

    def train(self) -> BatchIterator:
        return RandomBatches(self._recipe, 0)

    def validation(self) -> Iterator[HostBatch]:
        source = RandomBatches(self._recipe, 1)
        while True:
            yield next(source)


class Text(Corpus):
    """The standard library, or a folder of text files."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._prepared = prepare(
            recipe.corpus,
            recipe.data_dir,
            vocab_size=recipe.vocab_size,
            tokenizer=recipe.tokenizer,
        )
        self._prepared.require_vocabulary(recipe.vocab_size)
        self.fingerprint = self._prepared.fingerprint
        self.description = self._prepared.describe()
        self.tokenizer_file = self._prepared.folder / "tokenizer.json"
        self.eos_id = self._prepared.eos_id

    def train(self) -> BatchIterator:
        return self._batches("train", seed=self._recipe.seed, workers=self._recipe.workers)

    def validation(self) -> Iterator[HostBatch]:
        return self._batches("validation", shuffle=False, epochs=1, threads=0)

    def _batches(self, split: str, **options: Any) -> Any:
        recipe = self._recipe
        return batches(
            self._prepared,
            split,
            batch=recipe.batch,
            length=recipe.length,
            packing=cast(Packing, recipe.packing),
            **options,
        )


class Problems(Corpus):
    """Generated problems, in Multiverse's form or as their sequential twins."""

    eos_id = alphabet.END_ID
    tags = alphabet.TAG_IDS

    def __init__(self, recipe: Recipe):
        require_vocabulary(recipe, alphabet.VOCAB_SIZE)
        self._recipe, self._kinds = recipe, kinds_of(recipe.corpus)
        depth = max(kind.depth for kind in self._kinds)
        if recipe.packing == BRANCHES and recipe.branch_depth < depth:
            raise UserError(
                f"branch_depth={recipe.branch_depth}; {recipe.corpus} needs at least {depth}"
            )
        folder = local_path(recipe.data_dir, "data_dir")
        self.tokenizer_file = folder / "mapreduce" / "tokenizer.json"
        self.fingerprint = fingerprint(self._kinds, tagged=recipe.packing == BRANCHES)
        form = "Multiverse's form" if recipe.packing == BRANCHES else "sequential form"
        names = ", ".join(kind.name for kind in self._kinds)
        self.description = f"data: generated problems in {form}: {names}"
        try:
            self.tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
            alphabet.write_tokenizer(self.tokenizer_file)
        except OSError as error:
            raise UserError(f"cannot write {self.tokenizer_file}: {error.strerror}") from None

    def train(self) -> BatchIterator:
        return iterate(self._batches("train"), workers=self._recipe.workers)

    def validation(self) -> Iterator[HostBatch]:
        return iterate(self._batches("validation"), threads=0)

    def _batches(self, split: str) -> Batches:
        recipe = self._recipe
        rows = ProblemRows(
            self._kinds,
            split,
            length=recipe.length,
            tagged=recipe.packing == BRANCHES,
            # Validation is the same whatever the order of training.
            seed=recipe.seed if split == "train" else 0,
        )
        return Batches(rows, batch=recipe.batch)


class Conversations(Corpus):
    """Published rows of Multiverse-1K, in stages; see `hackle.zoo.multiverse.conversations`."""

    def __init__(self, recipe: Recipe):
        if recipe.tokenizer is None:
            raise UserError(
                f"corpus={recipe.corpus!r} needs a tokenizer; give the tokenizer.json of the trunk"
            )
        self._recipe = recipe
        found = encode_file(
            recipe.corpus,
            recipe.data_dir,
            recipe.tokenizer,
            tagged=recipe.packing == BRANCHES,
            depth=recipe.branch_depth,
        )
        require_vocabulary(recipe, found.tokenizer.vocab_size)
        both = [*found.tagged, *found.original]
        order = staged_order(len(found.tagged), len(found.original), seed=recipe.seed)
        self._train = ConversationRows([both[i] for i in order], recipe.length)
        self._validation = ConversationRows(found.held_out, recipe.length)
        steps = -(-self._train.count // recipe.batch)
        if recipe.steps != steps:  # so that the last stage and the schedule end together
            raise UserError(
                f"steps={recipe.steps}, but all stages together are {self._train.count} rows of "
                f"{recipe.length}; expected {steps} steps of {recipe.batch}"
            )
        self.fingerprint, self.tags = found.fingerprint, found.tags
        self.tokenizer_file = found.tokenizer.path
        self.eos_id = found.tokenizer.backend.token_to_id("<|im_end|>")
        self.description = (
            f"data: {len(found.tagged):,} conversations, {len(found.held_out):,} held out; "
            f"{self._train.count:,} rows in all stages, {self._train.cut:,} of them end in a cut"
        )

    def train(self) -> BatchIterator:
        return self._batches(self._train, self._train.count)

    def validation(self) -> Iterator[HostBatch]:
        return self._batches(self._validation, self._validation.count)

    def _batches(self, rows: RowSource, count: int) -> Any:
        return iterate(Batches(rows, batch=self._recipe.batch, count=count), threads=1)


def require_vocabulary(recipe: Recipe, needed: int) -> None:
    """Raises UserError when a model of this recipe has no row for a token."""
    if recipe.vocab_size < needed:
        raise UserError(
            f"vocab_size={recipe.vocab_size}; expected at least {needed}, the tokens of "
            f"{recipe.corpus}"
        )
