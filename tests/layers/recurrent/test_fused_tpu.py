"""The TPU kernels: values and gradients in interpret mode, and what the TPU compiler makes of them.

Interpret mode fills what a kernel never wrote, and what a tile reads beyond an array, with NaN.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from hackle.layers.recurrent import (
    cells,
    fused_tpu,
    fused_tpu_kernels,
    fused_tpu_tiles,
    scan,
    shooting,
)
from tests import tpu_compile

CELLS = {"gru": cells.GRU(), "lstm": cells.LSTM()}
CASES = {  # (B, T, D), dtype, resets
    "one": ((1, 1, 1), jnp.float32, False),
    "columns fill the sublanes": ((1, 9, 1100), jnp.bfloat16, False),
    "rows and columns": ((3, 5, 130), jnp.float32, True),
    "rows and columns, bfloat16": ((3, 5, 130), jnp.bfloat16, True),
    "batch of two tiles": ((9, 19, 140), jnp.float32, True),
    "batch of two tiles, bfloat16": ((9, 19, 140), jnp.bfloat16, True),
}


def draw(cell, shape, dtype, resets, seed=0):
    """`(u, weights, initial, reset)` with states that neither die out nor saturate."""
    batch, time, width = shape
    rng = np.random.default_rng(seed)
    u = jnp.asarray(rng.normal(size=(batch, time, 3, width)), dtype)
    weights = jnp.asarray(rng.normal(size=(cell.weights, width)), jnp.float32)
    initial = tuple(
        jnp.asarray(rng.uniform(-1, 1, (batch, width)), jnp.float32) for _ in range(cell.states)
    )
    return u, weights, initial, jnp.asarray(rng.random((batch, time)) < 0.3) if resets else None


def loop(cell, u, weights, initial, reset):
    """Float64 numpy, the equations written out once more: states `[B,T,D]` and final states."""
    u, a = np.asarray(u, np.float64), np.asarray(weights, np.float64)
    state = [np.asarray(x, np.float64) for x in initial]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    out = []
    for t in range(u.shape[1]):
        if reset is not None:
            state = [np.where(np.asarray(reset)[:, t, None], 0, x) for x in state]
        first, second, third = u[:, t, 0], u[:, t, 1], u[:, t, 2]
        if cell.name == "gru":
            (h,) = state
            z, r = sigmoid(first + a[0] * h), sigmoid(second + a[1] * h)
            state = [(1 - z) * h + z * np.tanh(third + a[2] * r * h)]
        else:
            c, h = state
            f = sigmoid(first + a[0] * h + a[3] * c)
            c = f * c + (1 - f) * np.tanh(third + a[2] * h)
            state = [c, sigmoid(second + a[1] * h + a[4] * c) * np.tanh(c)]
        out.append(state)
    return [np.stack(x, 1) for x in zip(*out, strict=True)], state


def through_time(cell, u, weights, initial, reset, cotangents, final_cotangents):
    """Gradients by autodiff of a plain `lax.scan` in float32."""

    def run(u, weights, initial):
        def step(state, x):
            row, cut = x
            state = tuple(jnp.where(cut[:, None], 0.0, s) for s in state)
            state = cell.step(state, tuple(jnp.moveaxis(row, 1, 0)), tuple(weights))
            return state, state

        cuts = jnp.zeros(u.shape[:2], bool) if reset is None else reset
        rows = jnp.swapaxes(u.astype(jnp.float32), 0, 1)
        final, states = lax.scan(step, initial, (rows, cuts.T))
        return tuple(jnp.swapaxes(x, 0, 1) for x in states), final

    (states, _), pull = jax.vjp(run, u, weights, initial)
    full = tuple(
        jnp.zeros_like(x) if g is None else g.astype(jnp.float32)
        for x, g in zip(states, cotangents, strict=True)
    )
    return pull((full, final_cotangents))


def compare(got, want, tolerance):
    """Largest error over largest size, of every array."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.max(np.abs(x - y)) <= tolerance * max(1e-3, np.max(np.abs(y)))


