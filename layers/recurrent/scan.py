"""The recurrence step by step: the reading that every other method is held against."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from hackle.layers.recurrent.cells import Arrays, Block, Cell, compose, identity


def solve(
    cell: Cell, u: jax.Array, weights: jax.Array, initial: Arrays, reset: jax.Array | None
) -> tuple[Arrays, Arrays]:
    """States of all times, and after the last.

    Args:
      cell: `cells.GRU()` or `cells.LSTM()`.
      u: pre-activations `[B, T, 3, D]`.
      weights: `[R, D]`, a row per weight of the cell.
      initial: a state of arrays `[B, D]`, of the dtype to compute in.
      reset: bool `[B, T]`, true where the state before that step is zero; or None.

    Returns:
      States, arrays `[B, T, D]` in the dtype of u; final states, arrays `[B, D]` as `initial`.
    """
    step = functools.partial(_step, cell, tuple(weights.astype(initial[0].dtype)), u.dtype)
    final, states = lax.scan(step, initial, _time_first(u, reset))
    return tuple(jnp.moveaxis(x, 0, 1) for x in states), final


def march(
    cell: Cell, u: jax.Array, weights: jax.Array, initial: Arrays, reset: jax.Array | None
) -> tuple[Arrays, Arrays, Block]:
    """As `solve`, and d(final) / d(initial): an N x N block of arrays `[B, D]`."""
    rows = tuple(weights.astype(initial[0].dtype))

    def step(carry, x):
        state, product = carry
        row, keep = x
        state, product = _kept(state, keep), tuple(_kept(line, keep) for line in product)
        row = tuple(row[:, k].astype(initial[0].dtype) for k in range(3))
        state, jacobian = cell.linearize(state, row, rows)
        return (state, compose(jacobian, product)), tuple(s.astype(u.dtype) for s in state)

    start = (initial, identity(initial))
    (final, product), states = lax.scan(step, start, _time_first(u, reset))
    return tuple(jnp.moveaxis(x, 0, 1) for x in states), final, product


def adjoint(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    states: Arrays,
    cotangents: tuple[jax.Array | None, ...],
    final_cotangents: Arrays,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """Gradients of `solve` by back-propagation through time, one step after the other.

    Args:
      states: what `solve` returned.
      cotangents: of the states, `[B, T, D]` each or None for zero.
      final_cotangents: of the final states, `[B, D]` each.

    Returns:
      `(du [B,T,3,D] in u's dtype, dweights [R,D], dinitial: arrays [B,D])`.
    """
    del states  # recomputed by autodiff

    def run(u, weights, initial):
        return solve(cell, u, weights, initial, reset)

    (out, final), pull = jax.vjp(run, u, weights, initial)
    full = tuple(
        jnp.zeros_like(x) if g is None else g.astype(x.dtype)
        for x, g in zip(out, cotangents, strict=True)
    )
    return pull(
        (full, tuple(g.astype(x.dtype) for g, x in zip(final_cotangents, final, strict=True)))
    )


def _step(cell: Cell, weights: Arrays, dtype, state: Arrays, x) -> tuple[Arrays, Arrays]:
    row, keep = x
    row = tuple(row[:, k].astype(state[0].dtype) for k in range(3))
    state = cell.step(_kept(state, keep), row, weights)
    return state, tuple(s.astype(dtype) for s in state)


def _kept(state: Arrays, keep: jax.Array | None) -> Arrays:
    return state if keep is None else tuple(jnp.where(keep[:, None], s, 0) for s in state)


def _time_first(u: jax.Array, reset: jax.Array | None):
    return jnp.moveaxis(u, 1, 0), None if reset is None else ~reset.T
