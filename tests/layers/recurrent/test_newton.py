"""Newton's method on the two cells: how fast it converges, what it says of itself, falling back."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers import recurrent
from hackle.layers.recurrent import cells, newton, newton_scan
from tests.layers.recurrent.reference import (
    CELLS,
    STEPS,
    call,
    call_with_info,
    draw,
    error,
    exact_gradients,
    gradients,
    relative_error,
    run,
    solve,
)

OURS = {"gru": cells.GRU(), "lstm": cells.LSTM()}
every_cell = pytest.mark.parametrize("cell", CELLS)


@functools.partial(jax.jit, static_argnums=0)
def steps(cell, u, weights, initial, count):
    """States after so many Newton steps, and the info; the count is traced."""
    states, _, progress = newton.solve(
        OURS[cell], u, weights, initial, None, tolerance=0.0, max_iterations=count
    )
    return states, newton.examine(OURS[cell], u, weights, initial, None, states, progress)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="fallback")
def with_info(cell, method, *given, fallback=False):
    return call_with_info(cell, method, *given, fallback=fallback)


def from_zero(cell, size, time=320, width=64):
    u, weights, initial, _ = draw(cell, (1, time, width), size)
    return u, weights, jax.tree.map(jnp.zeros_like, initial)


@pytest.mark.parametrize(
    "cell, size, count, bound",
    [
        ("gru", 0.5, 3, 5e-5),
        ("gru", 0.5, 4, 1e-6),
        ("gru", 0.9, 5, 1e-6),
        ("lstm", 0.5, 3, 2e-4),
        ("lstm", 0.5, 4, 1e-6),
        ("lstm", 0.9, 5, 1e-6),
    ],
)
def test_error_after_few_iterations(cell, size, count, bound):
    given = from_zero(cell, size)
    want, _ = solve(cell, *given)
    assert error(steps(cell, *given, count)[0], want) < bound
    # One less is a good deal worse, so that it is Newton's method and not luck.
    assert error(steps(cell, *given, count - 2)[0], want) > 5 * bound


@every_cell
def test_iteration_k_makes_k_states_exact(cell):
    given = from_zero(cell, 2)
    want, _ = solve(cell, *given)
    for count in (1, 2, 3, 5):
        states, info = steps(cell, *given, count)
        head = [x[:, : count + 1] for x in states], [x[:, : count + 1] for x in want]
        assert error(*head) < 1e-6
        assert error(states, want) > 1e-2 and not info.converged  # the rest is not there yet
        assert int(info.iterations) == count


@every_cell
def test_info_is_what_it_says(cell):
    u, weights, initial = from_zero(cell, 0.9)
    states, info = steps(cell, u, weights, initial, 1)
    # Again in float64, from the states returned.
    rows, lines = np.asarray(u, np.float64), np.asarray(weights, np.float64)
    before = [
        np.concatenate([np.asarray(h)[:, None], np.asarray(x)[:, :-1]], 1).astype(np.float64)
        for h, x in zip(initial, states, strict=True)
    ]
    with jax.enable_x64(True):

        def step(before):
            flat = tuple(x.reshape(-1, x.shape[-1]) for x in before)
            return STEPS[cell](flat, jnp.asarray(rows.reshape(-1, *rows.shape[2:])), lines)

        after = step(before)
        residual = max(
            np.max(np.abs(a.reshape(x.shape) - np.asarray(x)))
            for a, x in zip(after, states, strict=True)
        )
        # Channel by channel the Jacobian has one entry for each pair of state arrays.
        columns = []
        for k in range(len(before)):
            ones = [np.full_like(x, float(i == k)) for i, x in enumerate(before)]
            columns.append(np.stack([np.asarray(x) for x in jax.jvp(step, (before,), (ones,))[1]]))
        matrices = np.moveaxis(np.stack(columns, 1), (0, 1), (-2, -1))
        radii = np.abs(np.linalg.eigvals(matrices)).max(-1)
    assert float(info.residual) == pytest.approx(residual, rel=1e-4) and residual > 1e-3
    # Of matrices the 64th power tells, up to a factor that is of the size of their condition.
    near = 1e-4 if cell == "gru" else 2e-2
    assert float(info.log_jacobian) == pytest.approx(np.log(radii).mean(), abs=near)


def test_log_jacobian_of_a_memory_and_of_a_dense_cell():
    """What an LSTM keeps is in one of its two numbers; a rotation has entries near 0."""
    u = jnp.zeros((1, 64, 3, 4)).at[:, :, 0].set(4.0)  # forget gates at 0.98
    states = (jnp.full((1, 4), 0.5), jnp.zeros((1, 4)))
    weights = jnp.zeros((3, 4)), jnp.zeros((2, 4))
    kept = recurrent.lstm_with_info(u, *weights, states, method="scan")[2]
    assert float(kept.log_jacobian) == pytest.approx(np.log(jax.nn.sigmoid(4.0)), abs=2e-2)
    angle = 1.5
    turn = 1.2 * jnp.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    info = newton_scan(lambda h, x: turn @ h + x, jnp.zeros((9, 2)), jnp.ones(2), jacobian="dense")[
        1
    ]
    assert float(info.log_jacobian) == pytest.approx(np.log(1.2), abs=1e-2)


def test_log_jacobian_is_negative_where_the_past_is_forgotten():
    forgets = with_info("gru", "scan", *from_zero("gru", 0.5), None)[2]
    u, weights, initial = from_zero("gru", 0.5)
    slow = u.at[:, :, 0].add(-3)  # update gates nearly closed
    keeps = with_info("gru", "scan", slow, weights, initial, None)[2]
    assert float(forgets.log_jacobian) < -0.5 < -0.15 < float(keeps.log_jacobian) < 0


@pytest.mark.parametrize("method", ["scan", "newton", "shooting"])
@every_cell
def test_small_weights_converge(cell, method):
    given = draw(cell, (2, 320, 8), 0.5, resets=True)
    output, final, info = with_info(cell, method, *given)
    states, last = solve(cell, *given)
    assert error((output, final), (states[-1], last)) < 5e-6
    assert bool(info.converged) and float(info.residual) < 1e-6
    assert int(info.iterations) in {"scan": [0], "newton": [3, 4, 5], "shooting": [1, 2, 3]}[method]


@every_cell
def test_large_weights_are_reported_and_fall_back(cell):
    given = (*from_zero(cell, 5, width=16), None)
    plain, _ = run(cell, "scan", *given)
    output, _, info = with_info(cell, "newton", *given)
    assert np.all(np.isfinite(output))
    assert not info.converged
    output, _, info = with_info(cell, "newton", *given, fallback=True)
    # The method itself did not converge; the residual is that of the states returned.
    assert not info.converged and float(info.residual) < 1e-6
    assert np.all(np.isfinite(output)) and error(output, plain) < 1e-5
    # Shooting ends by causality, whatever the weights.
    output, _, info = with_info(cell, "shooting", *given)
    assert bool(info.converged) and error(output, plain) < 1e-5


@every_cell
def test_shooting_is_exact_after_as_many_passes_as_segments(cell):
    """Weights that magnify the last bit of an entry by more than any number of steps forgets."""
    u, weights, initial, _ = draw(cell, (1, 1024, 64), 5)
    _, _, info = with_info(cell, "shooting", u, jnp.sign(weights) * 5, initial, None)
    assert bool(info.converged) and float(info.residual) < 1e-5


def test_fallback_has_the_gradients_of_its_own_states():
    """Weights at which Newton's method is stopped too early, and the recurrence is still tame."""
    given = draw("gru", (1, 64, 8), 2)
    seeds = jnp.ones((1, 64, 8)), (jnp.ones((1, 8)),)

    @jax.jit
    def pulled(u, weights, initial):
        def f(*given):
            return call_with_info("gru", "newton", *given, max_iterations=2, fallback=True)[:2]

        return jax.vjp(f, u, weights, initial)[1](seeds)

    want = exact_gradients("gru", *given, *seeds)
    assert relative_error(pulled(*given[:3]), want) < 1e-5
    assert relative_error(gradients("gru", "scan", *given, *seeds), want) < 1e-5