@pytest.mark.parametrize("shape, dtype, resets", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", CELLS)
def test_values(name, shape, dtype, resets):
    cell = CELLS[name]
    given = draw(cell, shape, dtype, resets)
    solve = functools.partial(fused_tpu.solve, cell, interpret=pltpu.InterpretParams())
    states, final = jax.jit(solve)(*given)
    want, want_final = loop(cell, *given)
    assert all(x.dtype == dtype for x in states)
    assert all(x.dtype == jnp.float32 for x in final)
    # bfloat16 rounds what is stored, to 8 bits; what is carried on stays exact.
    compare(states, want, 5e-6 if dtype == jnp.float32 else 2**-8)
    compare(final, want_final, 5e-6)


@pytest.mark.parametrize("shape, dtype, resets", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", CELLS)
def test_gradients(name, shape, dtype, resets):
    cell = CELLS[name]
    u, weights, initial, reset = draw(cell, shape, dtype, resets)
    states, _ = loop(cell, u, weights, initial, reset)
    states = tuple(jnp.asarray(x, dtype) for x in states)
    rng = np.random.default_rng(1)
    last = jnp.asarray(rng.normal(size=states[-1].shape), dtype)
    cotangents = (*[None] * (cell.states - 1), last)  # of an LSTM only h is seen outside
    final = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in initial)
    adjoint = functools.partial(fused_tpu.adjoint, cell, interpret=pltpu.InterpretParams())
    got = jax.jit(adjoint)(u, weights, initial, reset, states, cotangents, final)
    want = through_time(cell, u, weights, initial, reset, cotangents, final)
    assert got[0].dtype == dtype
    # In bfloat16 the gates are made again from rounded states.
    compare(got, want, 1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("name", CELLS)
def test_many_tiles(name, monkeypatch):
    """Tiles of one column and some blocks: the state crosses between both, along time alone."""
    cell = CELLS[name]
    monkeypatch.setattr(fused_tpu_tiles, "_VMEM", 2 * 9 * 2**16)  # two blocks of 9 arrays backward
    monkeypatch.setattr(fused_tpu_kernels, "FORWARD", 1)
    monkeypatch.setattr(fused_tpu_kernels, "_BACKWARD", 1)
    given = draw(cell, (9, 43, 140), jnp.float32, resets=True)
    mode = pltpu.InterpretParams()
    states, final = jax.jit(functools.partial(fused_tpu.solve, cell, interpret=mode))(*given)
    want, want_final = loop(cell, *given)
    compare((states, final), (want, want_final), 5e-6)
    final = tuple(jnp.ones_like(x) for x in final)
    adjoint = functools.partial(fused_tpu.adjoint, cell, interpret=mode)
    got = jax.jit(adjoint)(*given, states, states, final)
    compare(got, through_time(cell, *given, states, final), 1e-5)


def test_a_tile_of_several_blocks_equals_several_tiles(monkeypatch):
    """The same numbers, whatever the cut of time."""
    cell = CELLS["gru"]
    given = draw(cell, (1, 40, 1), jnp.float32, resets=False)
    whole = fused_tpu.solve(cell, *given, interpret=True)
    monkeypatch.setattr(fused_tpu_tiles, "_VMEM", 1)
    cut = fused_tpu.solve(cell, *given, interpret=True)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(x, y)


SEGMENTED = {  # (B, T, D), segments, dtype, resets
    "four": ((1, 96, 200), 4, jnp.float32, False),
    "ragged": ((2, 45, 130), 3, jnp.float32, True),
    "ragged, bfloat16": ((1, 70, 128), 3, jnp.bfloat16, True),
    "two tiles of segments": ((2, 88, 530), 11, jnp.float32, False),
}


@pytest.fixture
def passes(monkeypatch):
    """Of each `shoot`: how many passes it took, and whether they were enough."""
    seen, shoot = [], shooting.shoot

    def watched(*given, **how):
        passed = shoot(*given, **how)
        seen.append((int(passed.progress.iterations), bool(passed.progress.converged)))
        return passed

    monkeypatch.setattr(shooting, "shoot", watched)
    return seen


@pytest.mark.parametrize("shape, segments, dtype, resets", SEGMENTED.values(), ids=SEGMENTED)
@pytest.mark.parametrize("name", CELLS)
def test_segments(name, shape, segments, dtype, resets, passes, monkeypatch):
    """A cell that hardly forgets, but at resets: Newton's method corrects entries in few passes."""
    monkeypatch.setattr(fused_tpu, "_BURN_IN", 8 if dtype == jnp.float32 else 16)
    cell = CELLS[name]
    u, weights, *rest = draw(cell, shape, dtype, resets)
    given = (u.at[:, :, 0].add({"gru": -3, "lstm": 3}[name]), weights / 2, *rest)
    how = {"segments": segments, "interpret": pltpu.InterpretParams()}
    states, final, product = fused_tpu.march(cell, *given, **how)
    want, want_final = loop(cell, *given)
    assert all(x.dtype == dtype and x.shape == shape for x in states)
    compare(states, want, 5e-6 if dtype == jnp.float32 else 2**-8)
    compare(final, want_final, 5e-6)
    compare(product, scan.march(cell, *given)[2], 1e-5)
    ((taken, converged),) = passes
    assert converged and (taken == 1 if resets else 1 < taken <= 5)


@pytest.mark.parametrize("name", CELLS)
def test_one_pass_where_the_cell_forgets(name, passes):
    """As many segments as None chooses."""
    cell = CELLS[name]
    given = draw(cell, (1, 530, 128), jnp.float32, resets=False)
    states, final = fused_tpu.solve(cell, *given, interpret=pltpu.InterpretParams())
    compare((states, final), loop(cell, *given), 5e-6)
    assert passes == [(1, True)]


@pytest.mark.parametrize("name", CELLS)
def test_one_segment_where_passes_are_not_enough(name, passes, monkeypatch):
    """A cell that magnifies what it enters with."""
    monkeypatch.setattr(fused_tpu, "_BURN_IN", 8)
    cell = CELLS[name]
    u, weights, *rest = draw(cell, (1, 190, 128), jnp.float32, resets=False)
    given = (u, 5 * jnp.sign(weights), *rest)
    how = {"segments": 12, "interpret": pltpu.InterpretParams()}
    got = fused_tpu.march(cell, *given, **how)
    compare(
        got[:2], fused_tpu.solve(cell, *given, segments=1, interpret=pltpu.InterpretParams()), 0
    )
    assert [converged for _, converged in passes] == [False]
    monkeypatch.setattr(fused_tpu, "_PASSES", 20)
    compare(fused_tpu.solve(cell, *given, **how)[1], got[1], 1e-3)
    assert passes[-1][1]


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ((1, 8192, 1024), jnp.float32, (4, 2048)),
        ((1, 1000, 1024), jnp.bfloat16, (3, 336)),
        ((1, 8192, 64), jnp.float32, (32, 256)),
        ((8, 8192, 128), jnp.float32, (32, 256)),
        ((2, 8192, 1024), jnp.float32, (4, 2048)),
        ((2, 300, 1024), jnp.float32, (1, 300)),
        ((1, 511, 1024), jnp.float32, (1, 511)),
        ((8, 8192, 1024), jnp.float32, (1, 8192)),
        ((1, 8192, 4096), jnp.float32, (1, 8192)),
    ],
)
def test_segments_where_registers_are_not_filled(shape, dtype, expected):
    batch, time, width = shape
    u = jax.ShapeDtypeStruct((batch, time, 3, width), dtype)
    assert fused_tpu._segments(u, None) == expected


