"""Block, path and position of every token of packed rows, computed over the tags alone."""

import itertools
from typing import NamedTuple

import numpy as np

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
from hackle.layers.multiverse.state import BranchState, Layout, check_layout
from hackle.layers.multiverse.tags import Tags


class BranchStructure(NamedTuple):
    """Where tokens are, int32; a pytree, to be passed to models as `branches`.

    Attributes:
      block: `[B, depth, L]` or `[depth, L]`. Number of the block, counted from 1 in each row in the
        order of their first paths, at each depth at which the token is in a path; 0 elsewhere.
      path: like `block`. Which path of the block, from 1; 0 where `block` is 0.
      position: `[B, L]` or `[L]`. Siblings start at one position; what follows a block stands
        behind the longest of its paths.
    """

    block: np.ndarray
    path: np.ndarray
    position: np.ndarray


def branch_structure(
    tokens: np.ndarray,
    tags: Tags = Tags(),  # noqa: B008 - frozen
    *,
    layout: Layout = "strict",
    depth: int | None = None,
    segment_ids: np.ndarray | None = None,
    cut: bool = False,
) -> BranchStructure:
    """Parses rows of tokens into what attention and rotary positions need to know of them.

    With g the position of `</Goal>` and n_i the length of path i, in which a nested block counts
    as long as its longest path (arXiv 2506.09991, section 4):

    - "strict": a path reaches from `<Path>` to the next tag after its `</Path>`, so that text
      between siblings belongs to the one before it. All start behind what stands before the first
      `<Path>`, and the conclusion stands right behind the longest. No path knows of another, and
      no token sees a position larger than its own.
    - "published": a path reaches from `<Path>` to `</Path>`. All start at g + 1, the conclusion
      stands at g + max n_i + 1. Text between siblings is in no path: it sees the one before it,
      and is seen by the one after it.

    A token's structure depends on the tokens before it alone. So a document that was cut, at any
    token, has the structure of the whole document, cut there; `cut` lets documents end within a
    block. They may not start within one.

    Args:
      tokens: int `[L]` or `[B, L]`.
      tags: which tokens are tags.
      layout: see above.
      depth: size of the axis in the result; None takes what the rows need, at least 1.
      segment_ids: int like `tokens`; a document is a run of one id, and positions count from 0 in
        each. Id 0 is padding: in no path, at position 0, its tags are not read. None: each row is
        one document.
      cut: whether a document may end within a block or a think tag.

    Raises:
      BranchError: a document does not follow the grammar of `Tags`, or nests deeper than `depth`
        (6 where that is None); the first one is raised. See `BranchState.feed`.
      ValueError: arrays of a wrong shape or type, an unknown layout, a depth outside 1..6.
    """
    check_layout(layout)
    if depth is not None and not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth must be in 1..{MAX_DEPTH}, got {depth}")
    tokens = np.asarray(tokens)
    if tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens must be integers [L] or [B, L], got {tokens.dtype} {tokens.shape}"
        )
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)
        if segment_ids.shape != tokens.shape:
            raise ValueError(
                f"segment_ids have shape {segment_ids.shape}, but tokens have {tokens.shape}"
            )
        if not np.issubdtype(segment_ids.dtype, np.integer):
            raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")
        segment_ids = np.atleast_2d(segment_ids)
    rows = np.atleast_2d(tokens)
    stream = _Stream(rows, tags, segment_ids)
    if stream.misread(tags, depth or MAX_DEPTH, cut):
        _explain(stream, rows, tokens.ndim, tags, layout, depth or MAX_DEPTH, cut)
    found = _place(stream, rows.shape, layout, depth or max(1, int(stream.after.max(initial=0))))
    if segment_ids is not None:
        found.position[segment_ids == 0] = 0
    return found if tokens.ndim == 2 else BranchStructure(*(array[0] for array in found))


