"""Integers per token and states of tiles against the dense masks."""

import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers import masks
from hackle.layers.attention import tile_mask
from hackle.layers.attention.tile_mask import HIDDEN, MIXED, VISIBLE
from tests.layers.attention.drawing import KINDS, branch_mask, random_mask, random_masks

SIZES = {"self": (37, 37, 48, 48), "cross": (29, 37, 32, 48)}  # queries, keys, padded
TILE = 8


def check(mask, queries, keys, padded, sizes=(TILE, TILE)):
    """Everything that has to hold of one mask; returns the states."""
    lowered = tile_mask.lower(mask, queries, keys, padded=padded)
    q, k = np.asarray(lowered.query), np.asarray(lowered.key)
    assert q.dtype == k.dtype == np.int32
    assert q.shape[1] == k.shape[1] == lowered.program.integers
    got = tile_mask.visible(
        lowered.program, list(np.moveaxis(q, 1, 0)[..., None]), list(k.swapaxes(0, 1)[:, :, None])
    )
    dense = np.ones((1, queries, keys), bool)
    if mask is not None:
        dense = np.asarray(mask.dense(queries, keys))
    # Queries that are not there are as the last one; keys that are not there are hidden.
    want = np.pad(dense, ((0, 0), (0, padded[0] - queries), (0, 0)), mode="edge")
    want = np.pad(want, ((0, 0), (0, 0), (0, padded[1] - keys)))
    np.testing.assert_array_equal(np.broadcast_to(got, (max(len(got), len(want)), *padded)), want)

    states = np.asarray(tile_mask.tile_states(lowered, *sizes))
    rows, columns = states.shape[1:]
    tiles = want.reshape(len(want), rows, sizes[0], columns, sizes[1])
    some, every = tiles.any((2, 4)), tiles.all((2, 4))
    assert set(np.unique(states)) <= {HIDDEN, MIXED, VISIBLE}
    assert not (some & (states == HIDDEN)).any(), "a visible pair in a hidden tile"
    assert not (~every & (states == VISIBLE)).any(), "a hidden pair in a visible tile"

    order, counts = (np.asarray(x) for x in tile_mask.plan(jnp.asarray(states)))
    for row, tile in np.ndindex(states.shape[:2]):
        seen, both = counts[row, tile]
        listed = order[row, tile]
        np.testing.assert_array_equal(listed[:seen], np.flatnonzero(states[row, tile] == VISIBLE))
        np.testing.assert_array_equal(listed[seen:both], np.flatnonzero(states[row, tile] == MIXED))
        assert (listed >= 0).all() and (listed < states.shape[2]).all()  # read ahead, not visited

    first = tile_mask.longest_first(tile_mask.Plan(jnp.asarray(order), jnp.asarray(counts)))
    assert (np.diff(first.counts[..., 1], axis=1) <= 0).all()
    for row, entry in np.ndindex(states.shape[:2]):
        *visits, tile = np.asarray(first.counts)[row, entry]
        np.testing.assert_array_equal(visits, counts[row, tile])
        np.testing.assert_array_equal(first.order[row, entry], order[row, tile])
    assert (np.sort(first.counts[..., 2], axis=1) == np.arange(rows)).all()
    return states


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_mask(kind, size):
    queries, keys, *padded = SIZES[size]
    for depth in (1, 6) if kind == "branches" else (2,):
        mask = random_mask(np.random.default_rng(0), kind, 2, queries, keys, depth)
        check(mask, queries, keys, tuple(padded))


@pytest.mark.parametrize("seed", range(24))
def test_random_combinations(seed):
    size = SIZES["cross" if seed % 4 == 0 else "self"]
    mask = random_masks(seed, 2, *size[:2], depth=(2, 6)[seed % 2])
    check(mask, *size[:2], size[2:])


@pytest.mark.parametrize(
    "mask",
    [
        None,
        masks.Prefix(5),
        masks.Prefix(3, masks.Prefix(2, masks.Padding(jnp.asarray([4, 0])))),
        masks.Branches(*(jnp.zeros((1, 0, 37), jnp.int32),) * 4),
    ],
    ids=["none", "prefix alone", "prefix of prefix", "no depth"],
)
@pytest.mark.parametrize("padded", [(37, 37), (48, 48)], ids=["exact", "padded"])
def test_special_cases(mask, padded):
    check(mask, 37, 37, padded, sizes=(TILE, TILE) if padded[0] == 48 else (37, 37))


def test_causal_tiles_are_all_known():
    states = check(masks.Causal(), 48, 48, (48, 48))[0]
    row, column = np.indices(states.shape)
    want = np.where(row == column, MIXED, np.where(row > column, VISIBLE, HIDDEN))
    np.testing.assert_array_equal(states, want)


def test_tiles_of_siblings_are_hidden_and_those_of_parents_visible():
    """Two blocks: shared, two paths, shared, each of two tiles. Only the diagonal is mixed."""
    states = check(branch_mask(128, ((0, 16), (1, 16), (2, 16), (0, 16))), 128, 128, (128, 128))[0]
    row, column = np.indices(states.shape)
    place = np.arange(16) // 2 % 4
    block = np.arange(16) // 8
    sibling = (block[row] == block[column]) & (place[row] == 2) & (place[column] == 1)
    want = np.where(row == column, MIXED, np.where(row > column, VISIBLE, HIDDEN))
    np.testing.assert_array_equal(states, np.where(sibling, HIDDEN, want))


def test_packed_segments_hide_each_other():
    ids = jnp.asarray(np.repeat([[3, -1]], 24, axis=1))
    states = check(masks.Segments(ids, ids), 48, 48, (48, 48))[0]
    same = np.arange(6)[:, None] // 3 == np.arange(6) // 3
    np.testing.assert_array_equal(states, np.where(same, VISIBLE, HIDDEN))


def test_other_masks_and_other_sizes_are_refused():
    class Own(masks.Mask):
        pass

    with pytest.raises(NotImplementedError, match="mask of Own"):
        tile_mask.lower(Own(), 4, 4, padded=(4, 4))
    for kind in KINDS:
        mask = random_mask(np.random.default_rng(0), kind, 1, 9, 9, 1)
        assert tile_mask.unsupported(mask) is None
        assert "mask of Own" in tile_mask.unsupported(masks.Prefix(2, mask & Own()))
    with pytest.raises(ValueError, match="as many queries as keys"):
        tile_mask.lower(masks.Causal(), 4, 5, padded=(8, 8))