def test_unsupported_says_why():
    u = jnp.zeros((1, 1, 3, 1))
    assert "needs a TPU, the default device is" in fused_tpu.unsupported(u)


def programs(shapes):
    """`(name, function, arguments)` of both directions, for both cells, at all `shapes`."""
    spec = jax.ShapeDtypeStruct
    for shape, dtype, resets in shapes:
        batch, time, width = shape
        for name, cell in CELLS.items():
            u, series = spec((batch, time, 3, width), dtype), spec(shape, dtype)
            weights = spec((cell.weights, width), jnp.float32)
            state = (spec((batch, width), jnp.float32),) * cell.states
            reset = spec((batch, time), jnp.bool_) if resets else None
            given = (u, weights, state, reset)
            seen = (*[None] * (cell.states - 1), series)
            label = f"{name} {shape} {jnp.dtype(dtype).name}"
            yield f"{label} forward", functools.partial(fused_tpu.solve, cell), given
            back = (*given, (series,) * cell.states, seen, state)
            yield f"{label} backward", functools.partial(fused_tpu.adjoint, cell), back


def usual_programs():
    yield from programs(
        [
            ((8, 2048, 1024), jnp.bfloat16, False),
            ((3, 19, 130), jnp.float32, True),
            ((1, 2048, 1024), jnp.float32, False),
        ]
    )


