"""The public recurrences: check the arguments, choose a method, run it, differentiate it."""

import functools
import logging
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hackle.layers.recurrent import fused_gpu, newton, scan, shooting
from hackle.layers.recurrent.cells import GRU, LSTM, Arrays, Cell
from hackle.layers.recurrent.newton import SolveInfo

_log = logging.getLogger("hackle")

METHODS = ("scan", "newton", "shooting", "fused")
_ITERATIVE = {"newton": newton, "shooting": shooting}


class Options(NamedTuple):
    """What an iterative method may be told; see `gru_with_info`."""

    tolerance: float | None = None
    max_iterations: int | None = None
    fallback: bool = False


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

    Differentiable in u, a and the initial state. Computed in float32 (float64 if u is).

    Args:
      u: pre-activations `[B, T, 3, D]`, in the order z, r, c; float32 or bfloat16 (or float64).
      a: state weights `[3, D]`, in the same order.
      initial_state: `[B, D]`; None is zero.
      reset: bool `[B, T]`: true zeroes the state before that step, e.g. where a packed document
        begins.
      lengths: int `[B]`: steps of each row that count. States after them are 0, and the final
        state is the one at the row's last step.
      method: "scan" (one step after the other), "newton" (all times at once), "shooting"
        (segments at once), "fused" (one kernel, on chips that have one) runs exactly that or
        raises. None picks what was measured to be fastest on the default device, and logs the
        choice once. "newton" and "shooting" log a warning if they do not converge.

    Returns:
      `(states [B, T, D] in the dtype of u, final state [B, D] float32)`.

    Raises:
      ValueError: shapes or dtypes do not fit, T is 0, the method is unknown, or (outside jit) a
        pre-activation is not finite.
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
    return states[1], final


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
    """As `gru`, and how the method ended; `info.converged` is false where numbers are not finite.

    Args:
      tolerance, max_iterations: of "newton" and "shooting"; None is their own choice. With
        tolerance 0, Newton's method takes exactly `max_iterations` steps.
      fallback: where the method did not converge, go step by step instead.

    Raises:
      ValueError: also if a method that does not iterate is given a tolerance or a bound.
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
    return states[1], final, info


def _run(
    cell: Cell,
    u: jax.Array,
    weights: tuple[jax.Array, ...],
    initial: jax.Array | tuple[jax.Array, ...] | None,
    reset: jax.Array | None,
    lengths: jax.Array | None,
    method: str | None,
    options: Options | None,
) -> tuple[Arrays, Arrays, SolveInfo]:
    """`options` None: nobody looks at the info, so that trouble is logged."""
    initial = _checked(cell, u, weights, initial, reset, lengths)
    method = _choose(method, u)
    asked = options or Options()
    if method not in _ITERATIVE and asked != Options():
        raise ValueError(f"{cell.name}: method {method!r} does not iterate; it takes no {asked}")
    if asked.max_iterations is not None and asked.max_iterations < 1:
        raise ValueError(f"{cell.name}: max_iterations={asked.max_iterations}; expected at least 1")
    joined = jnp.concatenate([w.astype(initial[0].dtype) for w in weights])
    # Only the last array of a state leaves the layer, unless final states are read from them all.
    every = lengths is not None
    states, final, info = _solve(cell, method, asked, every, u, joined, initial, reset)
    if options is None and method in _ITERATIVE:
        _report(cell.name, method, info)
    if lengths is not None:
        states, final = _end_at(lengths, states, initial)
    return (states if every else (None,) * (cell.states - 1) + states), final, info


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _solve(cell, method, options, every, u, weights, initial, reset):
    states, final, info = _solve_all(cell, method, options, u, weights, initial, reset)
    return (states if every else states[-1:]), final, info


def _solve_all(cell, method, options, u, weights, initial, reset):
    if method not in _ITERATIVE:
        module = _module(method)
        states, final = module.solve(cell, u, weights, initial, reset)
        info = newton.examine(
            cell, u, weights, initial, reset, states,
            iterations=jnp.zeros((), jnp.int32), converged=True,
        )  # fmt: skip
        return states, final, info
    states, final, info = _ITERATIVE[method].solve_with_info(
        cell, u, weights, initial, reset,
        tolerance=options.tolerance, max_iterations=options.max_iterations,
    )  # fmt: skip
    if options.fallback:
        states, final = lax.cond(
            info.converged,
            lambda: (states, final),
            lambda: scan.solve(cell, u, weights, initial, reset),
        )
    return states, final, info


def _forward(cell, method, options, every, u, weights, initial, reset):
    states, final, info = _solve_all(cell, method, options, u, weights, initial, reset)
    kept = (u, weights, initial, reset, states)
    return ((states if every else states[-1:]), final, info), kept


def _backward(cell, method, options, every, kept, cotangents):
    u, weights, initial, reset, states = kept
    given, final, _ = cotangents
    given = given if every else (None,) * (cell.states - 1) + given
    du, dweights, dinitial = _module(method).adjoint(
        cell, u, weights, initial, reset, states, given, final
    )
    dreset = None if reset is None else np.zeros(reset.shape, jax.dtypes.float0)
    return du, dweights, dinitial, dreset


_solve.defvjp(_forward, _backward)


def _module(method: str) -> ModuleType:
    return fused_gpu if method == "fused" else {"scan": scan, **_ITERATIVE}[method]


def _end_at(lengths: jax.Array, states: Arrays, initial: Arrays) -> tuple[Arrays, Arrays]:
    """States after each row's length are 0; its final state is the last one that counts."""
    inside = jnp.arange(states[0].shape[1]) < lengths[:, None]
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    final = tuple(
        jnp.where(
            lengths[:, None] > 0, jnp.take_along_axis(x, last, axis=1)[:, 0].astype(h.dtype), h
        )
        for x, h in zip(states, initial, strict=True)
    )
    return tuple(jnp.where(inside[..., None], x, 0) for x in states), final


