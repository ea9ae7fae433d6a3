"""Masks for kernels that work on tiles: integers per token, and a fixed list of comparisons.

`lower` turns any mask of `masks.py` into the same few integers for every query and every key, and
a static `Program` that says what to compare:

- a bound hides a key from a query with `query < key`: positions, indices and, twice, segments;
- a level of branches hides it where blocks are equal and paths are not.

`tile_states` compares what all tokens of a tile have in common, and says of each pair of tiles
whether it is hidden, visible or mixed, never wrongly: a pair is mixed where that is not enough to
know. `plan` lists for every tile the tiles that it has to visit: first the visible ones, for which
nothing has to be compared, then the mixed ones. All of it is linear in the number of tokens but
for the list, an int32 for a pair of tiles: 4 MiB at 131072 tokens and tiles of 128.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hackle.layers.attention.masks import (
    All,
    Branches,
    Causal,
    Mask,
    Padding,
    Positions,
    Prefix,
    Segments,
)

HIDDEN, MIXED, VISIBLE = 0, 1, 2
_LEAST, _MOST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


class Program(NamedTuple):
    """What to compare. Of the integers of a token, bounds come first, then blocks, then paths."""

    bounds: int
    depth: int

    @property
    def integers(self) -> int:
        return self.bounds + 2 * self.depth


class TileMask(NamedTuple):
    """Attributes: integers of queries and keys, int32 `[B or 1, program.integers, L or S]`."""

    program: Program
    query: jax.Array
    key: jax.Array


class Plan(NamedTuple):
    """What each tile of one side visits of the other.

    Attributes:
      order: int32 `[B or 1, tiles, other tiles]`; visible ones, mixed ones, then anything.
      counts: int32 `[B or 1, tiles, 2]`; of the visible, and of both. `longest_first` adds a third.
    """

    order: jax.Array
    counts: jax.Array


_KNOWN = (Causal, Positions, Segments, Padding, Branches)


def unsupported(mask: Mask | None) -> str | None:
    """Why there are no integers per token for a mask, or None if there are."""
    match mask:
        case All(parts):
            return next(filter(None, map(unsupported, parts)), None)
        case Prefix(_, rest):
            return unsupported(rest)
        case None:
            return None
    known = isinstance(mask, _KNOWN)
    return None if known else f"no integers per token for a mask of {type(mask).__name__}"


class _Terms(NamedTuple):
    """Parts of a conjunction. Arrays are `[B or 1, L or S]`, of branches `[B or 1, depth, ..]`."""

    causal: tuple[tuple[jax.Array, jax.Array], ...] = ()
    bounds: tuple[tuple[jax.Array, jax.Array], ...] = ()
    absent: tuple[jax.Array, ...] = ()  # bool, keys that nothing sees
    branches: tuple[tuple[jax.Array, jax.Array, jax.Array, jax.Array], ...] = ()

    def __add__(self, other):
        return _Terms(*(a + b for a, b in zip(self, other, strict=True)))


def _terms(mask: Mask | None, queries: int, keys: int, prefix: int = 0) -> _Terms:
    """The parts of `mask`, of which the first `prefix` of all `keys` are seen by every query."""

    def after(x, value):  # keys behind the prefix; `value` is what hides none of the prefix
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((prefix, 0),), constant_values=value)

    match mask:
        case None:
            return _Terms()
        case All(parts):
            return sum((_terms(part, queries, keys, prefix) for part in parts), _Terms())
        case Prefix(length, rest):
            return _terms(rest, queries, keys, prefix + length)
        case Causal():
            index = jnp.arange(queries)[None]
            return _Terms(causal=((index, after(jnp.arange(keys - prefix)[None], _LEAST)),))
        case Positions(query, key):
            return _Terms(bounds=((query, after(key, _LEAST)),))
        case Segments(query, key):
            # Equal: neither smaller nor larger. ~x turns the order around for every int.
            pairs = ((query, after(key, _LEAST)), (~query, after(~key, _LEAST)))
            return _Terms(bounds=pairs)
        case Padding(lengths):
            return _Terms(absent=(after(jnp.arange(keys - prefix) >= lengths[:, None], False),))
        case Branches(query_block, query_path, key_block, key_path):
            # In no path: path 0 on both sides, which is no other path.
            query_path = jnp.where(query_block == 0, 0, query_path)
            key_path = jnp.where(key_block == 0, 0, key_path)
            keyed = (after(key_block, 0), after(key_path, 0))
            return _Terms(branches=((query_block, query_path, *keyed),))
    raise NotImplementedError(unsupported(mask))


def lower(mask: Mask | None, queries: int, keys: int, *, padded: tuple[int, int]) -> TileMask:
    """The integers of `mask` for `queries` and `keys`, for `padded` lengths of both.

    Keys beyond `keys` are hidden; queries beyond `queries` see what the last one sees.

    Raises:
      ValueError: the mask does not describe as many queries and keys.
      NotImplementedError: a mask that is not of `masks.py`.
    """
    if mask is not None:
        mask.check(queries, keys)
    terms = _terms(mask, queries, keys)
    bounds = list(terms.causal)
    absent = list(terms.absent)
    if padded[1] > keys:
        absent.append((jnp.arange(padded[1]) >= keys)[None])
    fill = lambda x, size: jnp.pad(x, ((0, 0), (0, size - x.shape[-1])), mode="edge")
    bounds = [(fill(q, padded[0]), fill(k, padded[1])) for q, k in bounds + list(terms.bounds)]
    levels = [
        tuple(fill(x[:, d], padded[i // 2]) for i, x in enumerate(branch))
        for branch in terms.branches
        for d in range(branch[0].shape[1])
    ]
    if absent or not (bounds or levels):
        hidden = jnp.zeros((1, padded[1]), bool)
        for x in absent:
            hidden = hidden | fill(x, padded[1])
        if terms.causal:  # an index is never the largest integer
            query, key = bounds[0]
            bounds[0] = (query, jnp.where(hidden, _MOST, key))
        else:
            bounds.insert(0, (jnp.zeros((1, padded[0]), jnp.int32), hidden.astype(jnp.int32)))
    program = Program(len(bounds), len(levels))
    of_queries = [q for q, _ in bounds] + [x[0] for x in levels] + [x[1] for x in levels]
    of_keys = [k for _, k in bounds] + [x[2] for x in levels] + [x[3] for x in levels]
    rows = max(x.shape[0] for x in of_queries + of_keys)
    stack = lambda arrays: jnp.stack(
        [jnp.broadcast_to(x, (rows, x.shape[1])).astype(jnp.int32) for x in arrays], axis=1
    )
    return TileMask(program, stack(of_queries), stack(of_keys))


def visible(program: Program, query: Sequence[jax.Array], key: Sequence[jax.Array]) -> jax.Array:
    """Whether queries see keys: bool, from the integers of both, each as wide as the result."""
    parts = [query[i] >= key[i] for i in range(program.bounds)]
    for block in range(program.bounds, program.bounds + program.depth):
        path = block + program.depth
        parts.append((query[block] != key[block]) | (query[path] == key[path]))
    result = parts[0]
    for part in parts[1:]:
        result = result & part
    return result


class _Summary(NamedTuple):
    """What is known of the tokens of each tile: `[B or 1, bounds or depth, tiles]`."""

    least: jax.Array
    most: jax.Array
    # Of the tokens that are in a path, at every level; and whether all of them are.
    first_block: jax.Array
    last_block: jax.Array
    first_path: jax.Array
    last_path: jax.Array
    inside: jax.Array


def _summary(program: Program, integers: jax.Array, size: int) -> _Summary:
    tiles = integers.reshape(*integers.shape[:2], -1, size)
    ends = [program.bounds, program.bounds + program.depth]
    bounds, block, path = (
        tiles[:, : ends[0]],
        tiles[:, ends[0] : ends[1]],
        tiles[:, ends[1] :],
    )
    least = lambda x: jnp.min(x, axis=-1)
    most = lambda x: jnp.max(x, axis=-1)
    of_paths = lambda x, other: jnp.where(block == 0, other, x)
    return _Summary(
        least(bounds),
        most(bounds),
        least(of_paths(block, _MOST)),
        most(of_paths(block, _LEAST)),
        least(of_paths(path, _MOST)),
        most(of_paths(path, _LEAST)),
        jnp.all(block != 0, axis=-1),
    )


def tile_states(mask: TileMask, query_size: int, key_size: int) -> jax.Array:
    """`HIDDEN`, `MIXED` or `VISIBLE` for each pair of tiles: int32 `[B or 1, L / size, S / size]`.

    Lengths of the mask are multiples of the sizes.
    """
    q = _Summary(*(x[..., :, None] for x in _summary(mask.program, mask.query, query_size)))
    k = _Summary(*(x[..., None, :] for x in _summary(mask.program, mask.key, key_size)))
    hidden = jnp.any(q.most < k.least, axis=1)
    seen = jnp.all(q.least >= k.most, axis=1)
    one = (q.first_block == q.last_block) & (k.first_block == k.last_block)
    same = one & (q.first_block == k.first_block) & q.inside & k.inside
    siblings = same & ((q.last_path < k.first_path) | (k.last_path < q.first_path))
    # A tile with no token in a path has its last block before its first.
    apart = (q.last_block < k.first_block) | (k.last_block < q.first_block)
    together = (q.first_path == q.last_path) & (k.first_path == k.last_path)
    together &= q.first_path == k.first_path
    hidden |= jnp.any(siblings, axis=1)
    seen &= jnp.all(apart | together, axis=1)
    return jnp.where(hidden, HIDDEN, jnp.where(seen, VISIBLE, MIXED))


def plan(states: jax.Array) -> Plan:
    """From states `[B or 1, tiles, other tiles]`, what each tile visits."""
    others = states.shape[-1]
    counts = [jnp.sum(states >= least, axis=-1, dtype=jnp.int32) for least in (VISIBLE, MIXED)]
    # Larger states first, each in the order of its tiles.
    rank = (VISIBLE - states) * others + jnp.arange(others, dtype=jnp.int32)
    return Plan(jnp.sort(rank, axis=-1) % others, jnp.stack(counts, axis=-1))


def longest_first(plan: Plan) -> Plan:
    """The plan of the tiles that visit most first; counts are followed by which tile it is.

    Programs that start late are then short, and end with the others.
    """
    tiles = jnp.argsort(-plan.counts[..., 1], axis=-1, stable=True).astype(jnp.int32)[..., None]
    order, counts = (jnp.take_along_axis(x, tiles, axis=1) for x in plan)
    return Plan(order, jnp.concatenate([counts, tiles], axis=-1))