def more_programs():
    yield from programs(
        [
            ((1, 1, 1), jnp.float32, False),
            ((1, 4096, 4096), jnp.float32, True),
            ((1, 8192, 64), jnp.float32, True),
            ((2, 5000, 1024), jnp.bfloat16, True),
            ((2, 300, 384), jnp.bfloat16, True),
            ((13, 1, 200), jnp.bfloat16, True),
            ((32, 1024, 4096), jnp.float32, False),
            ((64, 512, 8192), jnp.bfloat16, True),
        ]
    )


@pytest.mark.parametrize("chip", tpu_compile.CHIPS)
def test_compiles(chip):
    texts = tpu_compile.compiled(chip, usual_programs)
    assert len(texts) == 12
    assert all("tpu_custom_call" in text for text in texts.values())


@pytest.mark.slow
@pytest.mark.parametrize("chip", tpu_compile.CHIPS)
def test_compiles_at_other_sizes(chip):
    assert len(tpu_compile.compiled(chip, more_programs)) == 32


def projection():
    """A layer's worth: the GEMM that makes u, and its gradients."""
    cell = CELLS["gru"]
    batch, time, width = 8, 2048, 1024

    @jax.custom_vjp
    def run(u, weights, initial):
        return fused_tpu.solve(cell, u, weights, initial, None)[0][0]

    def forward(u, weights, initial):
        states = run(u, weights, initial)
        return states, (u, weights, initial, states)

    def backward(saved, g):
        *given, states = saved
        return fused_tpu.adjoint(cell, *given, None, (states,), (g,), given[2])

    run.defvjp(forward, backward)

    def loss(x, kernel, weights, initial):
        u = jnp.einsum("bti,ikd->btkd", x, kernel)
        return jnp.sum(jnp.square(run(u, weights, initial)))

    shapes = [(batch, time, width), (width, 3, width), (3, width)]
    x, kernel, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    initial = (jax.ShapeDtypeStruct((batch, width), jnp.float32),)
    yield "layer", jax.grad(loss, argnums=(0, 1, 2)), (x, kernel, weights, initial)

    def segmented(x, kernel, weights, initial):
        u = jnp.einsum("bti,ikd->btkd", x, kernel)
        return fused_tpu.solve(cell, u, weights, initial, None)

    x = jax.ShapeDtypeStruct((1, 8192, width), jnp.float32)
    initial = (jax.ShapeDtypeStruct((1, width), jnp.float32),)
    yield "segments", segmented, (x, kernel, weights, initial)


def test_u_is_never_copied():
    """The GEMM writes u as the kernels read it, and reads du as they write it."""
    texts = tpu_compile.compiled("v5e", projection)
    views = {
        "layer": "(?:8,3,2048|8,2048,3),1024",
        "segments": "(?:8192,3|1,8192,3|1,4,2048,3|1,3,4,2048),1024",
    }
    for name, shapes in views.items():
        entry = texts[name][texts[name].index("ENTRY") :]
        made = re.findall(rf" = f32\[{shapes}\]\S* ([a-z-]+)\(", entry)
        # One fusion, of the GEMM that gives u. The rest is it or du under other shapes.
        assert made.count("fusion") == 1
        assert set(made) <= {"fusion", "bitcast", "get-tuple-element"}