def _checked(
    cell: Cell,
    u: jax.Array,
    weights: tuple[jax.Array, ...],
    initial: jax.Array | tuple[jax.Array, ...] | None,
    reset: jax.Array | None,
    lengths: jax.Array | None,
) -> Arrays:
    """Raises ValueError on arguments that do not fit; returns the initial state."""
    name = cell.name
    if u.ndim != 4 or u.shape[2] != 3 or not jnp.issubdtype(u.dtype, jnp.floating):
        raise ValueError(
            f"{name}: u must be floating-point [batch, time, 3, width], got {u.dtype} {u.shape}"
        )
    batch, time, _, width = u.shape
    if 0 in u.shape:
        raise ValueError(f"{name}: u has shape {u.shape}; batch, time and width must be at least 1")
    for what, array, rows in zip(("a", "peephole"), weights, (3, 2), strict=False):
        if array.shape != (rows, width):
            raise ValueError(
                f"{name}: {what} must be [{rows}, width] = {(rows, width)}, got {array.shape}"
            )
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != bool):
        raise ValueError(
            f"{name}: reset must be bool [batch, time] = {(batch, time)}, "
            f"got {reset.dtype} {reset.shape}"
        )
    if lengths is not None and (
        lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer)
    ):
        raise ValueError(
            f"{name}: lengths must be integers [batch] = {(batch,)}, "
            f"got {lengths.dtype} {lengths.shape}"
        )
    if not isinstance(u, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(u))):
        raise ValueError(f"{name}: u has entries that are not finite")
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    if initial is None:
        return tuple(jnp.zeros((batch, width), dtype) for _ in range(cell.states))
    arrays = initial if isinstance(initial, tuple | list) else (initial,)
    if [jnp.shape(x) for x in arrays] != [(batch, width)] * cell.states:
        raise ValueError(
            f"{name}: initial_state must be {cell.states} x [batch, width] = {(batch, width)}, "
            f"got {[jnp.shape(x) for x in arrays]}"
        )
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _choose(method: str | None, u: jax.Array) -> str:
    if method is None:
        method = "scan"
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} of a recurrence; expected one of {METHODS}")
    reason = fused_gpu.unsupported(u) if method == "fused" else None
    if reason is not None:
        raise NotImplementedError(f"method {method!r} of a recurrence: {reason}")
    return method


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
