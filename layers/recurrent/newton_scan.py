"""`newton_scan`: `lax.scan` for all times at once, for a step function of the user's own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from hackle.layers.recurrent import affine
from hackle.layers.recurrent.affine import Diagonal, Matrix
from hackle.layers.recurrent.cells import Arrays
from hackle.layers.recurrent.newton import MAX_ITERATIONS, SolveInfo, health, iterate

Step = Callable[[Any, Any], Any]

JACOBIANS = ("diagonal", "block", "dense")
METHODS = ("scan", "newton")


def newton_scan(
    step: Step,
    inputs: Any,
    initial_state: Any,
    *,
    jacobian: str = "diagonal",
    method: str | None = None,
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    bound: float | None = None,
    fallback: bool = False,
) -> tuple[Any, SolveInfo]:
    """The states `h_t = step(h_(t-1), x_t)` of all times, by Newton's method (ParaRNN, DEER).

    As in `lax.scan`, time is the leading axis of the inputs and of the states returned; use
    `jax.vmap` for a batch, or a state with batch axes of its own.

    First derivatives, forwards and backwards, with respect to the inputs, the initial state and
    whatever `step` closes over, come from the implicit function theorem: one linear recurrence,
    whatever the number of iterations. Second derivatives are not supported.

    Args:
      step: `step(state, input) -> state`; shapes and dtypes of the state stay as they are.
      inputs: pytree of arrays `[T, ...]`.
      initial_state: pytree of floating-point arrays.
      jacobian: how the numbers of a state depend on those before. "diagonal": each on itself
        alone (one derivative a step). "block": the state has N arrays of one shape, and the N
        numbers at each place depend on each other (N derivatives). "dense": no structure (as many
        derivatives as numbers). What is declared too narrowly still converges, slowly and only to
        about the tolerance, and has wrong gradients; see `check_jacobian`.
      method: "newton", or "scan" for one step after the other; None is "newton".
      tolerance: of the largest correction, relative to the largest state where that exceeds 1.
        None is `eps^(2/3)` of the dtype; 0 runs `max_iterations` steps.
      max_iterations: bound of the Newton steps.
      bound: largest possible size of a state, to which iterates are projected.
      fallback: where Newton's method did not converge, solve step by step instead.

    Returns:
      `(states, info)`; look at `info.converged`.

    Raises:
      ValueError: T is 0, the inputs differ in length, the state has no floating-point array or
        changes its shape, arrays of a block differ in shape, or an unknown `jacobian` or `method`.
    """
    if jacobian not in JACOBIANS:
        raise ValueError(f"newton_scan: jacobian {jacobian!r} is not one of {JACOBIANS}")
    if method not in (None, *METHODS):
        raise ValueError(f"newton_scan: method {method!r} is not one of {METHODS} or None")
    if max_iterations < 1:
        raise ValueError(f"newton_scan: max_iterations={max_iterations}; expected at least 1")
    initial_state = jax.tree.map(jnp.asarray, initial_state)
    _check_inputs(inputs)
    _check_state(step, jax.tree.map(lambda x: x[0], inputs), initial_state, jacobian)
    initial, restore = _as_vector(initial_state, jacobian)

    def one(state: Arrays, x: Any) -> Arrays:
        return _as_vector(step(restore(state), x), jacobian)[0]

    def evaluate(states: Arrays) -> Arrays:
        return jax.vmap(one)(affine.shifted(initial, states, 0), inputs)

    def linearize(states: Arrays) -> tuple[Arrays, Matrix]:
        before = affine.shifted(initial, states, 0)
        return jax.vmap(lambda h, x: _linearized(lambda h: one(h, x), h, jacobian))(before, inputs)

    def one_by_one() -> Arrays:
        return lax.scan(lambda h, x: (one(h, x),) * 2, initial, inputs)[1]

    if method == "scan":
        states = one_by_one()
        iterations, converged = jnp.zeros((), jnp.int32), jnp.array(True)
    else:
        guess = jax.vmap(lambda x: one(initial, x))(inputs)
        states, iterations, converged = lax.stop_gradient(
            iterate(
                linearize,
                guess,
                0,
                tolerance=tolerance,
                max_iterations=max_iterations,
                bound=bound,
            )
        )
        if fallback:
            states = lax.cond(converged, lambda: states, lambda: lax.stop_gradient(one_by_one()))
    after, matrix = lax.stop_gradient(linearize(states))
    residual, log_jacobian = health(states, after, matrix)
    info = SolveInfo(iterations, residual, converged & jnp.isfinite(residual), log_jacobian)
    if method != "scan":
        states = _one_more(evaluate, matrix, states)
    return jax.vmap(restore)(states), lax.stop_gradient(info)


def _one_more(evaluate: Callable[[Arrays], Arrays], matrix: Matrix, states: Arrays) -> Arrays:
    """One Newton step from the solution. It moves nothing, for its residual is exactly zero, but it
    can be differentiated: what it does to a change of f is what the implicit function theorem says.
    """

    def system(x: Arrays) -> Arrays:
        """`x_t - J_t x_(t-1)`."""
        before = affine.shifted(jax.tree.map(lambda a: jnp.zeros_like(a[0]), x), x, 0)
        return tuple(a - b for a, b in zip(x, affine.apply(matrix, before), strict=True))

    residual = tuple(f - lax.stop_gradient(f) for f in evaluate(states))
    delta = lax.custom_linear_solve(
        system,
        residual,
        lambda _, rhs: affine.solve(matrix, rhs, 0),
        lambda _, rhs: affine.solve_transposed(matrix, rhs, 0),
    )
    # Where products of Jacobians overflow, zero times them is not a number.
    return tuple(h + jnp.where(jnp.isfinite(d), d, 0) for h, d in zip(states, delta, strict=True))


def check_jacobian(step: Step, input: Any, state: Any, jacobian: str = "diagonal") -> None:
    """Raises ValueError if the Jacobian of `step` is not of the declared kind at this point.

    Compares the derivative along one random direction with what the declared Jacobian says of
    it. Not inside jit or grad.

    Args:
      input: what `step` takes at one time.
    """
    if jacobian not in JACOBIANS:
        raise ValueError(f"check_jacobian: jacobian {jacobian!r} is not one of {JACOBIANS}")
    state = jax.tree.map(jnp.asarray, state)
    _check_state(step, input, state, jacobian)
    at, restore = _as_vector(state, jacobian)

    def one(h: Arrays) -> Arrays:
        return _as_vector(step(restore(h), input), jacobian)[0]

    keys = jax.random.split(jax.random.key(0), len(at))
    along = tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, at, strict=True))
    true = jax.jvp(one, (at,), (along,))[1]
    said = affine.apply(_linearized(one, at, jacobian)[1], along)
    if any(isinstance(x, jax.core.Tracer) for x in (*true, *said)):
        raise ValueError("check_jacobian needs numbers; call it outside jit and grad")
    gap = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(true, said, strict=True))
    size = max(float(jnp.max(jnp.abs(x))) for x in true)
    if not gap <= 1e3 * float(jnp.finfo(at[0].dtype).eps) * max(size, 1):
        raise ValueError(
            f"the Jacobian of the step is not {jacobian!r}: along a random direction it gives "
            f"something else by {gap:.2g}; a wider one of {JACOBIANS} is needed"
        )


def _as_vector(state: Any, jacobian: str) -> tuple[Arrays, Callable[[Arrays], Any]]:
    """The state as a tuple of arrays, one flat array if dense, and the way back."""
    if jacobian == "dense":
        flat, unravel = ravel_pytree(state)
        return (flat,), lambda vector: unravel(vector[0])
    leaves, tree = jax.tree.flatten(state)
    return tuple(leaves), lambda vector: jax.tree.unflatten(tree, vector)


def _linearized(f: Callable[[Arrays], Arrays], h: Arrays, jacobian: str) -> tuple[Arrays, Matrix]:
    """`f(h)` and its Jacobian of the declared kind."""
    if jacobian == "dense":
        return f(h), jax.jacfwd(lambda x: f((x,))[0])(h[0])
    ones, zeros = jax.tree.map(jnp.ones_like, h), jax.tree.map(jnp.zeros_like, h)
    after, push = jax.linearize(f, h)
    if jacobian == "diagonal":
        return after, Diagonal(push(ones))
    columns = [push((*zeros[:k], ones[k], *zeros[k + 1 :])) for k in range(len(h))]
    return after, tuple(zip(*columns, strict=True))


def _check_inputs(inputs: Any) -> None:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
    if not shapes or any(len(shape) == 0 for shape in shapes):
        raise ValueError(f"newton_scan: inputs must be arrays [T, ...], got shapes {shapes}")
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"newton_scan: inputs differ in length: {[shape[0] for shape in shapes]}")
    if shapes[0][0] == 0:
        raise ValueError("newton_scan: the inputs have no time steps (T = 0); expected T >= 1")


def _check_state(step: Step, first: Any, state: Any, jacobian: str) -> None:
    leaves = jax.tree.leaves(state)
    if not leaves or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        kinds = [str(x.dtype) for x in leaves]
        raise ValueError(f"newton_scan: the state must be floating-point arrays, got {kinds}")
    like = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    after = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(step, state, first))
    if like != after:
        raise ValueError(f"newton_scan: step turns a state of {like} into {after}")
    shapes = {x.shape for x in leaves}
    if jacobian == "block" and len(shapes) > 1:
        raise ValueError(f"newton_scan: arrays of a block must have one shape, got {shapes}")
