"""The public recurrences: check the arguments, choose a method, run it, differentiate it."""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from hackle.layers.padding import cleared, inside
from hackle.layers.recurrent import methods, newton, over_devices
from hackle.layers.recurrent.cells import GRU, LSTM, Arrays, Cell
from hackle.layers.recurrent.methods import METHODS, Options
from hackle.layers.recurrent.newton import SolveInfo

__all__ = ["METHODS", "gru", "gru_with_info", "lstm", "lstm_with_info"]

_log = logging.getLogger("hackle")


def gru(
    u: jax.Array,
    a: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    lengths: jax.Array | None = None,
    method: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The diagonal GRU of ParaRNN (arXiv 2510.21450), all times.

    `z = sig(a_z h + u_z)`, `r = sig(a_r h + u_r)`, `c = tanh(a_c (h r) + u_c)`,
    `h' = (1 - z) h + z c`.

    Differentiable in u, a and the initial state in reverse mode alone: `jax.grad` and `jax.vjp`;
    twice by the method "scan". Computed in float32 (float64 if u is). What is not a number is
    carried on to all later states of its row and channel, up to a reset.

    Args:
      u: pre-activations `[B, T, 3, D]`, in the order z, r, c; float32 or bfloat16 (or float64).
      a: state weights `[3, D]`, in the same order.
      initial_state: `[B, D]`; None is zero.
      reset: bool `[B, T]`: true zeroes the state before that step, e.g. where a packed document
        begins.
      lengths: int `[B]`, 0 to T: steps of each row that count. What follows them may be anything,
        states there are 0, and the final state is that of the last step that counts. With lengths
        a half-precision u is held in float32, so that no final state is rounded.
      method: "scan" (one step after the other), "newton" (all times at once), "shooting"
        (segments at once), "fused" (one kernel, on chips that have one) runs exactly that or
        raises. None picks what was measured to be fastest where this runs (the mesh, or the
        device of u, or the default one), and logs the choice once. "newton" and "shooting" log a
        warning if they do not converge.

    Returns:
      `(states [B, T, D] in the dtype of u, final state [B, D] float32)`.

    Raises:
      ValueError: shapes or dtypes do not fit, T is 0, the method is unknown, or (outside jit) a
        number that is given is not finite.
      NotImplementedError: the named method cannot run on this device.
    """
    states, final, _ = _run(GRU(), u, (a,), initial_state, reset, lengths, method, None)
    return states[0], final[0]


def lstm(
    u: jax.Array,
    a: jax.Array,
    peephole: jax.Array,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    *,
    reset: jax.Array | None = None,
    lengths: jax.Array | None = None,
    method: str | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The diagonal LSTM of ParaRNN: coupled input and forget gates, and peepholes.

    `f = sig(a_f h + u_f + p_f c)`, `c' = f c + (1 - f) tanh(a_z h + u_z)`,
    `o = sig(a_o h + u_o + p_o c')`, `h' = o tanh(c')`.

    Args:
      u: pre-activations `[B, T, 3, D]`, in the order f, o, z.
      a: state weights `[3, D]`, in the same order.
      peephole: `[2, D]`, of f and o.
      initial_state: `(c, h)`, each `[B, D]`; None is zero.
      reset, lengths, method: as in `gru`.

    Returns:
      `(h [B, T, D] in the dtype of u, final state (c, h) float32)`.

    Raises:
      As `gru`.
    """
    states, final, _ = _run(LSTM(), u, (a, peephole), initial_state, reset, lengths, method, None)
    return states[1], (final[0], final[1])


def gru_with_info(
    u: jax.Array,
    a: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    lengths: jax.Array | None = None,
    method: str | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    fallback: bool = False,
) -> tuple[jax.Array, jax.Array, SolveInfo]:
    """As `gru`, and how the method ended.

    `info.converged` is false wherever a state is not finite, whatever the method. No gradient flows
    through the info: it is that of `jax.lax.stop_gradient`.

    Args:
      tolerance, max_iterations: of "newton" and "shooting", which must be named then; None is their
        own choice. With tolerance 0, Newton's method takes exactly `max_iterations` steps. Over a
        mesh that splits time they are those of each part; the borders between parts have their own.
      fallback: where the method did not converge, go step by step instead. `info` then has the
        residual of the states returned, and still says that the method did not converge.

    Raises:
      ValueError: also if a method that does not iterate is given one of these, or one of them has
        no meaning.
    """
    options = Options(tolerance, max_iterations, fallback)
    states, final, info = _run(GRU(), u, (a,), initial_state, reset, lengths, method, options)
    return states[0], final[0], info


def lstm_with_info(
    u: jax.Array,
    a: jax.Array,
    peephole: jax.Array,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    *,
    reset: jax.Array | None = None,
    lengths: jax.Array | None = None,
    method: str | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
    fallback: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array], SolveInfo]:
    """As `lstm`, and how the method ended; see `gru_with_info`."""
    options = Options(tolerance, max_iterations, fallback)
    states, final, info = _run(
        LSTM(), u, (a, peephole), initial_state, reset, lengths, method, options
    )
    return states[1], (final[0], final[1]), info


