"""`newton_scan`: `lax.scan` for all times at once, for a step function of the user's own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from hackle.layers.recurrent import affine
from hackle.layers.recurrent.affine import Diagonal, Matrix
from hackle.layers.recurrent.cells import Arrays
from hackle.layers.recurrent.methods import Options
from hackle.layers.recurrent.newton import (
    MAX_ITERATIONS,
    Progress,
    SolveInfo,
    check_bounds,
    health,
    iterate,
)

Step = Callable[[Any, Any], Any]

JACOBIANS = ("diagonal", "block", "dense")
METHODS = ("scan", "newton")
# How far from the given state `check_jacobian` looks, the first that can be.
_OFF = (1.0, 0.1, 0.01)


def newton_scan(
    step: Step,
    inputs: Any,
    initial_state: Any,
    *,
    jacobian: str = "diagonal",
    method: str | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    bound: float | None = None,
    fallback: bool = False,
) -> tuple[Any, SolveInfo]:
    """The states `h_t = step(h_(t-1), x_t)` of all times, by Newton's method (ParaRNN, DEER).

    As in `lax.scan`, time is the leading axis of the inputs and of the states returned; use
    `jax.vmap` for a batch, or a state with batch axes of its own.

    Derivatives with respect to the inputs, the initial state and whatever `step` closes over, in
    forward and reverse mode and of any order, come from the implicit function theorem: one linear
    recurrence for each, whatever the number of iterations. Call it under `jax.jit`: outside, a step
    that is a new function each time is compiled each time. No gradient flows through the info: it
    is that of `jax.lax.stop_gradient`.

    Args:
      step: `step(state, input) -> state`; shapes and dtypes of the state stay as they are.
      inputs: pytree of arrays `[T, ...]`.
      initial_state: pytree of floating-point arrays of one dtype.
      jacobian: how the numbers of a state depend on those before. "diagonal": each on itself
        alone (one derivative a step). "block": the state has N arrays of one shape, and the N
        numbers at each place depend on each other (N derivatives). "dense": no structure (as many
        derivatives as numbers). What is declared too narrowly still converges, slowly and only to
        about the tolerance, and has wrong gradients; see `check_jacobian`.
      method: "newton", or "scan" for one step after the other; None is "newton".
      tolerance: of the largest correction, relative to the largest state where that exceeds 1.
        None is `eps^(2/3)` of the dtype; 0 runs `max_iterations` steps.
      max_iterations: bound of the Newton steps; None is 32.
      bound: largest possible size of a state, to which iterates are projected.
      fallback: where Newton's method did not converge, solve step by step instead; the info then
        has the residual of these states, and still says that the method did not converge.

    Returns:
      `(states, info)`; look at `info.converged`. A state that is not a number spoils all later ones
      that may depend on it, by the Jacobian: `info.converged` is false then.

    Raises:
      ValueError: T is 0, the inputs differ in length, the state is not of floating-point arrays of
        one dtype or changes its shape, arrays of a block differ in shape, an unknown `jacobian` or
        `method`, a bound that has no meaning, or one that "scan" has no use for.
    """
    if jacobian not in JACOBIANS:
        raise ValueError(f"newton_scan: jacobian {jacobian!r} is not one of {JACOBIANS}")
    if method not in (None, *METHODS):
        raise ValueError(f"newton_scan: method {method!r} is not one of {METHODS} or None")
    check_bounds("newton_scan", tolerance, max_iterations)
    if bound is not None and not (isinstance(bound, int | float | np.number) and bound > 0):
        raise ValueError(f"newton_scan: bound={bound}; expected a number above 0")
    asked = Options(tolerance, max_iterations, fallback)
    if method == "scan" and asked != Options():
        raise ValueError(f"newton_scan: method 'scan' does not iterate, got {asked}")
    initial_state = jax.tree.map(jnp.asarray, initial_state)
    _check_inputs(inputs)
    inputs = jax.tree.map(jnp.asarray, inputs)
    first = jax.tree.map(lambda x: x[0], inputs)
    _check_state("newton_scan", step, first, initial_state, jacobian)
    # What the step closes over and may have a derivative becomes an argument.
    step, closed = jax.closure_convert(step, initial_state, first)
    initial, restore = _as_vector(initial_state, jacobian)

    def one(closed: list, state: Arrays, x: Any) -> Arrays:
        return _as_vector(step(restore(state), x, *closed), jacobian)[0]

    def evaluate(given: _Given, states: Arrays) -> Arrays:
        before = affine.shifted(given.initial, states, 0)
        return jax.vmap(lambda h, x: one(given.closed, h, x))(before, given.inputs)

    def linearize(given: _Given, states: Arrays) -> tuple[Arrays, Matrix]:
        before = affine.shifted(given.initial, states, 0)
        at = lambda h, x: _linearized(lambda h: one(given.closed, h, x), h, jacobian)
        return jax.vmap(at)(before, given.inputs)

    def one_by_one(given: _Given) -> Arrays:
        move = lambda h, x: (one(given.closed, h, x),) * 2
        return lax.scan(move, given.initial, given.inputs)[1]

    @jax.custom_jvp
    def root(given: _Given) -> tuple[Arrays, Progress]:
        states, progress = iterate(
            functools.partial(linearize, given),
            jax.vmap(lambda x: one(given.closed, given.initial, x))(given.inputs),
            0,
            tolerance=tolerance,
            max_iterations=MAX_ITERATIONS if max_iterations is None else max_iterations,
            bound=bound,
        )
        if fallback:
            states = lax.cond(progress.converged, lambda: states, lambda: one_by_one(given))
        return states, progress

    @root.defjvp
    def _(primals, tangents):
        """`dh_t = J_t dh_(t-1) + df_t`, with df the change of f at fixed states; the implicit
        function theorem. The root in it is this one again, so that it has derivatives in turn."""
        states, progress = root(*primals)
        _, moved = jax.jvp(lambda given: evaluate(given, states), primals, tangents)
        none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), progress)
        return (states, progress), (_solve(linearize(primals[0], states)[1], moved), none)

    given = _Given(closed, inputs, initial)
    if method == "scan":
        states = one_by_one(given)
        progress = Progress(jnp.zeros((), jnp.int32), jnp.array(True))
    else:
        states, progress = root(given)
    fixed = lax.stop_gradient(states)
    residual, log_jacobian = health(fixed, *linearize(lax.stop_gradient(given), fixed))
    converged = progress.converged & jnp.isfinite(residual)
    info = SolveInfo(progress.iterations, residual, converged, log_jacobian)
    return jax.vmap(restore)(states), info


class _Given(NamedTuple):
    """All that the states depend on."""

    closed: list
    inputs: Any
    initial: Arrays


def _solve(matrix: Matrix, rhs: Arrays) -> Arrays:
    """As `affine.solve`, with a transpose that keeps nothing of the rounds of a scan."""

    def system(x: Arrays) -> Arrays:
        """`x_t - J_t x_(t-1)`."""
        before = affine.shifted(jax.tree.map(lambda a: jnp.zeros_like(a[0]), x), x, 0)
        return tuple(a - b for a, b in zip(x, affine.apply(matrix, before), strict=True))

    return lax.custom_linear_solve(
        system,
        rhs,
        lambda _, rhs: affine.solve(matrix, rhs, 0),
        lambda _, rhs: affine.solve_transposed(matrix, rhs, 0),
    )


def check_jacobian(step: Step, input: Any, state: Any, jacobian: str = "diagonal") -> None:
    """Raises ValueError if the Jacobian of `step` is not of the declared kind here and nearby.

    Compares the derivative along one random direction with what the declared Jacobian says of
    it: at the state, and at one that is off it by random numbers of size 1, since a state of
    zeros hides products; of size 0.1 or 0.01 where the step is not finite farther away. Not inside
    jit or grad.

    Args:
      input: what `step` takes at one time.

    Raises:
      ValueError: also where step or derivative is not finite at the state, or at none of those
        near it.
    """
    if jacobian not in JACOBIANS:
        raise ValueError(f"check_jacobian: jacobian {jacobian!r} is not one of {JACOBIANS}")
    state = jax.tree.map(jnp.asarray, state)
    _check_state("check_jacobian", step, input, state, jacobian)
    at, restore = _as_vector(state, jacobian)

    def one(h: Arrays) -> Arrays:
        return _as_vector(step(restore(h), input), jacobian)[0]

    def drawn(seed: int) -> Arrays:
        keys = jax.random.split(jax.random.key(seed), len(at))
        return tuple(jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, at, strict=True))

    along, off = drawn(0), drawn(1)
    if not _compare(one, at, along, jacobian):
        raise ValueError(
            "check_jacobian: at this state and input the step or its derivative is not finite"
        )
    for size in _OFF:
        near = tuple(x + size * y for x, y in zip(at, off, strict=True))
        if _compare(one, near, along, jacobian):
            return
    raise ValueError(
        "check_jacobian: the step or its derivative is finite at this state, but not where the "
        f"state is off by random numbers of size {_OFF}; expected one that is finite around it"
    )


def _compare(one: Callable[[Arrays], Arrays], at: Arrays, along: Arrays, jacobian: str) -> bool:
    """Whether step and derivative are finite at `at`.

    Raises:
      ValueError: they are, and the declared Jacobian gives another derivative along `along`.
    """
    after, true = jax.jvp(one, (at,), (along,))
    said = affine.apply(_linearized(one, at, jacobian)[1], along)
    if any(isinstance(x, jax.core.Tracer) for x in (*true, *said)):
        raise ValueError("check_jacobian needs numbers; call it outside jit and grad")
    if not all(jnp.all(jnp.isfinite(x)) for x in (*after, *true, *said)):
        return False
    gap = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(true, said, strict=True))
    size = max(float(jnp.max(jnp.abs(x))) for x in (*true, *said))
    # A half-precision derivative is right to a per cent or two.
    if gap > min(1e3 * float(jnp.finfo(at[0].dtype).eps), 0.05) * max(size, 1e-20):
        raise ValueError(
            f"the Jacobian of the step is not {jacobian!r}: along a random direction it gives "
            f"something else by {gap:.2g}; a wider one of {JACOBIANS} is needed"
        )
    return True


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


def _check_state(name: str, step: Step, first: Any, state: Any, jacobian: str) -> None:
    leaves = jax.tree.leaves(state)
    kinds = [str(x.dtype) for x in leaves]
    if not leaves or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError(f"{name}: the state must be floating-point arrays, got {kinds}")
    if len(set(kinds)) > 1:
        raise ValueError(f"{name}: arrays of the state must have one dtype, got {kinds}")
    shapes = [x.shape for x in leaves]
    if any(0 in shape for shape in shapes):
        raise ValueError(f"{name}: arrays of the state must not be empty, got shapes {shapes}")
    like = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    after = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(step, state, first))
    if like != after:
        raise ValueError(f"{name}: step turns a state of {like} into {after}")
    if jacobian == "block" and len(set(shapes)) > 1:
        raise ValueError(f"{name}: arrays of a block must have one shape, got {set(shapes)}")
