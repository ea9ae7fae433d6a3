"""A nonlinear recurrence solved for all times at once by Newton's method (ParaRNN, 2510.21450).

All states together are the root of `f(h_(t-1), x_t) - h_t = 0`. A Newton step solves the system
linearised at the present iterate, `d_t = J_t d_(t-1) + f(h_(t-1), x_t) - h_t`, which is a linear
recurrence (`affine.py`), and adds d (section 3). Every step makes at least one more state exact,
so T steps always suffice; where the recurrence forgets, three or four do, whatever T.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hackle.layers.recurrent import affine
from hackle.layers.recurrent.affine import Matrix
from hackle.layers.recurrent.cells import Arrays, Block, Cell, apply, transposed

MAX_ITERATIONS = 32


class SolveInfo(NamedTuple):
    """How a solution ended; scalars, through which no gradient flows.

    Attributes:
      iterations: int32, Newton steps (or passes over the segments of `shooting`). Over a mesh that
        splits time, all that the slowest part took; a part that does not iterate counts its passes.
      residual: largest `|f(h_(t-1), x_t) - h_t|` of the states returned; not a number where one of
        them is not finite.
      converged: bool, the last correction was within the tolerance and everything is finite. Of
        the method itself: where it fell back it stays false, and the residual is small.
      log_jacobian: mean of `log |J|` over times and channels, |J| being the size of the number
        that J is for a channel, or its spectral radius where it is a matrix. Zeros, where a reset
        cuts, are left out. The recurrence forgets where it is negative, and resists being solved
        for all times at once where it is positive (arXiv 2508.16817). Whoever uses it under `jit`
        makes the Jacobians of all times.
    """

    iterations: jax.Array
    residual: jax.Array
    converged: jax.Array
    log_jacobian: jax.Array


class Progress(NamedTuple):
    """What a method knows of itself while it runs: scalars of `SolveInfo`."""

    iterations: jax.Array
    converged: jax.Array


Linearize = Callable[[Arrays], tuple[Arrays, Matrix]]


def check_bounds(name: str, tolerance: float | None, max_iterations: int | None) -> None:
    """Raises ValueError on a tolerance or a bound of the iterations that no method can keep."""
    if isinstance(tolerance, jax.core.Tracer):
        raise ValueError(f"{name}: tolerance is traced; expected a number known before the run")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"{name}: tolerance={tolerance}; expected a finite number from 0 on")
    if max_iterations is not None and not (
        isinstance(max_iterations, int | np.integer) and max_iterations >= 1
    ):
        raise ValueError(f"{name}: max_iterations={max_iterations}; expected an integer from 1 on")


def default_tolerance(dtype) -> float:
    """`eps^(2/3)`: the error left after a correction of this size is its square or rounding."""
    return float(jnp.finfo(dtype).eps) ** (2 / 3)


def iterate(
    linearize: Linearize,
    guess: Arrays,
    axis: int,
    *,
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    bound: Arrays | float | None = None,
) -> tuple[Arrays, Progress]:
    """Newton steps from `guess` until the correction is within the tolerance.

    Where a step of the recurrence gives what is not a number, the states that depend on it are
    not numbers either, as if one had gone step by step; all others are solved for.

    Args:
      linearize: maps states of all times to `(f, J)`, both at the states one step earlier.
      guess: states of all times.
      axis: the time axis.
      tolerance: of the largest correction, relative to the largest state where that exceeds 1.
        None is `default_tolerance`; 0 runs `max_iterations` steps.
      bound: largest possible size of a state, one for all or arrays that broadcast against the
        states; iterates are projected there, which is exact.

    Returns:
      `(states, progress)`.
    """
    usual = default_tolerance(guess[0].dtype)
    if tolerance is None:
        tolerance = usual
    bounds = bound if isinstance(bound, tuple) else (bound,) * len(guess)

    def go_on(carry):
        _, size, k, _ = carry
        return (size > tolerance) & (k < max_iterations) if tolerance else k < max_iterations

    def body(carry):
        states, _, k, _ = carry
        after, jacobian = linearize(states)
        residual = tuple(a - x for a, x in zip(after, states, strict=True))
        # What is not a number would reach all later times, even those that do not depend on it.
        undefined = _any(jnp.isnan, residual)
        residual, jacobian = jax.tree.map(_numbers, (residual, jacobian))
        delta = affine.solve(jacobian, residual, axis)
        size = _largest(delta, instead=jnp.inf) / jnp.maximum(1, _largest(states, instead=0))
        states = tuple(_update(x, d, b) for x, d, b in zip(states, delta, bounds, strict=True))
        return states, jnp.where(undefined, jnp.inf, size), k + 1, undefined

    def spoilt(states: Arrays) -> Arrays:
        after, jacobian = linearize(states)
        reached = affine.reached(jacobian, tuple(map(jnp.isnan, after)), axis)
        return tuple(jnp.where(r, jnp.nan, x) for r, x in zip(reached, states, strict=True))

    # Made of the guess, so that they vary over the same devices.
    size = jnp.full_like(_largest(guess, instead=0), jnp.inf)
    undefined = jnp.zeros_like(_any(jnp.isnan, guess))
    start = guess, size, jnp.zeros((), jnp.int32), undefined
    states, size, iterations, undefined = lax.while_loop(go_on, body, start)
    states = lax.cond(undefined, spoilt, lambda states: states, states)
    return states, Progress(iterations, size <= (tolerance or usual))


def _any(what: Callable[[jax.Array], jax.Array], arrays: Arrays) -> jax.Array:
    return jnp.any(jnp.stack([jnp.any(what(x)) for x in arrays]))


def _numbers(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), 0, x)


def _largest(arrays: Arrays, *, instead: float) -> jax.Array:
    """The largest size; what is not finite counts as `instead`, for a maximum over devices drops
    what is not a number."""
    sizes = (jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), instead)) for x in arrays)
    return jnp.max(jnp.stack(list(sizes)))


def _update(state: jax.Array, delta: jax.Array, bound: jax.Array | float | None) -> jax.Array:
    """Adds a correction. Where products of Jacobians overflowed, the old iterate stays: the exact
    states still grow from the first one on."""
    new = state + delta
    if bound is not None:
        new = jnp.clip(new, -bound, bound)
    return jnp.where(jnp.isfinite(new), new, state)


def health(states: Arrays, after: Arrays, jacobian: Matrix) -> tuple[jax.Array, jax.Array]:
    """`(residual, log_jacobian)` of `SolveInfo`."""
    residual = tuple(a - x for a, x in zip(after, states, strict=True))
    largest = _largest(residual, instead=jnp.inf)
    # Sums of each array: joining them would bring states of all devices together.
    radii = _log_radii(jacobian)
    flows = [jnp.isfinite(x) for x in radii]
    total = sum(jnp.sum(jnp.where(f, x, 0)) for f, x in zip(flows, radii, strict=True))
    count = sum(jnp.sum(f) for f in flows)
    return (
        jnp.where(jnp.isfinite(largest), largest, jnp.nan),
        total / jnp.maximum(count, 1),
    )


def _log_radii(jacobian: Matrix) -> Arrays:
    """Log of the spectral radius of every matrix, by `|J^n|^(1/n)` with n = 64 (Gelfand); -inf of
    one that is zero, or of which a power is."""

    def log_size(j: Matrix) -> jax.Array:
        entries = jax.tree.leaves(j)
        if isinstance(j, tuple):
            square = sum(jnp.square(x) for x in entries)
        else:
            square = jnp.sum(jnp.square(entries[0]), axis=(-2, -1))
        return 0.5 * jnp.log(square)

    if isinstance(jacobian, affine.Diagonal) or (
        isinstance(jacobian, tuple) and len(jacobian) == 1
    ):
        return tuple(jnp.log(jnp.abs(x)) for x in jax.tree.leaves(jacobian))
    found, power = jnp.zeros(()), 1
    for _ in range(6):
        # Scaled to 1, so that no power is too large or too small.
        size = log_size(jacobian)
        found, scale = found + size / power, jnp.exp(-jnp.where(jnp.isfinite(size), size, 0))
        scale = scale if isinstance(jacobian, tuple) else scale[..., None, None]
        jacobian = jax.tree.map(functools.partial(jnp.multiply, scale), jacobian)
        jacobian, power = affine.compose(jacobian, jacobian), 2 * power
    return (found + log_size(jacobian) / power,)


# The cells of `cells.py`, all of whose states lie in [-1, 1].


def state_bound(initial: Arrays) -> Arrays:
    """Largest possible size of each state: 1, unless its initial one is larger. A channel's next
    state lies between the last one and a tanh, or is a gate times a tanh."""
    return tuple(jnp.fmax(1, jnp.abs(x)) for x in initial)


def _linearized(cell: Cell, u, weights, initial: Arrays, reset) -> Linearize:
    row, rows = _rows(u, weights, initial[0].dtype)
    keep = None if reset is None else ~reset[..., None]

    def linearize(states: Arrays) -> tuple[Arrays, Block]:
        after, jacobian = cell.linearize(_before(initial, states, keep), row, rows)
        return after, _cut(jacobian, keep)

    return linearize


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
    """As `scan.solve`, and how Newton's method went. The first guess is `f(0, x_t)`."""
    row, rows = _rows(u, weights, initial[0].dtype)
    zero = tuple(jnp.zeros_like(row[0]) for _ in initial)
    states, progress = iterate(
        _linearized(cell, u, weights, initial, reset),
        cell.step(zero, row, rows),
        1,
        tolerance=tolerance,
        max_iterations=MAX_ITERATIONS if max_iterations is None else max_iterations,
        bound=tuple(x[:, None] for x in state_bound(initial)),
    )
    final = tuple(x[:, -1] for x in states)
    return tuple(x.astype(u.dtype) for x in states), final, progress


