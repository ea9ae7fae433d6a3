"""The host's side of decoding texts that branch: what a model is asked, and what is made of it."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hackle.layers.multiverse import MAX_DEPTH, BranchError, BranchState, Place, Tags
from hackle.layers.multiverse.grammar import GOAL_END, PATH_END, follows, symbols_of
from hackle.zoo.errors import UserError
from hackle.zoo.generate.draft import Draft, Fork, Written

# Steps of more tokens than this are padded to a multiple of it, smaller ones to a power of two;
# so they are padded by less than this.
PADDING = 32


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a text that branches may use.

    Attributes:
      tokens: new ones, over all paths.
      critical_path: new tokens one after the other; None leaves the model's rotary range.
      depth: blocks within one another, 1..6.
      branches: paths of one block.

    Raises:
      UserError: a value out of range.
    """

    tokens: int
    critical_path: int | None = None
    depth: int = MAX_DEPTH
    branches: int = 20

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "critical_path":
                continue
            if value is None or value < 1:
                raise UserError(f"limit of {field.name} must be >= 1, got {value}")
        if self.depth > MAX_DEPTH:
            raise UserError(f"limit of depth must be <= {MAX_DEPTH}, got {self.depth}")


@dataclasses.dataclass(eq=False)
class Strand:
    """A stream of tokens: the text itself, or a path of a fork.

    Attributes:
      parts: where in the draft its tokens go.
      parent, depth: what it was forked from, and the depth of its path; None and 0 for the text.
      ended: it has written its closing tag, and waits for its siblings.
      waiting: tokens that the cache does not have yet, oldest first.
      children: the paths it has forked into, for which it waits; `separator` stands between them.
    """

    reader: BranchState
    parts: list[Written | Fork]
    key: jax.Array
    parent: "Strand | None" = None
    depth: int = 0
    ended: bool = False
    waiting: list[tuple[int, Place]] = dataclasses.field(default_factory=list)
    children: "list[Strand]" = dataclasses.field(default_factory=list)
    separator: list[int] = dataclasses.field(default_factory=list)


class _Full(Exception):
    """The next token would exceed a limit, `Draft.limit`."""


