"""Multiple shooting: segments of time run at once, each step by step from a guessed entry state.

A pass runs all segments, exactly, and gives their end states and the Jacobian of each end with
respect to its entry. Newton's method then acts on the entries alone: a recurrence over segments,
`e_(s+1) = end_s + P_s (e_s - old e_s)`. Passes go on until every entry is the end before it, so
nothing is left to a number of iterations; one that forgets its past needs two (classic multiple
shooting; ParaRNN, arXiv 2510.21450, has one step a segment).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hackle.layers.recurrent import affine, newton
from hackle.layers.recurrent.cells import Arrays, Block, Cell, compose, identity
from hackle.layers.recurrent.newton import Progress

# Largest difference between an entry and the end before it, of states whose size is about 1.
TOLERANCE = 1e-6
# Steps of a segment: fewer make more passes, more run longer one after the other.
STEPS = 64
# Steps before a segment, run from zero, whose end is the first guess of its entry.
_BURN_IN = 16

adjoint = newton.adjoint


class Pass(NamedTuple):
    """What running all segments once gives; S segments.

    Attributes:
      states: of all times, in the caller's layout.
      ends, entries: states after and before each segment, arrays `[S, B, D]`.
      products: d(end) / d(entry), a block of arrays `[S, B, D]`.
      progress: iterations of this pass and those before it, and whether what ran the segments of
        this one converged.
    """

    states: Arrays
    ends: Arrays
    entries: Arrays
    products: Block
    progress: Progress


def solve(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    *,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> tuple[Arrays, Arrays, Progress]:
    """As `scan.solve`, and how many passes it took.

    Args:
      tolerance: of the difference between an entry and the end before it; None is `TOLERANCE`.
      max_iterations: bound of the passes. None is the number of segments, after which every
        entry is exact, by causality.
    """
    passed = _solve(cell, u, weights, initial, reset, tolerance, max_iterations)
    return passed.states, tuple(x[-1] for x in passed.ends), passed.progress


def march(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    *,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> tuple[Arrays, Arrays, Block, Progress]:
    """As `scan.march`, and how many passes it took."""
    passed = _solve(cell, u, weights, initial, reset, tolerance, max_iterations)
    final = tuple(x[-1] for x in passed.ends)
    return passed.states, final, affine.product(passed.products, 0), passed.progress


def _solve(cell: Cell, u, weights, initial: Arrays, reset, tolerance, max_iterations) -> Pass:
    """As `shoot`, with states `[B, T, D]`."""
    batch, time, _, width = u.shape
    count = max(1, time // STEPS)
    length = -(-time // count)
    count = -(-time // length)
    tolerance = TOLERANCE if tolerance is None else tolerance
    dtype = initial[0].dtype

    def cut(x: jax.Array) -> jax.Array:
        """`[B, T, ...]` to `[length, segments, B, ...]`; what is over is the end of the last."""
        x = jnp.pad(x, ((0, 0), (0, count * length - time), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, count, length, *x.shape[2:]), (2, 1, 0), (0, 1, 2))

    rows = cut(u)
    keep = None if reset is None else ~cut(reset)[..., None]
    inside = (jnp.arange(count) * length + jnp.arange(length)[:, None] < time)[..., None, None]
    lines = tuple(weights.astype(dtype))

    def march(entries: Arrays, first: int = 0) -> Pass:
        """Runs every segment from its step `first` on."""

        def step(carry, x):
            old, before = carry
            row, keep, inside = x
            held = old, before
            if keep is not None:
                old, before = jax.tree.map(lambda a: jnp.where(keep, a, 0), (old, before))
            state, jacobian = cell.linearize(
                old, tuple(jnp.moveaxis(row, -2, 0).astype(dtype)), lines
            )
            new = state, compose(jacobian, before)
            new = jax.tree.map(lambda a, b: jnp.where(inside, a, b), new, held)
            return new, tuple(x.astype(u.dtype) for x in new[0])

        xs = jax.tree.map(lambda x: x[first:], (rows, keep, inside))
        (ends, products), states = lax.scan(step, (entries, identity(entries)), xs)
        return Pass(states, ends, entries, products, Progress(jnp.int32(1), jnp.array(True)))

    zeros = tuple(jnp.broadcast_to(jnp.zeros_like(x), (count, *x.shape)) for x in initial)
    ends = march(zeros, max(0, length - _BURN_IN)).ends
    passed = march(affine.shifted(initial, ends, 0))
    passed = shoot(passed, march, initial, tolerance=tolerance, max_passes=max_iterations)
    flat = tuple(
        jnp.moveaxis(x, (2, 1, 0), (0, 1, 2)).reshape(batch, -1, width) for x in passed.states
    )
    return passed._replace(states=tuple(x[:, :time] for x in flat))


def shoot(
    passed: Pass,
    march: Callable[[Arrays], Pass],
    initial: Arrays,
    *,
    tolerance: float = TOLERANCE,
    max_passes: int | None = None,
    over: tuple[str, ...] = (),
) -> Pass:
    """Passes over the segments until each enters where the one before it ended.

    Args:
      passed: the first pass, from guessed entries.
      march: a pass from given entries; its `progress` is of that pass alone.
      initial: the entry of the first segment.
      tolerance: of the difference between an entry and the end before it.
      max_passes: None is the number of segments, after which every entry is exact, by causality.
      over: mesh axes whose devices stop together.

    Returns:
      The last pass, with the iterations of them all; converged if entries agree, too.
    """
    segments = passed.ends[0].shape[0]
    if segments == 1:
        return passed
    most = segments if max_passes is None else max_passes

    def gap(passed: Pass) -> jax.Array:
        mine = _disagreement(affine.shifted(initial, passed.ends, 0), passed.entries)
        return lax.pmax(mine, over) if over else mine

    def go_on(carry):
        _, passes, gap = carry
        return (gap > tolerance) & (passes < most)

    def body(carry):
        passed, passes, _ = carry
        (before, _), passed = passed.progress, march(_corrected(passed, initial))
        iterations, converged = passed.progress
        passed = passed._replace(progress=Progress(before + iterations, converged))
        return passed, passes + 1, gap(passed)

    start = passed, jnp.ones((), jnp.int32), gap(passed)
    passed, _, left = lax.while_loop(go_on, body, start)
    iterations, converged = passed.progress
    return passed._replace(progress=Progress(iterations, converged & (left <= tolerance)))


def _disagreement(ends: Arrays, entries: Arrays) -> jax.Array:
    """Largest difference between an entry and the end that it should be. Two that are not numbers
    agree: a pre-activation that is not one spoils all that follow, here as step by step."""
    gaps = [
        jnp.where(jnp.isnan(a) & jnp.isnan(b), 0, jnp.abs(a - b))
        for a, b in zip(ends, entries, strict=True)
    ]
    # A difference that is not a number is one; a maximum over devices would drop it.
    return jnp.max(jnp.stack([jnp.max(jnp.where(jnp.isnan(g), jnp.inf, g)) for g in gaps]))


def _corrected(passed: Pass, initial: Arrays) -> Arrays:
    """Newton's method on the entries."""
    targets = affine.shifted(initial, passed.ends, 0)
    residual = tuple(t - e for t, e in zip(targets, passed.entries, strict=True))
    # The entry of a segment moves by what the segment before it makes of its own entry's move.
    arriving = jax.tree.map(lambda p: jnp.roll(p, 1, 0), passed.products)
    moves = affine.solve(arriving, residual, 0)
    # Not `entry + move`: where the segment before did not move, the entry is its end to the bit.
    still = tuple(jnp.zeros_like(x) for x in initial)
    carried = affine.apply(arriving, affine.shifted(still, moves, 0))
    bounds = newton.state_bound(initial)
    new = (jnp.clip(t + c, -b, b) for t, c, b in zip(targets, carried, bounds, strict=True))
    # Where a product overflowed, the end itself: entries still become exact one after the other.
    return tuple(jnp.where(jnp.isfinite(x), x, t) for x, t in zip(new, targets, strict=True))
