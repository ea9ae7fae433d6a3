"""A recurrence over a mesh equals that on one device, and only border states travel."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hackle.layers import recurrent
from hackle.layers.recurrent import newton
from hackle.layers.sharding import axis_rules

AXES = ("data", "seq", "tensor")
RULES = {"batch": "data", "length": "seq", "state": "tensor"}
COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\][^=]*? "
    r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("
)
BATCH, WIDTH = 2, 8


def mesh(data=1, seq=1, tensor=1) -> Mesh:
    devices = np.array(jax.devices()[: data * seq * tensor])
    return Mesh(devices.reshape(data, seq, tensor), AXES)


@functools.cache
def arguments(cell: str, time: int, size: float):
    """`(u, weights, initial state, cotangents)`; every state weight is +-size."""
    rng = np.random.default_rng(7)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    signs = lambda rows: jnp.asarray(rng.choice([-size, size], (rows, WIDTH)), jnp.float32)
    initial = jnp.asarray(rng.uniform(-1, 1, (BATCH, WIDTH)), jnp.float32)
    weights = (signs(3),) if cell == "gru" else (signs(3), signs(2))
    state = initial if cell == "gru" else (0.5 * initial, initial)
    reset = jnp.asarray(rng.random((BATCH, time)) < 0.01).at[:, time // 2].set(True)
    given = normal(BATCH, time, WIDTH), normal(BATCH, WIDTH)
    return normal(BATCH, time, 3, WIDTH), weights, state, reset, given


def gradients(cell: str, method: str, u, weights, initial, reset, given):
    """States, final states, and gradients of a sum over both."""

    def loss(u, weights, initial):
        states, final = getattr(recurrent, cell)(u, *weights, initial, reset=reset, method=method)
        ends = sum(jnp.sum(x * given[1]) for x in jax.tree.leaves(final))
        return jnp.sum(states * given[0]) + ends, (states, final)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(u, weights, initial)


def over(where: Mesh, f, u, *others):
    """`f` compiled and run with u over the mesh: results and compiled text."""

    def run(*arrays):
        with axis_rules(RULES):
            return f(*arrays)

    with jax.set_mesh(where):
        spec = PartitionSpec("data", "seq", None, "tensor")
        u = jax.device_put(u, NamedSharding(where, spec))
        jitted = jax.jit(run)
        return jitted(u, *others), jitted.lower(u, *others).compile().as_text()


def collectives(text: str) -> dict[str, int]:
    """Kind of collective -> numbers in its largest one."""
    found: dict[str, int] = {}
    for shape, kind in COLLECTIVE.findall(text):
        size = math.prod(int(n) for n in shape.split(",") if n)
        found[kind] = max(found.get(kind, 0), size)
    return found


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("cell", "method", "size", "where"),
    [
        ("gru", "scan", 0.9, {"seq": 2}),
        ("gru", "shooting", 2.0, {"seq": 4}),
        ("gru", "scan", 2.0, {"seq": 8}),
        ("lstm", "scan", 2.0, {"seq": 8}),
        ("lstm", "shooting", 0.9, {"data": 2, "seq": 2, "tensor": 2}),
        ("gru", "newton", 0.5, {"data": 2, "seq": 4}),
        ("gru", "shooting", 0.9, {"data": 2}),
    ],
)
def test_devices_equal_one(cell, method, size, where):
    u, weights, initial, reset, given = arguments(cell, 512, size)
    f = functools.partial(gradients, cell, method)
    alone = jax.jit(f)(u, weights, initial, reset, given)
    spread, _ = over(mesh(**where), f, u, weights, initial, reset, given)

    def close(a, b):  # gradients of weights are sums over all times
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, float(jnp.max(jnp.abs(b)))))

    chex.assert_trees_all_equal_shapes(spread, alone)
    jax.tree.map(close, spread, alone)


def spread_over_time(cell: str, f):
    """What `f` gives with time over eight devices, for each of two lengths beside its arguments,
    and its collectives, which are the same for both."""
    runs, sizes = [], []
    for time in (512, 1024):
        given = arguments(cell, time, 0.9)
        result, text = over(mesh(seq=8), f, *given)
        runs.append((given, result))
        sizes.append(collectives(text))
    assert sizes[0] == sizes[1]  # whatever T
    return runs, sizes[0]


@pytest.mark.devices(8)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_only_borders_travel(cell):
    _, sizes = spread_over_time(cell, functools.partial(gradients, cell, "scan"))
    # The largest: the rows of u from which a device guesses its entry, and N x N products of all.
    assert sizes["collective-permute"] == BATCH * 64 * 3 * WIDTH
    assert sizes["all-gather"] == 8 * BATCH * WIDTH
    assert sizes["all-reduce"] <= 5 * WIDTH * BATCH


@pytest.mark.devices(8)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_info_needs_no_more_than_borders(cell):
    def info(u, weights, initial, reset, _):
        solve = getattr(recurrent, f"{cell}_with_info")
        return solve(u, *weights, initial, reset=reset, method="scan")[2]

    runs, sizes = spread_over_time(cell, info)
    for given, spread in runs:
        chex.assert_trees_all_close(spread[1:], jax.jit(info)(*given)[1:], atol=1e-6)
    assert sizes["all-gather"] == 8 * BATCH * WIDTH


@pytest.mark.devices(8)
def test_channels_and_rows_need_nothing():
    u, weights, initial, reset, _ = arguments("gru", 64, 0.9)

    def forward(u, weights, initial, reset):
        return recurrent.gru(u, *weights, initial, reset=reset, method="scan")

    _, text = over(mesh(data=2, tensor=4), forward, u, weights, initial, reset)
    assert collectives(text) == {}


@pytest.mark.devices(8)
def test_one_that_forgets_nothing_is_exact():
    """Gates that never open: the entry states are the initial state, far from any guess."""
    u = jnp.full((1, 256, 3, 4), -8.0)
    initial = jnp.linspace(-0.9, 0.9, 4)[None]
    f = lambda u: recurrent.gru(u, jnp.full((3, 4), 0.1), initial, method="scan")
    (states, final), _ = over(mesh(seq=8), f, u)
    alone = f(u)
    np.testing.assert_allclose(states, alone[0], atol=2e-6)
    np.testing.assert_allclose(final, alone[1], atol=2e-6)


@pytest.mark.devices(8)
def test_time_that_does_not_divide_is_named():
    u = jnp.zeros((1, 12, 3, 4))
    f = lambda u: recurrent.gru(u, jnp.zeros((3, 4)), method="scan")
    with (
        jax.set_mesh(mesh(seq=8)),
        axis_rules(RULES),
        pytest.raises(ValueError, match="time 12 does not divide over 8 devices"),
    ):
        jax.jit(f)(u)


def informed(method, **options):
    """A GRU of u, weights and initial state: states and info."""

    def f(u, weights, initial):
        states, _, info = recurrent.gru_with_info(u, *weights, initial, method=method, **options)
        return states, info

    return f


@pytest.mark.devices(8)
@pytest.mark.parametrize("where", [{"seq": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_a_part_that_does_not_converge_is_told(where):
    """Weights of 5, where Newton's method does not converge in 32 steps."""
    u, weights, initial, *_ = arguments("gru", 256, 5.0)
    (_, info), _ = over(mesh(**where), informed("newton"), u, weights, initial)
    assert not info.converged and int(info.iterations) >= newton.MAX_ITERATIONS
    assert float(info.residual) > 1e-3
    # Told to fall back, every part does.
    f = informed("newton", fallback=True)
    (states, info), _ = over(mesh(**where), f, u, weights, initial)
    assert not info.converged and float(info.residual) < 1e-6
    np.testing.assert_allclose(states, informed("scan")(u, weights, initial)[0], atol=1e-5)


