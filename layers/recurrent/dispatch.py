"""The public recurrences: check the arguments, choose a method, run it, differentiate it."""

import functools
import logging
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hackle.layers.recurrent import fused_gpu, fused_tpu, newton, over_devices, scan, shooting
from hackle.layers.recurrent.cells import GRU, LSTM, Arrays, Block, Cell
from hackle.layers.recurrent.newton import SolveInfo

_log = logging.getLogger("hackle")

METHODS = ("scan", "newton", "shooting", "fused")
_ITERATIVE = {"newton": newton, "shooting": shooting}
_FUSED = {"gpu": fused_gpu, "tpu": fused_tpu}
# What was measured to be fastest where there is no fused kernel. On a CPU a step is cheap, and all
# other methods do more work; on a GPU a step of a loop is a few launches, about 20 us.
_WITHOUT_KERNEL = {"cpu": "scan"}


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
    return states[1], (final[0], final[1]), info


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
    at = over_devices.placement(u)
    if at is not None and asked != Options():
        raise NotImplementedError(f"{cell.name}: over a mesh {method!r} takes no {asked}")
    states, final, info = _solve(cell, method, asked, at, every, u, joined, initial, reset)
    if options is None and method in _ITERATIVE:
        _report(cell.name, method, info)
    if lengths is not None:
        states, final = _end_at(lengths, states, initial, final)
    return (states if every else (None,) * (cell.states - 1) + states), final, info


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _solve(cell, method, options, at, every, u, weights, initial, reset):
    return _forward(cell, method, options, at, every, u, weights, initial, reset)[0]


def _forward(cell, method, options, at, every, u, weights, initial, reset):
    arrays = (u, weights, initial, reset)
    products: Block = ()
    if at is not None:
        states, final, products, gap = over_devices.solve(_module(method), at, cell, *arrays)
        info = _examined(cell, arrays, states, gap <= shooting.TOLERANCE)
    elif method in _ITERATIVE:
        states, final, info = _iterated(_ITERATIVE[method], cell, options, arrays)
    else:
        states, final = _module(method).solve(cell, *arrays)
        info = _examined(cell, arrays, states, True)
    out = (states if every else states[-1:]), final, info
    return out, (*arrays, states, products)


def _iterated(module, cell, options: Options, arrays) -> tuple[Arrays, Arrays, SolveInfo]:
    states, final, info = module.solve_with_info(
        cell, *arrays, tolerance=options.tolerance, max_iterations=options.max_iterations
    )
    if options.fallback:
        states, final = lax.cond(
            info.converged, lambda: (states, final), lambda: scan.solve(cell, *arrays)
        )
    return states, final, info


def _examined(cell, arrays, states: Arrays, converged) -> SolveInfo:
    u, weights, initial, reset = arrays
    return newton.examine(
        cell, u, weights, initial, reset, states,
        iterations=jnp.zeros((), jnp.int32), converged=converged,
    )  # fmt: skip


def _backward(cell, method, options, at, every, kept, cotangents):
    u, weights, initial, reset, states, products = kept
    given, final, _ = cotangents
    given = given if every else (None,) * (cell.states - 1) + given
    module = _module(method)
    if at is None:
        gradients = module.adjoint(cell, u, weights, initial, reset, states, given, final)
    else:
        gradients = over_devices.adjoint(
            module, at, cell, u, weights, initial, reset, states, products, given, final
        )
    return *gradients, None if reset is None else np.zeros(reset.shape, jax.dtypes.float0)


_solve.defvjp(_forward, _backward)


def _module(method: str) -> ModuleType:
    if method == "fused":
        return _FUSED[jax.default_backend()]
    return {"scan": scan, **_ITERATIVE}[method]


def _end_at(
    lengths: jax.Array, states: Arrays, initial: Arrays, final: Arrays
) -> tuple[Arrays, Arrays]:
    """States after each row's length are 0; its final state is the last one that counts."""
    time = states[0].shape[1]
    inside = jnp.arange(time) < lengths[:, None]
    last = jnp.clip(lengths - 1, 0, time - 1)[:, None, None]
    # Of a row that counts to its end the final state is the one that was not rounded for storage.
    none, whole = (lengths <= 0)[:, None], (lengths >= time)[:, None]
    inner = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in states)
    final = tuple(
        jnp.where(none, h, jnp.where(whole, f, x.astype(f.dtype)))
        for h, f, x in zip(initial, final, inner, strict=True)
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
    platform = jax.default_backend()
    fused = _FUSED.get(platform)
    reason = f"there is no fused kernel for {platform}" if fused is None else fused.unsupported(u)
    if method is None:
        method = "fused" if reason is None else _WITHOUT_KERNEL.get(platform, "shooting")
        _say_once(method, reason or "")
    elif method not in METHODS:
        raise ValueError(f"unknown method {method!r} of a recurrence; expected one of {METHODS}")
    elif method == "fused" and reason is not None:
        raise NotImplementedError(f"method 'fused' of a recurrence: {reason}")
    return method


@functools.cache
def _say_once(method: str, reason: str) -> None:
    _log.info("recurrence: chose %r%s", method, f" ({reason})" if reason else "")


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
