"""The suite can fail: mistakes that are easily made, each one put in and seen by its measures.

Every mutation changes one line of the layers for the length of a test, and the error of states or
of gradients against float64 is then far above what the suite allows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers.recurrent import affine, cells, newton, scan, shooting
from tests.layers.recurrent.reference import (
    CELLS,
    METHODS,
    call,
    cotangents,
    draw,
    error,
    exact_gradients,
    relative_error,
    solve,
)

SHAPE = (1, 12, 4)
FAR = 1e-2  # the suite allows 1e-5 and less


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr(shooting, "STEPS", 4)
    monkeypatch.setattr(shooting, "_BURN_IN", 1)


@pytest.fixture(autouse=True)
def _compiled_anew():
    """What was compiled from other lines serves no test here, and what is here no other."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def errors(cell, method):
    """Of states and of gradients, all compiled anew."""
    u, weights, initial, reset = draw(cell, SHAPE, 0.9)
    reset = jnp.zeros(SHAPE[:2], bool).at[0, 7].set(True)
    seeds = cotangents(cell, SHAPE)

    @jax.jit
    def both(u, weights, initial):
        out, pull = jax.vjp(lambda *given: call(cell, method, *given, reset), u, weights, initial)
        return out, pull(seeds)

    out, gradients = both(u, weights, initial)
    states, last = solve(cell, u, weights, initial, reset)
    exact = exact_gradients(cell, u, weights, initial, reset, *seeds)
    return error(out, (states[-1], last)), relative_error(gradients, exact)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_wrong_to_begin_with(cell, method):
    states, gradients = errors(cell, method)
    assert states < 5e-6 and gradients < 1e-5


def _swapped(step):
    """The first two gates read each other's pre-activations."""
    return lambda self, state, u, weights: step(self, state, (u[1], u[0], u[2]), weights)


def _flipped(step):
    """`h' = z h + (1 - z) c`."""
    return lambda self, state, u, weights: step(self, state, (-u[0], *u[1:]), weights)


@pytest.mark.parametrize("wrong", [_swapped, _flipped])
@pytest.mark.parametrize("cell", [cells.GRU, cells.LSTM])
def test_order_and_sense_of_gates(cell, wrong, monkeypatch):
    monkeypatch.setattr(cell, "step", wrong(cell.step))
    assert errors(cell.name, "scan")[0] > FAR


def test_state_order(monkeypatch):
    step = cells.LSTM.step
    monkeypatch.setattr(cells.LSTM, "step", lambda *given: step(*given)[::-1])
    assert errors("lstm", "scan")[0] > FAR


def test_jacobian_of_the_wrong_step(monkeypatch):
    """The adjoint takes J_t where J_(t+1) belongs."""

    def late(jacobian, rhs, axis):
        flipped = jax.tree.map(lambda x: jnp.flip(x, axis), (affine.transposed(jacobian), rhs))
        return tuple(jnp.flip(x, axis) for x in affine.solve(*flipped, axis))

    monkeypatch.setattr(affine, "solve_transposed", late)
    assert errors("gru", "newton")[1] > FAR


def test_jacobian_not_transposed(monkeypatch):
    monkeypatch.setattr(affine, "transposed", lambda matrix: matrix)
    assert errors("lstm", "newton")[1] > FAR


def test_jacobians_composed_backwards(monkeypatch):
    compose = cells.compose
    monkeypatch.setattr(cells, "compose", lambda second, first: compose(first, second))
    assert errors("lstm", "newton")[1] > FAR


def test_gradient_through_a_reset(monkeypatch):
    monkeypatch.setattr(newton, "_cut", lambda jacobian, keep: jacobian)
    assert errors("gru", "newton")[1] > FAR


def test_reset_without_effect(monkeypatch):
    monkeypatch.setattr(scan, "_kept", lambda state, keep: state)
    assert errors("gru", "scan")[0] > FAR


def test_reset_one_step_late(monkeypatch):
    solve_ = scan.solve
    late = lambda cell, u, weights, initial, reset: solve_(
        cell, u, weights, initial, jnp.roll(reset, 1, 1)
    )
    monkeypatch.setattr(scan, "solve", late)
    assert errors("gru", "scan")[0] > FAR


def test_initial_state_without_effect(monkeypatch):
    shifted = affine.shifted
    monkeypatch.setattr(
        affine,
        "shifted",
        lambda initial, *rest: shifted(jax.tree.map(jnp.zeros_like, initial), *rest),
    )
    assert errors("gru", "newton")[0] > FAR


def test_adjoint_from_the_first_guess(monkeypatch):
    """Jacobians at `f(0, x_t)` instead of the states."""
    adjoint = newton.adjoint

    def early(cell, u, weights, initial, reset, states, *cotangents):
        rows = tuple(u[:, :, k] for k in range(3))
        guess = cell.step(tuple(map(jnp.zeros_like, states)), rows, tuple(weights))
        return adjoint(cell, u, weights, initial, reset, guess, *cotangents)

    monkeypatch.setattr(newton, "adjoint", early)
    assert errors("gru", "newton")[1] > FAR


def test_segments_not_corrected(monkeypatch):
    """One pass, from entries that nobody compares with the ends."""
    zero = lambda ends, entries: jnp.zeros(())
    monkeypatch.setattr(shooting, "_disagreement", zero)
    assert errors("gru", "shooting")[0] > 1e-3


def test_a_state_kept_in_bfloat16(monkeypatch):
    step = cells.GRU.step
    monkeypatch.setattr(
        cells.GRU,
        "step",
        lambda self, state, *rest: step(
            # To bfloat16 and back would be dropped by XLA on a GPU.
            self,
            tuple(jax.lax.reduce_precision(x, 8, 7) for x in state),
            *rest,
        ),
    )
    assert errors("gru", "scan")[0] > 1e-4


def test_not_a_number_fails_every_measure():
    nan = np.asarray([0.0, np.nan])
    assert not error(nan, np.zeros(2)) < 1e30 and not relative_error(np.zeros(2), nan) < 1e30