@pytest.mark.devices(8)
def test_iterations_of_the_parts_are_told():
    u, weights, initial, *_ = arguments("gru", 512, 0.5)
    alone = jax.jit(informed("newton"))(u, weights, initial)[1]
    (_, info), _ = over(mesh(seq=2), informed("newton"), u, weights, initial)
    assert bool(info.converged) and float(info.residual) < 1e-6
    assert 3 <= int(info.iterations) <= 2 * int(alone.iterations)
    # Step by step, the passes over the devices: one, as entries agree after 64 steps of burn-in.
    (_, info), _ = over(mesh(seq=2), informed("scan"), u, weights, initial)
    assert bool(info.converged) and int(info.iterations) == 1
    nearly_closed = u.at[:, :, 0].add(-6)
    (_, info), _ = over(mesh(seq=4), informed("scan"), nearly_closed, weights, initial)
    assert bool(info.converged) and int(info.iterations) in (2, 3, 4)


@pytest.mark.devices(8)
@pytest.mark.parametrize("rules", [True, False], ids=["rules", "no rules"])
@pytest.mark.parametrize("method", ["scan", "newton", "shooting"])
def test_what_is_not_a_number_on_one_device_is_told(method, rules):
    """A maximum over devices may drop it."""
    u, weights, initial, *_ = arguments("gru", 256, 0.5)
    u = u.at[1, 200, 0, 5].set(jnp.nan)
    f, where = informed(method), mesh(data=2, seq=2, tensor=2)
    if rules:
        (states, info), _ = over(where, f, u, weights, initial)
    else:
        spec = PartitionSpec("data", "seq", None, "tensor")
        u = jax.device_put(u, NamedSharding(where, spec))
        states, info = jax.jit(f)(u, weights, initial)
    assert not info.converged and np.isnan(info.residual)
    spoilt = np.zeros(states.shape, bool)
    spoilt[1, 200:, 5] = True
    np.testing.assert_array_equal(np.isnan(states), spoilt)


