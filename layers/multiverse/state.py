"""Reading a branching text one token at a time, and splitting and joining the reader."""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from hackle.layers.multiverse import grammar
from hackle.layers.multiverse.grammar import (
    BORDER,
    GOAL_END,
    MAX_DEPTH,
    OUTLINE,
    OUTLINE_END,
    PATH,
    PATH_END,
    THINK,
    THINK_END,
    BranchError,
)
from hackle.layers.multiverse.tags import Tags

Layout = Literal["strict", "published"]


class Place(NamedTuple):
    """Where a token is: its block and path at each depth, outermost first, and its position."""

    block: tuple[int, ...]
    path: tuple[int, ...]
    position: int


@dataclasses.dataclass
class _Block:
    """A block between its first `<Path>` and the tag after its last `</Path>`."""

    number: int
    start: int  # position of every `<Path>`
    outlines: int
    path: int = 0  # ordinal of the path that is open, or was last
    end: int = 0  # one past the largest position of the paths so far


class BranchState:
    """A reader of one document: `feed` it token by token, and it says where each one is.

    It accepts what `branch_structure` accepts, gives the same places and raises the same errors:
    both read the table of `grammar.py`. What it knows of a token depends on the tokens before it
    alone, so a text that is cut anywhere has the structure of the whole.

    For decoding, `fork` gives one reader for each path of a block, at the end of its goal, and
    `join` makes one of them again, which goes on at the conclusion.

    Attributes:
      position: of the next token, where that is text.
      last: the symbol (`grammar.py`) of the last tag, or of the document's start.
      text: the tokens since that tag.
      between: the tokens between the last two tags.
      outlines: the tokens of each outline of the last goal, so far.
      depth: how many paths are open, those included whose `</Path>` came last.

    Raises:
      ValueError: an unknown layout, or a `max_depth` outside 1..6.
    """

    def __init__(
        self,
        tags: Tags = Tags(),  # noqa: B008 - frozen
        *,
        layout: Layout = "strict",
        max_depth: int = MAX_DEPTH,
    ):
        check_layout(layout)
        if not 1 <= max_depth <= MAX_DEPTH:
            raise ValueError(f"max_depth must be in 1..{MAX_DEPTH}, got {max_depth}")
        self.tags = tags
        self.layout = layout
        self.max_depth = max_depth
        self.index = 0
        self.position = 0
        self.last = BORDER
        self.text: list[int] = []
        self.between: list[int] = []
        self.outlines: list[list[int]] = []
        self._think = False
        self._blocks: list[_Block] = []
        self._numbers = itertools.count(1)  # shared by all forks: no two blocks have one number
        self._tag_position = -1

    @property
    def depth(self) -> int:
        return len(self._blocks)

    @property
    def place(self) -> Place:
        """Of the next token, where that is text."""
        # The published layout leaves what follows `</Path>` outside of all paths of its block.
        outside = self.layout == "published" and self.last == PATH_END
        return self._place(self._blocks[: len(self._blocks) - outside])

    def _place(self, inside: list[_Block]) -> Place:
        return Place(
            tuple(block.number for block in inside),
            tuple(block.path for block in inside),
            self.position,
        )

    def feed(self, token: int) -> Place:
        """Reads one token.

        Raises:
          BranchError: the grammar does not allow this tag here; the reader is as before.
        """
        token = int(token)
        symbol = grammar.symbols_of(self.tags).get(token)
        if symbol is None:
            self.text.append(token)
            place = self.place
        else:
            self._check(symbol)
            self._enter(symbol)
            place = self._place(self._blocks)
        self.index += 1
        self.position += 1
        if symbol is not None:
            self.last = symbol
            self.text, self.between = [], self.text
            self._tag_position = place.position
            if symbol == PATH_END and self.layout == "published":
                block = self._blocks[-1]
                block.end = max(block.end, self.position)
        return place

    def finish(self) -> None:
        """Says that the document ends here.

        Raises:
          BranchError: it ends within a block or a think tag; a text that was cut may.
        """
        self._check(BORDER)

    def fork(self, paths: int) -> "list[BranchState]":
        """One reader for each path of the block whose goal has just ended; they expect `<Path>`.

        Raises:
          BranchError: no path can start here.
        """
        if paths < 1 or self.last == PATH_END:
            raise BranchError(f"cannot fork into {paths} paths here", self.index)
        self._check(PATH)
        block = self._new_block()
        readers = []
        for path in range(paths):
            reader = copy.copy(self)
            mine = dataclasses.replace(block, path=path, end=block.start)
            reader._blocks = [*map(copy.copy, self._blocks), mine]
            reader.text, reader.outlines = [*self.text], [*self.outlines]
            reader.last = PATH_END  # to each, its path follows a sibling
            readers.append(reader)
        return readers

    def join(self, paths: "Sequence[BranchState]") -> None:
        """Takes up where the readers of all `paths` of a fork ended; expects the conclusion.

        Raises:
          BranchError: there is no path, or one has not ended.
        """
        if not paths:
            raise BranchError("there is no path to join", self.index)
        for number, reader in enumerate(paths, 1):
            if reader.last != PATH_END or reader.depth != self.depth + 1:
                raise BranchError(f"path {number} has not ended", reader.index)
            reader._close_path()
        block = copy.copy(paths[-1]._blocks[-1])
        block.path = len(paths)
        block.end = max(reader._blocks[-1].end for reader in paths)
        self._blocks.append(block)
        self.text, self.last = [], PATH_END
        self.index += sum(reader.index - self.index for reader in paths)
        self.position = block.end

    def _check(self, symbol: int) -> None:
        """Raises BranchError where the grammar does not allow `symbol` here."""
        name = grammar.name(self.tags, symbol)
        # Between the end of a path and the next tag, that path no longer counts as open.
        open_paths = self.depth - (self.last == PATH_END)
        reason = None
        allowed = grammar.follows(self.tags)[self.last]
        if symbol == PATH_END and open_paths < 1:
            reason = f"{name} ends a path, but none is open"
        elif not allowed[symbol] or (symbol == BORDER and (open_paths or self._think)):
            expected = [grammar.name(self.tags, s) for s in range(BORDER) if allowed[s]]
            before = "the start" if self.last == BORDER else grammar.name(self.tags, self.last)
            reason = f"{name} cannot follow {before}; expected {' or '.join(expected) or 'text'}"
        elif symbol == THINK_END and (open_paths or not self._think):
            reason = f"{name} " + ("within a path" if open_paths else "ends what did not begin")
        elif symbol == PATH and open_paths >= self.max_depth:
            reason = f"{name} is nested deeper than {self.max_depth}"
        elif symbol != PATH and self.last == PATH_END:
            block = self._blocks[-1]
            if block.outlines and block.outlines != block.path:
                reason = f"the block has {block.outlines} outlines, but {block.path} paths"
        if reason is not None:
            raise BranchError(reason, self.index - (symbol == BORDER))

    def _enter(self, symbol: int) -> None:
        """Opens and closes what a tag opens and closes before it stands somewhere itself."""
        if symbol in (THINK, THINK_END):
            self._think = symbol == THINK
        if self.last == PATH_END:
            self._close_path()
            block = self._blocks[-1]
            if symbol == PATH:
                self.position = block.start
                block.path += 1
            else:
                self.position = block.end
                self._blocks.pop()
        elif symbol == PATH:
            block = self._new_block()
            self.position = block.start
            self._blocks.append(dataclasses.replace(block, path=1))
        if symbol == OUTLINE_END:
            self.outlines.append(self.text)
        elif symbol not in (OUTLINE, GOAL_END):
            self.outlines = []

    def _close_path(self) -> None:
        """Counts what stands behind `</Path>` into its path, where the layout does so."""
        block = self._blocks[-1]
        if self.layout == "strict":
            block.end = max(block.end, self.position)

    def _new_block(self) -> _Block:
        strict = self.layout == "strict" or self.last != GOAL_END
        start = self.position if strict else self._tag_position + 1
        return _Block(next(self._numbers), start, len(self.outlines))


def check_layout(layout: str) -> None:
    """Raises ValueError unless `layout` is one of the two."""
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}; expected one of {get_args(Layout)}")
