"""`newton_scan` with cells of a user's own, against `lax.scan` and JAX's derivatives of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hackle.layers.recurrent import check_jacobian, newton, newton_scan
from hackle.layers.recurrent.affine import Diagonal
from tests.layers.recurrent.reference import error, relative_error

TIME = 40


def diagonal(params, state, x):
    """Leaky tanh units; state and input are dicts."""
    h = state["h"]
    gate = jax.nn.sigmoid(params["gate"] * h + x["drive"])
    return {"h": gate * h + (1 - gate) * jnp.tanh(params["weight"] * h + x["push"])}


def block(params, state, x):
    """A damped pendulum for each channel: two arrays that read one another."""
    angle, speed = state
    speed = 0.6 * speed - params["weight"] * jnp.sin(angle) + x["push"]
    return 0.8 * angle + params["gate"] * jnp.tanh(speed), speed


def dense(params, state, x):
    """A plain recurrent network."""
    return jnp.tanh(params["matrix"] @ state + params["weight"] * x["push"])


CELLS = {"diagonal": diagonal, "block": block, "dense": dense}
every_kind = pytest.mark.parametrize("kind", CELLS)


def draw(kind, time=TIME, width=4):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    turn = np.linalg.qr(rng.normal(size=(width, width)))[0]
    params = {
        "gate": jnp.asarray(rng.uniform(0.2, 0.4, width), jnp.float32),
        "weight": jnp.asarray(rng.uniform(0.3, 0.6, width), jnp.float32),
        "matrix": jnp.asarray(0.7 * turn, jnp.float32),
    }
    inputs = {"drive": normal(time, width), "push": 0.5 * normal(time, width)}
    start = normal(width)
    state = {"diagonal": {"h": start}, "block": (start, normal(width)), "dense": start}[kind]
    return params, inputs, state


def by_newton(kind, params, inputs, state, **options):
    return newton_scan(
        functools.partial(CELLS[kind], params), inputs, state, jacobian=kind, **options
    )


def by_scan(kind, params, inputs, state):
    step = functools.partial(CELLS[kind], params)
    return lax.scan(lambda h, x: (step(h, x),) * 2, state, inputs)[1]


@every_kind
def test_states_are_those_of_scan(kind):
    given = draw(kind)
    states, info = jax.jit(functools.partial(by_newton, kind))(*given)
    assert error(states, by_scan(kind, *given)) < 2e-6
    assert jax.tree.structure(states) == jax.tree.structure(given[2])
    assert bool(info.converged) and float(info.residual) < 1e-6
    # Far fewer than steps of time: it is Newton's method, not causality.
    assert 2 <= int(info.iterations) <= 10
    again, info = by_newton(kind, *given, method="scan")
    assert error(again, states) < 2e-6
    assert bool(info.converged) and int(info.iterations) == 0


@every_kind
def test_derivatives_are_those_of_scan(kind):
    """Of parameters that the step closes over, inputs and initial state; both directions."""
    given = draw(kind)
    solve = lambda *given: by_newton(kind, *given)[0]
    scan = functools.partial(by_scan, kind)
    rng = np.random.default_rng(1)
    random = lambda tree: jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree
    )
    seeds, along = random(jax.eval_shape(solve, *given)), random(given)
    pull = lambda f: jax.jit(lambda *given: jax.vjp(f, *given)[1](seeds))(*given)
    got, want = pull(solve), pull(scan)
    used = [np.max(np.abs(x)) > 0 for x in jax.tree.leaves(want)]
    assert sum(used) >= 4
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if np.max(np.abs(y)):
            assert relative_error(x, y) < 1e-5
        else:
            assert not np.any(x)
    push = lambda f: jax.jit(lambda *given: jax.jvp(f, given, along)[1])(*given)
    assert relative_error(push(solve), push(scan)) < 1e-5
    # Memory is saved and no number changes.
    again = pull(jax.checkpoint(solve))
    assert error(again, got) < 1e-6 * max(np.max(np.abs(x)) for x in jax.tree.leaves(got))


@every_kind
def test_second_derivatives_are_those_of_scan(kind):
    """Reverse over reverse, and forward over reverse."""
    params, inputs, state = draw(kind, time=12, width=2)

    def hessians(solve):
        def loss(params, state):
            states = solve(kind, params, inputs, state)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(states))

        gradient = jax.grad(loss, argnums=(0, 1))
        along = jax.tree.map(jnp.cos, (params, state))
        again = jax.grad(lambda *given: optax.tree.vdot(gradient(*given), along), argnums=(0, 1))
        return jax.jit(lambda *given: (again(*given), jax.jvp(gradient, given, along)[1]))

    got = hessians(lambda *given: by_newton(*given)[0])(params, state)
    want = hessians(by_scan)(params, state)
    assert sum(np.max(np.abs(x)) > 1e-2 for x in jax.tree.leaves(want)) >= 6
    assert error(got, want) < 1e-5 * max(np.max(np.abs(x)) for x in jax.tree.leaves(want))


def test_no_gradient_flows_through_the_info():
    params, inputs, state = draw("diagonal")

    def figures(params, method):
        info = by_newton("diagonal", params, inputs, state, method=method)[1]
        return info.residual + info.log_jacobian

    for method in ("scan", "newton"):
        doubled = jax.tree.map(lambda x: 2 * x, params)
        assert float(figures(params, method)) != float(figures(doubled, method))
        gradient = jax.jit(jax.grad(figures), static_argnums=1)(params, method)
        assert not any(np.any(x) for x in jax.tree.leaves(gradient))


@every_kind
def test_vmap_is_a_loop(kind):
    params, inputs, state = draw(kind)
    scaled = lambda tree: jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), tree)

    def loss(params, inputs, state):
        states = by_newton(kind, params, inputs, state)[0]
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(states)), states

    step = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    inputs, state = scaled(inputs), scaled(state)
    many = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)))(params, inputs, state)
    loop = jax.jit(lambda *given: lax.map(lambda x: step(given[0], *x), given[1:]))
    # A row may take more iterations for the sake of another.
    for x, y in zip(
        jax.tree.leaves(many), jax.tree.leaves(loop(params, inputs, state)), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.devices(8)
def test_sharded_batch_and_time():
    """A state with a batch axis of its own, rows over four devices and time over two."""
    params, inputs, _ = draw("diagonal")
    rows = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x, 2 * x], 1), inputs)
    state = {"h": jnp.linspace(-1, 1, 16).reshape(4, 4)}
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("seq", "data"))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    placed = jax.tree.map(lambda x: put(x, "seq", "data"), rows), {"h": put(state["h"], "data")}

    @jax.jit
    def both(params, inputs, state):
        states, pull = jax.vjp(
            lambda *given: by_newton("diagonal", *given)[0], params, inputs, state
        )
        return states, pull(jax.tree.map(jnp.cos, states))

    assert relative_error(both(params, *placed)[0], both(params, rows, state)[0]) < 2e-6
    got, want = (jax.tree.leaves(both(params, *x)[1]) for x in (placed, (rows, state)))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time", [1, 2, 3, 31, 32, 33, 1000, 4097])
def test_linear_cell_takes_one_iteration(time):
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.uniform(-1, 1, (time, 3)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(time, 3)), jnp.float32)
    h = [np.zeros(3)]
    for t in range(time):
        h.append(np.asarray(a[t], np.float64) * h[-1] + np.asarray(b[t], np.float64))
    h = np.stack(h[1:])

    def linearize(states):
        before = jnp.concatenate([jnp.zeros((1, 3)), states[0][:-1]])
        return (a * before + b,), Diagonal((a,))

    solve = jax.jit(lambda: newton.iterate(linearize, (b,), 0, tolerance=0.0, max_iterations=1))
    (states,), (iterations, _) = solve()
    bound = np.finfo(np.float32).eps * time * np.max(np.abs(h))
    assert int(iterations) == 1 and np.max(np.abs(states - h)) <= bound
    # The public function sees that the second correction is nothing.
    if time in (1, 33):
        states, info = newton_scan(lambda h, x: x[0] * h + x[1], (a, b), jnp.zeros(3))
        assert np.max(np.abs(states - h)) <= bound
        assert int(info.iterations) <= 2 and bool(info.converged)


def test_signs_and_integers_are_exact():
    rng = np.random.default_rng(0)
    signs = jnp.asarray(rng.choice([-1.0, 1.0], (TIME, 4)), jnp.float32)
    inputs = jnp.asarray(rng.integers(-5, 6, (TIME, 4)), jnp.float32)
    step = lambda h, x: x[0] * h + x[1]
    start = jnp.arange(4.0)
    states, _ = newton_scan(step, (signs, inputs), start)
    want = lax.scan(lambda h, x: (step(h, x),) * 2, start, (signs, inputs))[1]
    np.testing.assert_array_equal(states, want)


def wild(h, x):
    """The logistic map: bounded, and no two trajectories stay together."""
    return 3.9 * h * (1 - h) + 0 * x


def test_chaos_is_reported_and_falls_back():
    inputs, start = jnp.zeros((512, 1)), jnp.full((1,), 0.3)
    _, info = newton_scan(wild, inputs, start, max_iterations=8)
    assert not info.converged and int(info.iterations) == 8
    assert float(info.log_jacobian) > 0.3  # its exponent is about 0.5
    assert not float(info.residual) < 1e-3
    fallen, info = newton_scan(wild, inputs, start, max_iterations=8, fallback=True)
    assert not info.converged and float(info.residual) < 1e-6  # of the states returned
    scanned, _ = newton_scan(wild, inputs, start, method="scan")
    np.testing.assert_array_equal(fallen, scanned)


def test_a_cell_that_diverges_is_reported():
    """It leaves float32 within some steps; nothing after is silently right."""
    states, info = newton_scan(lambda h, x: h * h + x, 2 + jnp.zeros((40, 1)), jnp.zeros(1))
    assert not info.converged
    np.testing.assert_allclose(states[:3, 0], [2, 6, 38], rtol=1e-5)


@pytest.mark.parametrize("method", ["scan", "newton"])
def test_inputs_that_are_not_numbers_are_reported(method):
    params, inputs, state = draw("diagonal")
    inputs["push"] = inputs["push"].at[9, 0].set(jnp.nan)
    states, info = by_newton("diagonal", params, inputs, state, method=method)
    assert not info.converged and np.isnan(info.residual)
    # They spoil the later states of that channel, and nothing else.
    np.testing.assert_array_equal(np.isnan(states["h"][:, 0]), np.arange(TIME) >= 9)
    inputs["push"] = inputs["push"].at[9, 0].set(0)
    clean, _ = by_newton("diagonal", params, inputs, state, method="scan")
    assert error(states["h"][:, 1:], clean["h"][:, 1:]) < 2e-6
    assert error(states["h"][:9], clean["h"][:9]) < 2e-6


@pytest.mark.parametrize("kind", ["block", "dense"])
def test_what_is_not_a_number_spoils_what_depends_on_it(kind):
    """Also of many rows at once, and only as far as the step looks back."""
    params, inputs, state = draw(kind)
    forgets = jnp.arange(TIME) == 25  # there the state before is not looked at
    cell = CELLS[kind]

    def step(h, x):
        x, forget = x
        return cell(params, jax.tree.map(lambda a: jnp.where(forget, 0, a), h), x)

    push = jnp.stack([inputs["push"], inputs["push"].at[9, 0].set(jnp.nan)])
    solve = lambda push, method: newton_scan(
        step, (inputs | {"push": push}, forgets), state, jacobian=kind, method=method
    )
    states, info = jax.jit(jax.vmap(lambda push: solve(push, None)))(push)
    np.testing.assert_array_equal(info.converged, [True, False])
    assert error(jax.tree.map(lambda x: x[0], states), solve(push[0], "scan")[0]) < 2e-6
    for x, y in zip(
        jax.tree.leaves(states), jax.tree.leaves(solve(push[1], "scan")[0]), strict=True
    ):
        np.testing.assert_array_equal(np.isnan(x[1]), np.isnan(y))
        assert error(jnp.nan_to_num(x[1]), jnp.nan_to_num(y)) < 2e-6


def test_the_bound_keeps_iterates_where_states_are():
    """Steep units that answer in [-1, 1]: Newton's method overshoots, projection does not."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
    step = lambda h, x: jnp.tanh(1.5 * h + x)
    seen = []

    def watched(h, x):
        jax.debug.callback(lambda h: seen.append(np.max(np.abs(h))), h)
        return step(h, x)

    want = lax.scan(lambda h, x: (step(h, x),) * 2, jnp.zeros(16), inputs)[1]
    _, free = newton_scan(step, inputs, jnp.zeros(16), max_iterations=100)
    states, held = newton_scan(watched, inputs, jnp.zeros(16), max_iterations=100, bound=1.0)
    jax.effects_barrier()
    assert bool(held.converged) and error(states, want) < 1e-5
    assert max(seen) <= 1
    assert int(held.iterations) < int(free.iterations)