@pytest.mark.devices(8)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_of_bfloat16_start_from_entries_that_are_not_rounded(cell):
    """Gates nearly closed, so that a part remembers where it entered."""
    u, weights, initial, reset, given = arguments(cell, 64, 0.9)
    u = u.at[:, :, 0].add({"gru": -6, "lstm": 6}[cell]).astype(jnp.bfloat16)
    reset = jnp.zeros_like(reset)
    f = functools.partial(gradients, cell, "scan")
    (alone, _), ((spread, _), _) = (
        jax.jit(f)(u, weights, initial, reset, given),
        over(mesh(seq=2), f, u, weights, initial, reset, given),
    )
    for a, b in zip(jax.tree.leaves(spread[1:]), jax.tree.leaves(alone[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.devices(2)
@pytest.mark.parametrize("method", ["scan", "newton", "shooting"])
@pytest.mark.parametrize("layer", [recurrent.ParaGRU, recurrent.ParaLSTM])
def test_meshes_of_a_users_own(layer, method):
    """Rows over explicit axes, and in a `shard_map` that checks what varies; no rules of ours."""
    where = Mesh(jax.devices()[:2], ("rows",), axis_types=(AxisType.Explicit,))
    spec = PartitionSpec("rows")
    x = jax.random.normal(jax.random.key(0), (4, 140, 6))
    graph, params = nnx.split(layer(6, 6, method=method, rngs=nnx.Rngs(0)))

    def loss(params, x):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x)[0]))

    want = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    with jax.set_mesh(where):
        apart = jax.device_put(x, NamedSharding(where, spec))
        explicit = jax.jit(jax.grad(loss, (0, 1)))(params, apart)
        specs = (PartitionSpec(), spec)
        inside = jax.shard_map(jax.grad(loss, (0, 1)), in_specs=specs, out_specs=specs)
        manual = jax.jit(inside)(params, apart)
    for found in (explicit, manual):
        chex.assert_trees_all_close(jax.device_get(found), jax.device_get(want), atol=2e-5)
