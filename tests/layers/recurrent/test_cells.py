"""One step of each cell: its value, Jacobian and gradients, against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers.recurrent import cells
from tests.layers.recurrent.reference import CELLS, ROWS, STATES, STEPS, relative_error

OURS = {"gru": cells.GRU(), "lstm": cells.LSTM()}


def autodiff(cell, state, u, weights):
    """Of the equations in `reference.py`, one channel at a time: the state after, and its
    derivatives with respect to state, u and weights, `[channels, N, N | 3 | R]`."""

    def one(state, u, weights):
        after = STEPS[cell](tuple(state[:, None, None]), u[None, :, None], weights[:, None])
        return jnp.stack(after)[:, 0, 0]

    each = jax.vmap(one)(state, u, weights)
    return each, *(jax.vmap(jax.jacfwd(one, k))(state, u, weights) for k in range(3))


@pytest.mark.parametrize("size", [0.1, 1, 5])
@pytest.mark.parametrize("cell", CELLS)
def test_jacobian_is_that_of_autodiff(cell, size):
    ours, n, rng = OURS[cell], STATES[cell], np.random.default_rng(0)
    channels = 500
    with jax.enable_x64(True):
        state = jnp.asarray(rng.uniform(-1, 1, (channels, n)))
        u = jnp.asarray(2 * rng.normal(size=(channels, 3)))
        weights = jnp.asarray(size * rng.normal(size=(channels, ROWS[cell])))
        after, to_state, to_u, to_weights = autodiff(cell, state, u, weights)
        columns = tuple(state.T), tuple(u.T), tuple(weights.T)
        # One at a time: `[channels, row, column]` of an N x N block of arrays.
        stack = lambda block: jnp.stack([jnp.stack(row) for row in block]).transpose(2, 0, 1)
        linear, jacobian = ours.linearize(*columns)
        again, local = ours.local_gradients(*columns)
        for got in (ours.step(*columns), linear):
            assert relative_error(jnp.stack(got, 1), after) < 1e-10
        for got in (jacobian, again):
            assert relative_error(stack(got), to_state) < 1e-10
        assert relative_error(stack(local), to_u) < 1e-10
        # The chain of the backward pass: cotangent of the state to u, and from there to weights.
        lam = jnp.asarray(rng.normal(size=(channels, n)))
        du = cells.apply(cells.transposed(local), tuple(lam.T))
        dweights = ours.weight_gradients(columns[0], linear, columns[1], columns[2], du)
        want = jnp.einsum("di,dir->dr", lam, to_weights)
        assert relative_error(jnp.stack(dweights, 1), want) < 1e-10
        assert to_state.dtype == jnp.float64


@pytest.mark.parametrize("cell", CELLS)
def test_states_stay_within_one(cell):
    ours, rng = OURS[cell], np.random.default_rng(0)
    draw = lambda scale, rows: tuple(jnp.asarray(scale * rng.normal(size=(rows, 1000))))
    state = tuple(jnp.clip(x, -1, 1) for x in draw(1, ours.states))
    for _ in range(20):
        state = ours.step(state, draw(10, 3), draw(10, ours.weights))
        assert all(np.max(np.abs(x)) <= 1 for x in state)