class _Stream:
    """The tags of all rows, laid end to end, with a border before each document and at the end.

    Attributes, one entry a tag or border:
      at: index of the token; for a border, of the first token behind it.
      symbol: as in `grammar.py`.
      before, after: how many paths of its document are open before and after it.
      border: entry of the last border, itself included.
    """

    def __init__(self, rows: np.ndarray, tags: Tags, segment_ids: np.ndarray | None):
        flat = rows.reshape(-1)
        symbols = grammar.symbols_of(tags)
        low, high = min(symbols), max(symbols)
        lookup = np.full(high - low + 1, -1, np.int8)
        lookup[np.fromiter(symbols, int) - low] = list(symbols.values())
        at = np.flatnonzero((flat >= low) & (flat <= high))
        symbol = lookup[flat[at].astype(np.int64) - low]
        borders = np.arange(0, flat.size + 1, max(rows.shape[1], 1))
        keep = symbol >= 0
        if segment_ids is not None:
            ids = segment_ids.reshape(-1)
            borders = np.union1d(borders, np.flatnonzero(ids[1:] != ids[:-1]) + 1)
            keep &= ids[at] != 0
        at, symbol = at[keep], symbol[keep]
        where = np.searchsorted(at, borders)
        self.at = np.insert(at, where, borders)
        self.symbol = np.insert(symbol, where, BORDER)
        entry = np.arange(self.at.size)
        self.border = np.maximum.accumulate(np.where(self.symbol == BORDER, entry, 0))
        step = (self.symbol == PATH).astype(np.int32) - (self.symbol == PATH_END)
        total = np.cumsum(step)
        self.after = total - total[self.border]
        self.before = self.after - step
        self.before[1:][self.symbol[1:] == BORDER] = self.after[:-1][self.symbol[1:] == BORDER]
        self.previous = np.concatenate([[BORDER], self.symbol[:-1]])

    def misread(self, tags: Tags, max_depth: int, cut: bool) -> bool:
        """Whether any document breaks the grammar."""
        symbol, previous = self.symbol, self.previous
        wrong = ~grammar.follows(tags)[previous, symbol]
        wrong |= (symbol == PATH_END) & (self.before < 1)
        wrong |= (symbol == PATH) & (self.after > max_depth)
        thinks = np.cumsum((symbol == THINK).astype(np.int32) - (symbol == THINK_END))
        border_thinks = thinks[self.border]
        open_think = np.concatenate([[0], (thinks - border_thinks)[:-1]])
        wrong |= (symbol == THINK_END) & ((open_think != 1) | (self.before > 0))
        wrong |= (symbol == BORDER) & ((open_think != 0) | (self.before > 0))
        if cut:
            wrong &= symbol != BORDER
        return bool(wrong.any() or self._outlines_differ())

    def _outlines_differ(self) -> bool:
        """Whether a block that has ended has outlines, but not one for each path."""
        entry = np.arange(self.at.size)
        plan = np.isin(self.symbol, (OUTLINE, OUTLINE_END, GOAL_END))
        start = np.maximum.accumulate(np.where(plan, 0, entry))
        outlines = np.cumsum(self.symbol == OUTLINE)
        for level in self.levels():
            count = outlines[level.first - 1] - outlines[start[level.first - 1]]
            ended = self.symbol[level.after[level.last]] != BORDER
            if np.any(ended & (count != 0) & (count != level.ordinal[level.last])):
                return True
        return False

    def levels(self) -> "list[_Level]":
        """The paths at each depth, outermost first."""
        return [_Level(self, d) for d in range(1, int(self.after.max(initial=0)) + 1)]