def test_tolerance_zero_runs_all_iterations_and_a_loose_one_fewer():
    given = draw("diagonal")
    info = by_newton("diagonal", *given, tolerance=0.0, max_iterations=7)[1]
    assert int(info.iterations) == 7
    loose = by_newton("diagonal", *given, tolerance=0.1)[1]
    assert int(loose.iterations) < int(by_newton("diagonal", *given)[1].iterations)


def test_check_jacobian_tells_kinds_apart():
    params, inputs, _ = draw("dense")
    first = jax.tree.map(lambda x: x[0], inputs)
    states = {kind: draw(kind)[2] for kind in CELLS}
    checked = lambda kind, said: check_jacobian(
        functools.partial(CELLS[kind], params), first, states[kind], said
    )
    for kind in CELLS:
        for wide in list(CELLS)[list(CELLS).index(kind) :]:
            checked(kind, wide)
    for kind, narrow in (("block", "diagonal"), ("dense", "diagonal"), ("dense", "block")):
        with pytest.raises(ValueError, match=f"Jacobian of the step is not '{narrow}'"):
            checked(kind, narrow)


def test_check_jacobian_looks_around():
    """A product of channels is flat at 0."""
    with pytest.raises(ValueError, match="Jacobian of the step is not 'diagonal'"):
        check_jacobian(lambda h, x: jnp.tanh(h * jnp.roll(h, 1) + x), jnp.zeros(4), jnp.zeros(4))


def test_what_is_declared_too_narrowly_still_converges():
    """Quasi-Newton: exact states by causality, as the docstring says; more iterations."""
    given = draw("block")
    step = functools.partial(block, given[0])
    # Convergence is linear, so what is left is about as large as the last correction.
    how = {"jacobian": "diagonal", "max_iterations": 200, "tolerance": 1e-6}
    states, info = newton_scan(step, *given[1:], **how)
    assert bool(info.converged) and error(states, by_scan("block", *given)) < 1e-5
    assert int(info.iterations) > int(by_newton("block", *given)[1].iterations)