def march(
    cell: Cell, u: jax.Array, weights: jax.Array, initial: Arrays, reset: jax.Array | None, **bounds
) -> tuple[Arrays, Arrays, Block, Progress]:
    """As `scan.march`, and how Newton's method went; `bounds` are those of `solve`."""
    states, final, progress = solve(cell, u, weights, initial, reset, **bounds)
    return states, final, product(cell, u, weights, initial, reset, states), progress


def product(cell: Cell, u, weights, initial: Arrays, reset, states: Arrays) -> Block:
    """d(final) / d(initial), from the states of all times."""
    states = tuple(x.astype(initial[0].dtype) for x in states)
    _, jacobian = _linearized(cell, u, weights, initial, reset)(states)
    return affine.product(jacobian, 1)


def examine(
    cell: Cell, u, weights, initial: Arrays, reset, states: Arrays, progress: Progress
) -> SolveInfo:
    """What the states returned are worth; costs one evaluation of all steps, if it is used."""
    states = tuple(x.astype(initial[0].dtype) for x in states)
    linearize = _linearized(cell, u, weights, initial, reset)
    residual, log_jacobian = health(states, *linearize(states))
    converged = progress.converged & jnp.isfinite(residual)
    return SolveInfo(progress.iterations, residual, converged, log_jacobian)


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
    """As `scan.adjoint`: one linear recurrence backwards, by the implicit function theorem.

    `y_t = g_t + J_(t+1)^T y_(t+1)`, with Jacobians at the states themselves and not at an iterate
    (section 3.2); then the gradients of one step at each time.
    """
    dtype = initial[0].dtype
    row, rows = _rows(u, weights, dtype)
    keep = None if reset is None else ~reset[..., None]
    before = _before(initial, tuple(x.astype(dtype) for x in states), keep)
    jacobian, local = cell.local_gradients(before, row, rows)
    jacobian = _cut(jacobian, keep)
    given = tuple(
        jnp.zeros_like(u[:, :, 0], dtype) if g is None else g.astype(dtype) for g in cotangents
    )
    given = tuple(g.at[:, -1].add(f) for g, f in zip(given, final_cotangents, strict=True))
    total = affine.solve_transposed(jacobian, given, 1)
    du = apply(transposed(local), total)
    after = cell.step(before, row, rows)
    dweights = cell.weight_gradients(before, after, row, rows, du)
    dinitial = apply(transposed(jacobian), total)
    return (
        jnp.stack(du, axis=2).astype(u.dtype),
        jnp.stack([jnp.sum(g, axis=(0, 1)) for g in dweights]),
        tuple(x[:, 0] for x in dinitial),
    )


def _rows(u: jax.Array, weights: jax.Array, dtype) -> tuple[Arrays, Arrays]:
    return tuple(u[:, :, k].astype(dtype) for k in range(3)), tuple(weights.astype(dtype))


def _before(initial: Arrays, states: Arrays, keep: jax.Array | None) -> Arrays:
    before = affine.shifted(initial, states, 1)
    return before if keep is None else tuple(jnp.where(keep, x, 0) for x in before)


def _cut(jacobian: Block, keep: jax.Array | None) -> Block:
    """Nothing flows through a reset."""
    return jacobian if keep is None else jax.tree.map(lambda x: jnp.where(keep, x, 0), jacobian)