class _How(NamedTuple):
    """All that is decided before a number is looked at.

    Attributes:
      every: whether all arrays of the states are returned, and not only the last.
    """

    cell: Cell
    method: str
    options: Options
    platform: str
    at: over_devices.Placement | None
    every: bool

    def find(self) -> methods.Method:
        return methods.find(self.method, self.platform, self.options)


def _run(
    cell: Cell,
    u: ArrayLike,
    weights: tuple[ArrayLike, ...],
    initial: ArrayLike | tuple[ArrayLike, ...] | None,
    reset: ArrayLike | None,
    lengths: ArrayLike | None,
    method: str | None,
    options: Options | None,
) -> tuple[Arrays, Arrays, SolveInfo]:
    """`options` None: nobody looks at the info, so that trouble is logged."""
    given = _checked(cell, u, weights, initial, reset, lengths)
    u, stored = given.u, given.u.dtype
    if given.lengths is not None:
        # Final states of rows that end early are taken from among all, which are not rounded then.
        u = u.astype(given.initial[0].dtype)
    platform = methods.platform(u)
    method, asked = methods.choose(cell.name, method, options or Options(), platform, u)
    # Only the last array of a state leaves the layer, unless final states are read from them all.
    every = given.lengths is not None
    how = _How(cell, method, asked, platform, over_devices.placement(u), every)
    states, final, info = _compiled(how, u, given.weights, given.initial, given.reset)
    info = lax.stop_gradient(info)
    if options is None and method in methods.ITERATIVE:
        _report(cell.name, method, info)
    if given.lengths is not None:
        states, final = _end_at(given.lengths, states, given.initial)
        states = tuple(x.astype(stored) for x in states)
    return (states if every else (None,) * (cell.states - 1) + states), final, info


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(how: _How, u, weights, initial, reset):
    return _forward(how, u, weights, initial, reset)[0]


def _forward(how: _How, u, weights, initial, reset):
    arrays = u, weights, initial, reset
    method, borders = how.find(), over_devices.Borders()
    if how.at is None:
        states, final, progress = method.solve(how.cell, *arrays)
    else:
        states, final, borders, progress = over_devices.solve(method, how.at, how.cell, *arrays)
    info = newton.examine(how.cell, *arrays, states, progress)
    return (states if how.every else states[-1:], final, info), (arrays, states, borders)


def _backward(how: _How, kept, cotangents):
    arrays, *rest = kept
    given, final, _ = cotangents  # the info's is zero: its gradient is stopped
    given = given if how.every else (None,) * (how.cell.states - 1) + given
    reset = arrays[-1]
    none = None if reset is None else np.zeros(reset.shape, jax.dtypes.float0)
    return *_adjoint(how, arrays, *rest, given, final), none


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _adjoint(how: _How, arrays, states, borders, given, final):
    method, (u, weights, initial, reset) = how.find(), arrays
    known = u, weights, initial, reset, states
    if how.at is None:
        return method.adjoint(how.cell, *known, given, final)
    return over_devices.adjoint(method, how.at, how.cell, *known, borders, given, final)


_solve.defvjp(_forward, _backward)
# So that a call outside jit is compiled once and not each time.
_compiled = jax.jit(_solve, static_argnums=0, inline=True)


