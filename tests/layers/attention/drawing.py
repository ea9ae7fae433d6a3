"""Random masks with the structure that real ones have: runs of tokens, nested paths, padding."""

import functools
import operator

import jax.numpy as jnp
import numpy as np

from hackle.layers import masks

KINDS = ("causal", "padding", "segments", "positions", "branches", "prefix")


def runs(rng, shape, high, longest):
    """Int32 ids `0..high - 1`, constant over runs of up to `longest` tokens of the last axis."""
    flat = np.empty((int(np.prod(shape[:-1])), shape[-1]), np.int32)
    for row in flat:
        at = 0
        while at < len(row):
            stop = at + int(rng.integers(1, longest + 1))
            row[at:stop] = rng.integers(0, high)
            at = stop
    return jnp.asarray(flat.reshape(shape))


def random_mask(rng, kind, batch, queries, keys, depth):
    """A mask of one kind. Where queries and keys are as many, both have the same ids."""

    def both(make):
        one = make(queries)
        return one, one if queries == keys else make(keys)

    match kind:
        case "causal":
            if queries != keys:
                return masks.Positions(*both(lambda n: jnp.arange(n)[None].repeat(batch, 0)))
            return masks.Causal()
        case "padding":
            return masks.Padding(jnp.asarray(rng.integers(0, keys + 1, batch), jnp.int32))
        case "segments":
            return masks.Segments(*both(lambda n: jnp.sort(runs(rng, (batch, n), 4, 20) - 1)))
        case "positions":
            return masks.Positions(*both(lambda n: runs(rng, (batch, n), 9, 9) - 4))
        case "branches":
            block = both(lambda n: runs(rng, (batch, depth, n), 3, 30))
            path = both(lambda n: runs(rng, (batch, depth, n), 3, 16))
            return masks.Branches(block[0], path[0], block[1], path[1])
        case "prefix":
            length = int(rng.integers(0, keys // 2))
            inner = [k for k in KINDS if k not in ("prefix", "causal")]
            rest = random_mask(rng, rng.choice(inner), batch, queries, keys - length, depth)
            return masks.Prefix(length, rest)
    raise AssertionError(kind)


def random_masks(seed, batch, queries, keys, depth):
    """One to four kinds, joined."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(KINDS, int(rng.integers(1, 5)), replace=False)
    parts = [random_mask(rng, kind, batch, queries, keys, depth) for kind in kinds]
    return functools.reduce(operator.and_, parts)


def branch_mask(length, unit):
    """Causal rows of blocks `unit`: (path, tokens) pairs, path 0 for what all paths see."""
    path = np.concatenate([np.full(n, p) for p, n in unit])
    times = -(-length // len(path))
    block = (np.arange(times)[:, None] + 1) * (path > 0)[None]
    block, path = block.reshape(-1)[:length], np.tile(path, times)[:length]
    block, path = (jnp.asarray(x, jnp.int32)[None, None] for x in (block, path))
    return masks.Causal() & masks.Branches(block, path, block, path)