def test_bounds_are_kept():
    u, weights, initial = from_zero("gru", 0.5)
    for count in (1, 2):
        output, _, info = call_with_info(
            "gru", "newton", u, weights, initial, tolerance=0.0, max_iterations=count
        )
        assert int(info.iterations) == count and not info.converged
        assert error(output, steps("gru", u, weights, initial, count)[0][0]) < 1e-6
    loose = call_with_info("gru", "newton", u, weights, initial, tolerance=0.5)[2]
    assert int(loose.iterations) < int(with_info("gru", "newton", u, weights, initial, None)[2][0])


def test_a_row_is_projected_by_its_own_initial_state():
    """What another row starts from changes nothing, though these iterates leave [-1, 1]."""
    u, weights, _, _ = draw("gru", (2, 64, 8), 2)
    zero = jnp.zeros((2, 8))
    one, other = (
        call_with_info(
            "gru", "newton", u, weights, (zero.at[0].set(far),), tolerance=0.0, max_iterations=3
        )[0]
        for far in (0.5, 50.0)
    )
    np.testing.assert_array_equal(one[1], other[1])
    assert np.any(one[0] != other[0])
    (bound,) = newton.state_bound((jnp.asarray([[0.5, -3.0], [jnp.nan, 2.0]]),))
    np.testing.assert_array_equal(bound, [[1, 3], [1, 2]])


def test_an_initial_state_beyond_one_is_not_cut():
    """The projection of iterates reaches as far as the state that was given."""
    u, weights, initial, _ = draw("gru", (2, 320, 8), 0.5)
    initial = (3 * initial[0],)
    states, last = solve("gru", u - 3, weights, initial)
    assert np.max(np.abs(states[0])) > 1.5
    assert error(run("gru", "newton", u - 3, weights, initial, None), (states[-1], last)) < 5e-6