def _end_at(lengths: jax.Array, states: Arrays, initial: Arrays) -> tuple[Arrays, Arrays]:
    """States after each row's length are 0; its final state is the last one that counts."""
    time = states[0].shape[1]
    last = jnp.clip(lengths - 1, 0, time - 1)[:, None, None]
    final = tuple(
        jnp.where((lengths > 0)[:, None], jnp.take_along_axis(x, last, axis=1)[:, 0], h)
        for h, x in zip(initial, states, strict=True)
    )
    return tuple(jnp.where(inside(lengths, time)[..., None], x, 0) for x in states), final


class _Given(NamedTuple):
    """The arguments as arrays; `weights` `[R, D]` and `initial` are of the dtype to compute in."""

    u: jax.Array
    weights: jax.Array
    initial: Arrays
    reset: jax.Array | None
    lengths: jax.Array | None


def _checked(cell: Cell, u, weights, initial, reset, lengths) -> _Given:
    """Raises ValueError on arguments that do not fit. Where no step counts, u is zero."""
    name = cell.name
    u, *weights = (jnp.asarray(x) for x in (u, *weights))
    reset = None if reset is None else jnp.asarray(reset)
    if u.ndim != 4 or u.shape[2] != 3 or not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(
            f"{name}: u must be floating-point [batch, time, 3, width], got {u.dtype} {u.shape}"
        )
    if 0 in u.shape:
        raise ValueError(f"{name}: u has shape {u.shape}; batch, time and width must be at least 1")
    batch, time, _, width = u.shape
    named = dict(zip(("a", "peephole"), weights, strict=False))
    for (what, array), rows in zip(named.items(), (3, 2), strict=False):
        if array.shape != (rows, width) or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name}: {what} must be floating-point [{rows}, width] = {(rows, width)}, "
                f"got {array.dtype} {array.shape}"
            )
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != bool):
        raise ValueError(
            f"{name}: reset must be bool [batch, time] = {(batch, time)}, "
            f"got {reset.dtype} {reset.shape}"
        )
    u, lengths = cleared(name, u, lengths)
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    if initial is None:
        start: Arrays = ()
    else:
        start = tuple(map(jnp.asarray, initial if isinstance(initial, tuple | list) else [initial]))
        fits = [x.shape for x in start] == [(batch, width)] * cell.states
        if not fits or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in start):
            raise ValueError(
                f"{name}: initial_state must be {cell.states} x floating-point [batch, width] = "
                f"{(batch, width)}, got {[f'{x.dtype} {x.shape}' for x in start]}"
            )
        named |= {"initial_state": start}
    for what, arrays in ({"u": u} | named).items():
        _refuse_not_finite(f"{name}: {what}", arrays)
    # What is added is of u, so that all lie, or in a `shard_map` vary, over its devices: gradients
    # of what these have in common are then sums over them.
    zero = jnp.zeros_like(u[:, 0, 0], dtype)
    joined = jnp.concatenate([w.astype(dtype) for w in weights]) + jnp.zeros_like(u, dtype, ())
    start = tuple(x.astype(dtype) + zero for x in start) or (zero,) * cell.states
    return _Given(u, joined, start, reset, lengths)


def _refuse_not_finite(name: str, arrays: jax.Array | Arrays) -> None:
    """Raises ValueError if a number that is known before the run is not finite."""
    for x in jax.tree.leaves(arrays):
        if not isinstance(x, jax.core.Tracer):
            with jax.ensure_compile_time_eval():  # it may be a constant of a jitted function
                finite = jnp.isfinite(x)
                if bool(jnp.all(finite)):
                    continue
                at = np.unravel_index(int(jnp.argmin(finite)), x.shape)
                raise ValueError(
                    f"{name} has entries that are not finite; the first is {x[at]} at "
                    f"{tuple(map(int, at))}"
                )


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _report(name: str, method: str, info: SolveInfo) -> None:
    """Logs, at run time, that a method did not converge."""

    def log(converged, iterations, residual):
        if not converged:
            _log.warning(
                "%s: method %r did not converge in %d iterations (residual %.2g); "
                "see %s_with_info for its bounds and for falling back",
                name, method, iterations, residual, name,
            )  # fmt: skip

    lax.cond(
        info.converged,
        lambda: None,
        lambda: jax.debug.callback(log, info.converged, info.iterations, info.residual),
    )
