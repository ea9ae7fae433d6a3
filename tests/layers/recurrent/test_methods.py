"""One suite for all methods of `recurrent.gru` and `recurrent.lstm`: values, gradients, carried
states, resets, lengths, dtypes, odd sizes.

Where each acceptance check of the recurrences is:

| # | check | test |
|---|---|---|
| 1 | Jacobians are those of autodiff | test_cells: test_jacobian_is_that_of_autodiff |
| 2 | a linear cell takes one iteration | test_newton_scan: test_linear_cell_takes_one_iteration |
| 3 | states against float64 | test_states_are_exact |
| 4 | error after k Newton steps | test_newton: test_error_after_few_iterations |
| 5 | causality | test_newton: test_iteration_k_makes_k_states_exact |
| 6 | gradients of u, weights, initial state | test_gradients_are_exact, test_bfloat16_gradients |
|   | and of B, b, x | test_para_layers: test_layer_is_its_equations_with_gradients |
| 7 | cotangents of all states and the final one | test_gradients_are_exact |
| 8 | a carried state | test_two_calls_are_one |
| 9 | resets | test_reset_separates_documents, test_states_with_resets_are_exact |
| 10 | padding | test_what_follows_the_length_changes_nothing |
| 11 | sharded over time and channels | test_over_devices: test_devices_equal_one |
| 12 | bfloat16 | test_bfloat16_stores_and_float32_computes, test_bfloat16_gradients |
| 13 | large weights fall back | test_newton: test_large_weights_are_reported_and_fall_back |
| 14 | odd sizes | test_odd_sizes |
| 15 | linear recurrences | test_affine: test_signs_and_integers_are_exact, test_rotations_... |
| 16 | parity is learnt | tests/zoo/tasks/test_training.py: test_parity_... (slow) |
| 17 | equal loss curves | test_para_layers: test_loss_curves_of_all_methods_agree |
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers.recurrent.reference import (
    CELLS,
    METHODS,
    cotangents,
    draw,
    error,
    exact_gradients,
    gradients,
    relative_error,
    run,
    solve,
)

# Few shapes, each compiled once a method; shooting cuts the first into five segments.
WHOLE, HALF = (2, 320, 8), (2, 160, 8)
every_cell = pytest.mark.parametrize("cell", CELLS)
every_method = pytest.mark.parametrize(
    "method", [*METHODS, pytest.param("fused", marks=pytest.mark.gpu)]
)


def lengthy(time, method, size):
    """Newton's method is bound to its range of weights, and compiles for long at long times."""
    return [pytest.mark.slow] if method == "newton" and time > 2000 else []


@pytest.mark.parametrize(
    "method, time, size",
    [
        pytest.param(method, time, size, marks=lengthy(time, method, size))
        for method in METHODS
        for time in (1, 7, 128, 2048, 16384)
        for size in (0.02, 0.5, 0.9, 2)
        if method != "newton" or size < 1  # it need not converge there: see test_newton
    ]
    + [
        pytest.param("fused", time, size, marks=pytest.mark.gpu)
        for time in (1, 7, 128, 2048, 16384)
        for size in (0.02, 0.5, 0.9, 2)
    ],
)
@every_cell
def test_states_are_exact(cell, method, time, size):
    given = draw(cell, (1, time, 4), size)
    output, final = run(cell, method, *given)
    states, last = solve(cell, *given)
    assert error((output, final), (states[-1], last)) < 5e-6


@pytest.mark.parametrize("size", [0.9, 2])
@every_method
@every_cell
def test_states_with_resets_are_exact(cell, method, size):
    if method == "newton" and size > 1:
        pytest.skip("Newton's method need not converge at weights of 2: see test_newton")
    given = draw(cell, WHOLE, size, resets=True)
    assert given[-1].any()
    output, final = run(cell, method, *given)
    states, last = solve(cell, *given)
    assert error((output, final), (states[-1], last)) < 5e-6


@pytest.mark.parametrize("size", [0.5, 0.9])
@every_method
@every_cell
def test_gradients_are_exact(cell, method, size):
    """With random cotangents on every output and on the final state."""
    given, seeds = draw(cell, WHOLE, size, resets=True), cotangents(cell, WHOLE)
    # A first reset after some steps, so that the initial state counts.
    reset = given[-1].at[:, :5].set(False)
    got = gradients(cell, method, *given[:-1], reset, *seeds)
    want = exact_gradients(cell, *given[:-1], reset, *seeds)
    assert relative_error(got, want) < 1e-5
    assert all(np.max(np.abs(x)) > 1e-3 for x in jax.tree.leaves(want))


@every_method
@every_cell
def test_two_calls_are_one(cell, method):
    """The first half returns its state to the second, whose gradient of it goes back."""
    given, (of_output, of_final) = draw(cell, WHOLE, 0.9, resets=True), cotangents(cell, WHOLE)
    u, weights, initial, reset = given
    whole = run(cell, method, *given)
    first = run(cell, method, u[:, :160], weights, initial, reset[:, :160])
    second = run(cell, method, u[:, 160:], weights, first[1], reset[:, 160:])
    joined = jnp.concatenate([first[0], second[0]], axis=1), second[1]
    assert error(joined, whole) < 1e-6

    du, dweights, dinitial = gradients(cell, method, *given, of_output, of_final)
    last = gradients(
        cell, method, u[:, 160:], weights, first[1], reset[:, 160:], of_output[:, 160:], of_final
    )
    early = gradients(
        cell, method, u[:, :160], weights, initial, reset[:, :160], of_output[:, :160], last[2]
    )
    parts = jnp.concatenate([early[0], last[0]], axis=1), early[1] + last[1], early[2]
    assert relative_error(parts, (du, dweights, dinitial)) < 1e-6