class _Level:
    """All paths at one depth, in their order.

    Attributes, one entry a path:
      open, close: entries of the stream of `<Path>`, and of `</Path>` or the border that cut it.
      cut: whether that is a border.
      after: entry behind `</Path>`, which says whether a sibling follows; or the border.
      block: index of its block among those of this depth.
      ordinal: which path of its block, from 1.
    Of each block: `first` and `last` are entries of the stream and of the level: where its first
    `<Path>` is, and which path is its last.
    """

    def __init__(self, stream: _Stream, depth: int):
        opens = (stream.symbol == PATH) & (stream.after == depth)
        closes = (stream.symbol == PATH_END) & (stream.before == depth)
        self.open = np.flatnonzero(opens)
        ends = np.flatnonzero(closes | (stream.symbol == BORDER))
        self.close = ends[np.searchsorted(ends, self.open)]
        self.cut = stream.symbol[self.close] == BORDER
        self.after = self.close + ~self.cut
        starts = stream.previous[self.open] != PATH_END
        self.block = np.cumsum(starts) - 1
        first = np.flatnonzero(starts)
        self.first = self.open[first]
        self.ordinal = np.arange(self.open.size) - first[self.block] + 1
        self.last = np.append(first[1:], self.open.size) - 1


def _place(stream: _Stream, shape: tuple[int, int], layout: Layout, depth: int) -> BranchStructure:
    """The structure of a stream that follows the grammar."""
    at, size = stream.at, shape[0] * shape[1]
    block, path = (np.zeros((shape[0], depth, shape[1]), np.int32) for _ in range(2))
    opens_block = (stream.symbol == PATH) & (stream.previous != PATH_END)
    number = np.cumsum(opens_block)
    number -= number[np.searchsorted(at, at - at % max(shape[1], 1))]  # at the border of the row
    # Position = index + shift. The shift changes at tags: `jump` says by how much.
    jump = np.zeros(at.size, np.int64)
    for d, level in reversed([*enumerate(stream.levels())]):
        start, stop = at[level.open], at[level.after]
        if layout == "published":
            stop = np.where(level.cut, stop, at[level.close] + 1)
        bounds = np.concatenate([[0], np.stack([start, stop], 1).ravel(), [size]])
        for ids, values in ((block, number[level.first][level.block]), (path, level.ordinal)):
            runs = np.zeros(bounds.size - 1, np.int32)
            runs[1::2] = values
            ids[:, d] = np.repeat(runs, np.diff(bounds)).reshape(shape)
        # How far the position moves along a path; deeper blocks have set their jumps already.
        jumps = np.cumsum(jump)
        inner = jumps[level.close] - jumps[level.open]
        move = at[level.after] - start + inner
        longest = np.maximum.reduceat(stop - start + inner, level.open.searchsorted(level.first))
        jump[level.after] = -move  # back to the start, for a sibling
        jump[level.after[level.last]] += longest
        if layout == "published":
            first = level.first[stream.previous[level.first] == GOAL_END]
            jump[first] = at[first - 1] + 1 - at[first]
    jump[stream.symbol == BORDER] = 0
    jumps = np.cumsum(jump)
    shift = jumps - jumps[stream.border] - at[stream.border]
    position = np.arange(size) + np.repeat(shift, np.diff(np.append(at, size)))
    return BranchStructure(block, path, position.astype(np.int32).reshape(shape))


def _explain(
    stream: _Stream,
    rows: np.ndarray,
    ndim: int,
    tags: Tags,
    layout: Layout,
    max_depth: int,
    cut: bool,
) -> None:
    """Reads document by document, as decoding does, up to the first error."""
    borders = np.flatnonzero(stream.symbol == BORDER)
    for here, there in itertools.pairwise(borders):
        row = int(stream.at[here]) // rows.shape[1]
        first = row * rows.shape[1]
        reader = BranchState(tags, layout=layout, max_depth=max_depth)
        try:
            for index in stream.at[here + 1 : there] - first:
                reader.feed(rows[row, index])
            index = stream.at[there] - first - 1
            if not cut:
                reader.finish()
        except BranchError as error:
            raise BranchError(error.reason, int(index), row if ndim == 2 else None) from None
    raise AssertionError("the rows break the grammar, but no document does")