class Writer:
    """Forks and joins strands as the tokens say that the model chooses for them.

    In turns: `ask` says what the model is to be given, `answer` takes what it chose, until the
    draft is finished. While the model chooses no token of `special`, what it is given next is
    what it chose, at the places that `alone` says before the first answer, and in each turn one
    position further: it may then go on by itself, and `answer` takes one turn after the other.

    Args:
      prompt: token ids; they are the first that `ask` gives.
      range_end: first position that the model cannot take.
      index_end, stops: tokens that end the index of an outline, and the text.
      key: of the samples of the text; those of paths are folded from it.
      The others as in `generate_branches`, whose rules these are.

    Attributes:
      draft: what has been written.
      live: the strands that the model goes on with.
      special: tags and stops.

    Raises:
      UserError: the prompt breaks the grammar.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        tags: Tags,
        limits: Limits,
        range_end: float,
        index_end: frozenset[int],
        stops: frozenset[int],
        key: jax.Array,
    ):
        self.tags, self.limits, self.index_end, self.stops = tags, limits, index_end, stops
        self.special = np.array(sorted({*symbols_of(tags), *stops}), np.int32)
        reader = BranchState(tags, max_depth=limits.depth)
        try:
            waiting = [(int(token), reader.feed(token)) for token in prompt]
        except BranchError as error:
            raise UserError(f"prompt: {error}") from error
        self.draft = Draft([], start=reader.position)
        far = reader.position + (limits.critical_path or math.inf)
        self._end, self._bound = min((range_end, "positions"), (far, "critical_path"))
        self._total = 0
        text = Strand(reader, self.draft.parts, key, waiting=waiting)
        self.live = [text]
        self._keys: tuple[list[Strand], jax.Array] = ([], key)
        self._guard(lambda: self._follow(text, int(prompt[-1])))

    def ask(self) -> tuple[np.ndarray, np.ndarray, jax.Array, np.int32]:
        """What the cache lacks, and where strands go on; the last arguments of `branches._step`."""
        ends = []
        entries: list[tuple[int, Place]] = []
        for strand in self.live:
            entries += strand.waiting
            ends.append(len(entries) - 1)
        places = self._packed([place for _, place in entries])
        tokens = np.zeros((1, places.shape[1]), np.int32)
        tokens[0, : len(entries)] = [token for token, _ in entries]
        rows = np.zeros((2, _width(len(self.live))), np.int32)
        rows[0, : len(ends)] = ends
        rows[1, : len(ends)] = [s.reader.position - self.draft.start for s in self.live]
        if self.live != self._keys[0]:
            keys = [strand.key for strand in self.live]
            padding = [keys[0]] * (rows.shape[1] - len(keys))
            self._keys = [*self.live], jnp.stack([*keys, *padding])
        return np.concatenate([tokens, places]), rows, self._keys[1], np.int32(len(entries))

    def alone(self) -> tuple[np.ndarray, np.int32]:
        """Where each strand's next token is, if it is text, int32 `[1 + 2 depth, R]`; and how many
        tokens of each may be given to the model before a limit is reached."""
        places = self._packed([strand.reader.place for strand in self.live])
        tokens = (self.limits.tokens - self._total) // len(self.live)
        positions = self._end - max(strand.reader.position for strand in self.live)
        return places, np.int32(max(min(tokens, positions) - 1, 0))

    def _packed(self, places: Sequence[Place]) -> np.ndarray:
        """Position, blocks and paths, int32 `[1 + 2 depth, W]`; padding at the end, at -1."""
        depth = self.limits.depth
        packed = np.zeros((1 + 2 * depth, _width(len(places))), np.int32)
        packed[0] = -1
        for at, place in enumerate(places):
            inside = len(place.block)
            packed[0, at] = place.position
            packed[1 : 1 + inside, at] = place.block
            packed[1 + depth : 1 + depth + inside, at] = place.path
        return packed

    def answer(self, tokens: Sequence[int]) -> None:
        """Takes the next token of every live strand, which has what waited; padding behind them
        is left out."""
        self.draft.steps += 1
        for strand in self.live:
            strand.waiting = []
        pairs = [*zip(self.live, tokens, strict=False)]

        def take() -> None:
            for strand, token in pairs:
                self._take(strand, token)

        self._guard(take)
        if self.draft.finish is None:
            self._guard(lambda: self._check_room(max(s.reader.position for s in self.live)))

    def _guard(self, act: Callable[[], object]) -> None:
        """Finishes the draft where `act` cannot go on."""
        try:
            act()
        except _Full as full:
            self.draft.finish, self.draft.limit = "length", full.args[0]
        except BranchError as error:
            self.draft.finish, self.draft.error = "malformed", error.reason

    def _take(self, strand: Strand, token: int) -> None:
        """What the model chose to go on with."""
        chosen, reader = True, strand.reader
        if token in self.stops:
            if strand.parent is None:
                self._write(strand, token, chosen=True)
                reader.finish()
                self.draft.finish = "stop"
                return
            may_end = follows(self.tags)[reader.last, PATH_END]
            if reader.depth != strand.depth or not may_end:
                raise BranchError("the text stops within a block", reader.index)
            chosen, token = False, self.tags.path[0].close
        self._write(strand, token, chosen)
        self._follow(strand, token)

    def _write(self, strand: Strand, token: int, chosen: bool) -> None:
        self._check_room()
        place = strand.reader.feed(token)
        self._check_room(place.position)
        self._total += 1
        strand.parts.append(Written(token, place, chosen))
        strand.waiting.append((token, place))

    def _check_room(self, position: int = 0) -> None:
        """Raises _Full where a limit leaves none for a token at `position`."""
        if self._total >= self.limits.tokens:
            raise _Full("tokens")
        if position >= self._end:
            raise _Full(self._bound)

    def _write_all(self, strand: Strand, tokens: Sequence[int]) -> None:
        """Tokens of the decoder."""
        for token in tokens:
            self._write(strand, token, chosen=False)

    def _follow(self, strand: Strand, token: int) -> None:
        """What the last token of a strand brings about."""
        symbol, reader = symbols_of(self.tags).get(token), strand.reader
        if symbol == GOAL_END and reader.outlines:
            self._fork(strand)
        elif symbol == PATH_END and strand.parent is not None and reader.depth == strand.depth:
            self._write_all(strand, strand.parent.separator)
            strand.ended = True
            self.live.remove(strand)
            if all(child.ended for child in strand.parent.children):
                self._join(strand.parent)

    def _fork(self, strand: Strand) -> None:
        reader, outlines = strand.reader, strand.reader.outlines
        if len(outlines) > self.limits.branches:
            reason = f"{len(outlines)} outlines exceed the limit of {self.limits.branches} branches"
            raise BranchError(reason, reader.index)
        starts = [self._index(number, outline) for number, outline in enumerate(outlines, 1)]
        strand.separator = reader.between
        self._write_all(strand, strand.separator)
        fork = Fork([[] for _ in outlines])
        strand.parts.append(fork)
        strand.children = []
        for number, branch in enumerate(reader.fork(len(outlines))):
            key = strand.key
            for word in starts[number] or [number]:
                key = jax.random.fold_in(key, word)
            child = Strand(branch, fork.paths[number], key, parent=strand, depth=branch.depth)
            tag = self.tags.path[number % len(self.tags.path)].open
            self._write_all(child, [tag, *starts[number]])
            strand.children.append(child)
        first = strand.children[0]
        first.waiting, strand.waiting = strand.waiting + first.waiting, []
        at = self.live.index(strand)
        self.live[at : at + 1] = strand.children

    def _index(self, number: int, outline: list[int]) -> list[int]:
        """The tokens of an outline up to the end of its index."""
        if not self.index_end:
            return []
        for at, token in enumerate(outline):
            if token in self.index_end:
                return outline[: at + 1]
        raise BranchError(f"outline {number} has no index", 0)

    def _join(self, parent: Strand) -> None:
        """Nothing is computed again: what comes now is in no path, and sees all of them."""
        parent.reader.join([child.reader for child in parent.children])
        for child in parent.children:
            parent.waiting += child.waiting
        self.live.append(parent)
        after = self.tags.conclusion
        tag = after[0].open if after else self.tags.parallel[0].close
        self._write(parent, tag, chosen=False)


def _width(count: int) -> int:
    """Few widths, so that few programs are compiled."""
    if count <= PADDING:
        return 1 << (count - 1).bit_length()
    return -(-count // PADDING) * PADDING
