"""The recurrences once more: their equations, step by step in float64 on the CPU, and JAX's own
derivative of that loop. Shares no code with `hackle.layers`; `test_against_torch.py` holds it
against the cells of PyTorch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hackle.layers import recurrent

CELLS = ("gru", "lstm")
# The rows of a cell's weights (state matrix, then peepholes), and the arrays of its state.
ROWS = {"gru": 3, "lstm": 5}
STATES = {"gru": 1, "lstm": 2}
METHODS = ("scan", "newton", "shooting")


def draw(cell, shape, size, *, seed=0, resets=False, spread=1.0, dtype=jnp.float32):
    """`(u, weights, initial, reset)`; weights are +-size, pre-activations N(0, spread^2)."""
    batch, time, width = shape
    rng = np.random.default_rng(seed)
    u = jnp.asarray(spread * rng.normal(size=(batch, time, 3, width)), dtype)
    weights = jnp.asarray(size * rng.choice([-1.0, 1.0], size=(ROWS[cell], width)), jnp.float32)
    initial = tuple(
        jnp.asarray(rng.uniform(-0.9, 0.9, (batch, width)), jnp.float32)
        for _ in range(STATES[cell])
    )
    reset = jnp.asarray(rng.random((batch, time)) < 0.05) if resets else None
    return u, weights, initial, reset


def cotangents(cell, shape, *, seed=1):
    """Random ones: of the output `[B, T, D]`, and of each final state `[B, D]`."""
    batch, time, width = shape
    rng = np.random.default_rng(seed)
    of_output = jnp.asarray(rng.normal(size=(batch, time, width)), jnp.float32)
    of_final = tuple(
        jnp.asarray(rng.normal(size=(batch, width)), jnp.float32) for _ in range(STATES[cell])
    )
    return of_output, of_final


# What is tested, both cells with one signature.


def call(cell, method, u, weights, initial, reset=None, lengths=None):
    """The public function: `(output, final states)`."""
    options = {"reset": reset, "lengths": lengths, "method": method}
    if cell == "gru":
        h, final = recurrent.gru(u, weights, *(initial or ()), **options)
        return h, (final,)
    return recurrent.lstm(u, weights[:3], weights[3:], initial, **options)


def call_with_info(cell, method, u, weights, initial, reset=None, **options):
    if cell == "gru":
        h, final, info = recurrent.gru_with_info(
            u, weights, *(initial or ()), reset=reset, method=method, **options
        )
        return h, (final,), info
    return recurrent.lstm_with_info(
        u, weights[:3], weights[3:], initial, reset=reset, method=method, **options
    )


run = jax.jit(call, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(cell, method, u, weights, initial, reset, of_output, of_final, lengths=None):
    """`(du, dweights, dinitial)` of the public function."""
    _, pull = jax.vjp(
        lambda u, weights, initial: call(cell, method, u, weights, initial, reset, lengths),
        u,
        weights,
        initial,
    )
    return pull((of_output.astype(u.dtype), of_final))


# What it is tested against.


def _gru(state, u, a):
    (h,) = state
    z = 1 / (1 + jnp.exp(-(u[:, 0] + a[0] * h)))
    r = 1 / (1 + jnp.exp(-(u[:, 1] + a[1] * h)))
    return ((1 - z) * h + z * jnp.tanh(u[:, 2] + a[2] * r * h),)


def _lstm(state, u, w):
    c, h = state
    f = 1 / (1 + jnp.exp(-(u[:, 0] + w[0] * h + w[3] * c)))
    c = f * c + (1 - f) * jnp.tanh(u[:, 2] + w[2] * h)
    o = 1 / (1 + jnp.exp(-(u[:, 1] + w[1] * h + w[4] * c)))
    return c, o * jnp.tanh(c)


STEPS = {"gru": _gru, "lstm": _lstm}


@functools.partial(jax.jit, static_argnums=0)
def _loop(cell, u, weights, initial, reset):
    def step(state, x):
        row, cut = x
        state = tuple(jnp.where(cut[:, None], 0, s) for s in state)
        state = STEPS[cell](state, row, weights)
        return state, state

    final, states = lax.scan(step, initial, (jnp.swapaxes(u, 0, 1), reset.T))
    return tuple(jnp.swapaxes(x, 0, 1) for x in states), final


@functools.partial(jax.jit, static_argnums=0)
def _loop_gradients(cell, u, weights, initial, reset, of_output, of_final):
    def run(u, weights, initial):
        states, final = _loop(cell, u, weights, initial, reset)
        return states[-1], final

    return jax.vjp(run, u, weights, initial)[1]((of_output, of_final))


def _doubles(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _in_doubles(function, cell, u, weights, initial, reset, *more):
    reset = np.zeros(u.shape[:2], bool) if reset is None else np.asarray(reset)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        out = function(cell, *_doubles((u, weights, initial)), reset, *_doubles(more))
        return jax.tree.map(np.asarray, out)


def solve(cell, u, weights, initial, reset=None):
    """Float64: all states `[B, T, D]`, and those after the last step."""
    return _in_doubles(_loop, cell, u, weights, initial, reset)


def exact_gradients(cell, u, weights, initial, reset, of_output, of_final):
    """Float64: `(du, dweights, dinitial)`, by autodiff through the loop."""
    return _in_doubles(_loop_gradients, cell, u, weights, initial, reset, of_output, of_final)


def error(got, want):
    """The largest difference, over all arrays of two trees."""
    pairs = zip(jax.tree.leaves(_doubles(got)), jax.tree.leaves(_doubles(want)), strict=True)
    return max(_largest(x, y) for x, y in pairs)


def relative_error(got, want):
    """The largest difference in units of the array's largest number, over all arrays."""
    pairs = zip(jax.tree.leaves(_doubles(got)), jax.tree.leaves(_doubles(want)), strict=True)
    return max(_largest(x, y) / max(np.max(np.abs(y)), 1e-30) for x, y in pairs)


def _largest(x, y):
    assert x.shape == y.shape, (x.shape, y.shape)
    gap = np.max(np.abs(x - y))
    return np.inf if np.isnan(gap) else gap  # so that a NaN fails every bound