@pytest.mark.parametrize("method", ["newton", "shooting"])
def test_nobody_asking_is_told_by_the_log(method, caplog):
    u, weights, initial = from_zero("gru", 0.5, time=320, width=8)
    spoilt = u.at[0, 7, 0, 0].set(jnp.nan)
    with caplog.at_level(logging.WARNING, logger="hackle"):
        jax.block_until_ready(run("gru", method, u, weights, initial, None))
        jax.effects_barrier()
        assert not caplog.records
        jax.block_until_ready(run("gru", method, spoilt, weights, initial, None))
        jax.effects_barrier()
    (record,) = caplog.records
    assert f"gru: method '{method}' did not converge" in record.getMessage()
    assert "gru_with_info" in record.getMessage()


@pytest.mark.parametrize("method", ["scan", "newton", "shooting"])
def test_what_is_not_a_number_is_reported_inside_jit(method):
    u, weights, initial = from_zero("gru", 0.5, time=320, width=8)
    for bad in (np.nan, np.inf):
        spoilt = u.at[0, 7, 2, 3].set(bad)
        output, _, info = with_info("gru", method, spoilt, weights, initial, None)
        if np.isnan(bad):  # an infinite one saturates its gate, and that is a number
            assert not info.converged
            assert np.isnan(output[0, 7, 3])
        # Channels that do not see it are right.
        states, _ = solve("gru", u, weights, initial)
        assert error(output[..., :3], states[0][..., :3]) < 5e-6


@pytest.mark.parametrize("method", ["scan", "newton", "shooting"])
@every_cell
def test_what_is_not_a_number_spoils_what_follows_and_nothing_else(cell, method):
    """In u, and in the initial state: all later states of that row and channel, up to a reset."""
    u, weights, initial, _ = draw(cell, (2, 160, 4), 0.9)
    reset = jnp.zeros((2, 160), bool).at[:, 100].set(True)
    states, last = solve(cell, u, weights, initial, reset)
    spoilt = np.zeros((2, 160, 4), bool)
    spoilt[0, 7:100, 2] = spoilt[1, :100, 1] = spoilt[1, 130:, 3] = True
    u = u.at[0, 7, 0, 2].set(jnp.nan).at[1, 130, 2, 3].set(jnp.nan)
    initial = tuple(x.at[1, 1].set(jnp.nan) for x in initial)
    output, final, info = with_info(cell, method, u, weights, initial, reset)
    np.testing.assert_array_equal(np.isnan(output), spoilt)
    assert error(jnp.where(spoilt, 0, output), np.where(spoilt, 0, states[-1])) < 5e-6
    for x, want in zip(final, last, strict=True):
        np.testing.assert_array_equal(np.isnan(x), spoilt[:, -1])
        assert error(jnp.where(spoilt[:, -1], 0, x), np.where(spoilt[:, -1], 0, want)) < 5e-6
    assert not info.converged and np.isnan(info.residual)
    # A weight reaches all times of its channel.
    output, _, info = with_info(cell, method, u, weights.at[0, 0].set(jnp.nan), initial, reset)
    assert np.all(np.isnan(output[..., 0])) and not info.converged


def test_no_gradient_flows_through_the_info():
    """Though the figures depend on the inputs."""
    given = draw("gru", (1, 16, 2), 0.9)

    def figures(u, method):
        info = call_with_info("gru", method, u, *given[1:])[2]
        return info.residual + info.log_jacobian

    for method in ("scan", "newton"):
        assert float(figures(given[0], method)) != float(figures(1.1 * given[0], method))
        assert not np.any(jax.jit(jax.grad(figures), static_argnums=1)(given[0], method))


def test_derivatives_are_of_reverse_mode_and_second_ones_are_right_or_refused():
    u, weights, initial, _ = draw("gru", (1, 24, 2), 0.9)

    def gradient(method):
        loss = lambda weights: jnp.sum(jnp.sin(call("gru", method, u, weights, initial)[0]))
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(loss, (weights,), (weights,))
        return jax.grad(loss)

    want = jax.jit(jax.jacrev(gradient("scan")))(weights)
    assert np.max(np.abs(want)) > 0.1
    got = jax.jit(jax.jacfwd(gradient("newton")))(weights)
    assert relative_error(got, want) < 1e-5
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.jacrev(gradient("newton")))(weights)


def test_float64_is_computed_in_float64():
    given = draw("gru", (1, 64, 4), 0.9)
    with jax.enable_x64(True):
        u, weights, initial = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), given[:3])
        for method in ("scan", "newton", "shooting"):
            output, _ = jax.jit(run, static_argnums=(0, 1))("gru", method, u, weights, initial)
            assert output.dtype == jnp.float64
            assert error(output, solve("gru", *given)[0][0]) < 1e-10