@every_method
@every_cell
def test_reset_separates_documents(cell, method):
    given, (of_output, of_final) = draw(cell, WHOLE, 0.9), cotangents(cell, WHOLE)
    u, weights, initial, _ = given
    cut = jnp.zeros(WHOLE[:2], bool).at[:, 160].set(True)
    zeros = jax.tree.map(jnp.zeros_like, initial)
    none = jnp.zeros(HALF[:2], bool)
    packed = run(cell, method, u, weights, initial, cut)
    alone = [
        run(cell, method, u[:, :160], weights, initial, none),
        run(cell, method, u[:, 160:], weights, zeros, none),
    ]
    joined = jnp.concatenate([output for output, _ in alone], axis=1), alone[1][1]
    assert error(packed, joined) <= (0 if method == "scan" else 1e-6)

    # What follows the reset sends nothing back across it.
    late = of_output.at[:, :160].set(0)
    du, _, dinitial = gradients(cell, method, u, weights, initial, cut, late, of_final)
    assert not np.any(du[:, :160]) and not any(np.any(x) for x in dinitial)
    assert np.any(du[:, 160])


@every_method
@every_cell
def test_what_follows_the_length_changes_nothing(cell, method):
    u, weights, initial, reset = draw(cell, HALF, 0.9, resets=True)
    lengths = jnp.asarray([160 - 23, 0])
    reset = reset.at[:, :5].set(False)
    inside = jnp.arange(160) < lengths[:, None]
    garbage = 1e4 * jax.random.normal(jax.random.key(3), u.shape)
    garbage = garbage.at[:, 150:].set(jnp.nan)
    both = [jnp.where(inside[..., None, None], u, x) for x in (0.0, garbage)]
    one, other = (run(cell, method, x, weights, initial, reset, lengths) for x in both)
    assert error(one, other) == 0
    states, _ = solve(cell, u, weights, initial, reset)
    assert error(one[0][0, :137], states[-1][0, :137]) < 5e-6
    assert not np.any(one[0][0, 137:]) and not np.any(one[0][1])
    for final, state, start in zip(one[1], states, initial, strict=True):
        assert error(final[0], state[0, 136]) < 5e-6
        np.testing.assert_array_equal(final[1], start[1])

    seeds = cotangents(cell, HALF)
    one, other = (
        gradients(cell, method, x, weights, initial, reset, *seeds, lengths) for x in both
    )
    assert relative_error(one, other) == 0
    assert not np.any(one[0][~inside]) and np.any(one[0][0, 136])
    cut = (jnp.where(inside[..., None], seeds[0], 0)[:1, :137], [x[:1] for x in seeds[1]])
    want = exact_gradients(
        cell, u[:1, :137], weights, tuple(x[:1] for x in initial), reset[:1, :137], *_tuples(cut)
    )
    assert relative_error((one[0][:1, :137], one[1]), want[:2]) < 1e-5
    for x, g in zip(one[2], seeds[1], strict=True):
        np.testing.assert_array_equal(x[1], g[1])


def _tuples(seeds):
    return seeds[0], tuple(seeds[1])


@every_method
@every_cell
def test_bfloat16_stores_and_float32_computes(cell, method):
    u, *rest = draw(cell, HALF, 0.9, resets=True, dtype=jnp.bfloat16)
    output, final = run(cell, method, u, *rest)
    wide, wide_final = run(cell, method, u.astype(jnp.float32), *rest)
    assert output.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in final)
    # On a GPU, `fused` has the hardware's tanh for bfloat16.
    coarse = method == "fused" and jax.default_backend() == "gpu"
    assert error(final, wide_final) <= (2e-5 if coarse else 1e-6)
    # At most the neighbouring bfloat16, and nearly always the same.
    gap = np.abs(np.asarray(output, np.float64) - np.asarray(wide.astype(jnp.bfloat16), np.float64))
    allowed = 2**-7 * np.abs(np.asarray(wide)) + (2e-5 if coarse else 0)
    assert np.all(gap <= allowed) and np.mean(gap > 0) < (5e-2 if coarse else 1e-2)


@every_method
@every_cell
def test_bfloat16_gradients(cell, method):
    given, seeds = draw(cell, HALF, 0.9, resets=True, dtype=jnp.bfloat16), cotangents(cell, HALF)
    got = gradients(cell, method, *given, *seeds)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    want = exact_gradients(cell, *given, *seeds)
    assert relative_error(got, want) < 2e-2


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 130), (3, 7, 130), (1, 67, 3)], ids=str)
@every_method
@every_cell
def test_odd_sizes(cell, method, shape):
    given, seeds = draw(cell, shape, 0.9), cotangents(cell, shape)
    states, last = solve(cell, *given)
    assert error(run(cell, method, *given), (states[-1], last)) < 5e-6
    got = gradients(cell, method, *given, *seeds)
    assert relative_error(got, exact_gradients(cell, *given, *seeds)) < 1e-5


@every_cell
def test_no_initial_state_is_zero_and_no_method_is_some_method(cell):
    u, weights, initial, _ = draw(cell, (2, 7, 3), 0.9)
    zeros = jax.tree.map(jnp.zeros_like, initial)
    got = run(cell, None, u, weights, None)
    states, last = solve(cell, u, weights, zeros)
    assert error(got, (states[-1], last)) < 5e-6
