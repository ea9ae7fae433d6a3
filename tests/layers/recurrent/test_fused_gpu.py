"""The Hopper kernels without a GPU: in interpret mode, and lowered for the chip.

`test_methods.py` runs them on one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from hackle.layers import in_place
from hackle.layers.recurrent import cells, fused_gpu, scan
from hackle.layers.recurrent import fused_gpu_cells as fast_cells
from hackle.layers.recurrent import fused_gpu_kernels as kernels
from tests.layers.recurrent.reference import (
    cotangents,
    draw,
    error,
    exact_gradients,
    relative_error,
    solve,
)

try:
    from jax.sharding import AbstractDevice
except ImportError:  # not public before jax 0.11
    from jax._src.mesh import AbstractDevice

OURS = {"gru": cells.GRU(), "lstm": cells.LSTM()}

recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason=f"the kernel needs Pallas of jax 0.11 or newer, this is {jax.__version__}",
)


def check_interpreted(cell, given, segments=None):
    """`march` and `adjoint` of `(cell, u, weights, initial, reset)` against float64."""
    how = {"segments": segments, "interpret": plgpu.InterpretGPUParams()}
    _, u, *_ = given
    states, final, product = fused_gpu.march(*given, **how)
    want, last = solve(cell, *given[1:])
    # A bfloat16 has 8 bits; what is carried on is float32.
    rounding = 1 if u.dtype == jnp.float32 else 2**-8 / 5e-6
    assert error(states, want) < 5e-6 * rounding and error(final, last) < 5e-6
    assert error(product, scan.march(*given)[2]) < 5e-6
    of_output, of_final = cotangents(cell, (*u.shape[:2], u.shape[3]))
    of_output = of_output.astype(u.dtype)
    given_out = (None,) * (len(states) - 1) + (of_output,)
    kept = tuple(jnp.asarray(x, u.dtype) for x in want)
    got = fused_gpu.adjoint(*given, kept, given_out, of_final, **how)
    exact = exact_gradients(cell, *given[1:], of_output, of_final)
    assert relative_error(got, exact) < (1e-5 if u.dtype == jnp.float32 else 2e-2)


@recent
@pytest.mark.parametrize(
    "cell, shape, segments, dtype",
    [
        ("gru", (2, 29, 128), 2, jnp.float32),  # ragged
        ("gru", (1, 16, 130), 1, jnp.bfloat16),  # channels beyond the lanes
        ("lstm", (1, 24, 128), 2, jnp.float32),
    ],
)
def test_interpreted_kernels(cell, shape, segments, dtype):
    u, weights, initial, reset = draw(cell, shape, 0.9, resets=True, dtype=dtype)
    reset = reset.at[:, :3].set(False)
    given = (OURS[cell], u, weights, initial, reset)
    check_interpreted(cell, given, segments)


@recent
@pytest.mark.parametrize("multiprocessors, batch", [(132, 1), (132, 2), (2, 3), (1, 2)])
@pytest.mark.parametrize("cell, dtype", [("gru", jnp.float32), ("lstm", jnp.bfloat16)])
def test_interpreted_kernels_that_fill_the_chip(cell, dtype, multiprocessors, batch, monkeypatch):
    """Two programs, one, three small ones, or two at a time on a multiprocessor."""
    monkeypatch.setattr(fused_gpu, "_FULL", 400)
    monkeypatch.setattr(fused_gpu, "_MULTIPROCESSORS", multiprocessors)
    given = (OURS[cell], *draw(cell, (batch, 21, 256), 0.9, resets=True, dtype=dtype))
    check_interpreted(cell, given)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_on_its_way(dtype):
    """KiB a multiprocessor: twice as much where B x D does not fill the chip, as was measured."""

    def on_its_way(batch, arrays=3):
        u = jax.ShapeDtypeStruct((batch, 99, 3, 4096), dtype)
        shape = fused_gpu._shape(u, True, None, arrays)
        size = shape.stages * shape.rows * shape.tile * arrays * u.dtype.itemsize
        programs = batch * 4096 // shape.tile
        at_once = fused_gpu._SHARED // (size + shape.reserved + 1024)  # which the system takes
        return size * min(at_once, -(-programs // 132)) // 1024

    assert [on_its_way(batch) for batch in (5, 8, 9, 12, 13, 32)] == [96, 48, 54, 54, 48, 48]
    assert [on_its_way(batch, 5) for batch in (8, 9, 12, 13)] == [60, 60, 60, 120]


@pytest.mark.parametrize("cell", OURS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [8, 9, 13])
def test_programs_that_fill_a_chip(cell, dtype, batch):
    u, weights, initial, reset = draw(cell, (batch, 35, 4096), 0.9, resets=True, dtype=dtype)
    if (reason := fused_gpu.unsupported(u)) is not None:
        pytest.skip(reason)
    states, final = fused_gpu.solve(OURS[cell], u, weights, initial, reset)
    want, last = solve(cell, u, weights, initial, reset)
    # A bfloat16 has 8 bits, and its gates are the hardware's.
    allowed = (5e-6, 5e-6) if dtype == jnp.float32 else (2**-7, 1e-4)
    assert error(states, want) < allowed[0] and error(final, last) < allowed[1]


@pytest.mark.parametrize("cell", OURS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_steps_done_fast_are_the_cells(cell, dtype):
    """Where tanh is exact, as on a CPU; states and weights at random."""
    u, weights, initial, _ = draw(cell, (4, 1, 64), 2.0)
    row, weights = tuple(u[:, 0, k] for k in range(3)), tuple(weights)
    want = OURS[cell].step(initial, row, weights)
    got = fast_cells.fast(OURS[cell], dtype).step(initial, row, weights)
    assert error(got, want) < 1e-6


def slow_to_forget(cell):
    """Gates nearly closed: a burn-in of one tile leaves entries of segments far off."""
    u, weights, initial, _ = draw(cell, (1, 5 * fused_gpu.ROWS, 128), 0.9)
    return u.at[:, :, 0].add({"gru": -3, "lstm": 3}[cell]), weights, initial


@recent
@pytest.mark.parametrize(
    "cell, corrections", [("gru", 2), ("gru", 0), ("lstm", 2)], ids=["gru", "gru last", "lstm"]
)
def test_entries_are_corrected(cell, corrections, monkeypatch):
    """By passes over the segments that move, or by the last one, which runs all steps."""
    monkeypatch.setattr(fused_gpu, "_BURN_IN", fused_gpu.ROWS)
    monkeypatch.setattr(fused_gpu, "_CORRECTIONS", corrections)
    given = slow_to_forget(cell)
    how = {"segments": 5, "interpret": plgpu.InterpretGPUParams()}
    states, final, product = fused_gpu.march(OURS[cell], *given, None, **how)
    want, last = solve(cell, *given)
    assert error((states, final), (want, last)) < 5e-6
    assert relative_error(product, scan.march(OURS[cell], *given, None)[2]) < 1e-5


@recent
def test_corrections_are_needed_for_that(monkeypatch):
    monkeypatch.setattr(fused_gpu, "_BURN_IN", fused_gpu.ROWS)
    monkeypatch.setattr(kernels, "TOLERANCE", 9.0)
    given = slow_to_forget("gru")
    how = {"segments": 5, "interpret": plgpu.InterpretGPUParams()}
    states, _ = fused_gpu.solve(OURS["gru"], *given, None, **how)
    assert error(states, solve("gru", *given)[0]) > 1e-3


def lowered(function, *arguments):
    """Its text for a Hopper that is not there."""
    chip = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@recent
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cell", OURS)
def test_lowers_for_hopper(cell, dtype, monkeypatch):
    """Forwards with segments and resets, or neither; backwards likewise."""
    monkeypatch.setenv("XLA_FLAGS", in_place.FLAG)
    n, spec = OURS[cell].states, jax.ShapeDtypeStruct
    batch, time, width = 2, 512, 1024
    u, series = spec((batch, time, 3, width), dtype), spec((batch, time, width), dtype)
    weights = spec((OURS[cell].weights, width), jnp.float32)
    state = (spec((batch, width), jnp.float32),) * n
    segments = 1 if dtype == jnp.float32 else 4
    reset = None if segments == 1 else spec((batch, time), jnp.bool_)
    given = (u, weights, state, reset)
    forward = functools.partial(fused_gpu.solve, OURS[cell], segments=segments)
    backward = functools.partial(fused_gpu.adjoint, OURS[cell], segments=segments)
    seen = (*[None] * (n - 1), series)
    for function, arguments in (
        (forward, given),
        (backward, (*given, (series,) * n, seen, state)),
    ):
        assert "mosaic_gpu" in lowered(function, *arguments)


@recent
def test_lowers_with_all_states_seen():
    """As with `lengths`: a float32 LSTM in segments of 256 channels would not fit."""
    cell, spec = OURS["lstm"], jax.ShapeDtypeStruct
    size = (4, 2048, 256)
    series, state = (spec(size, jnp.float32),) * 2, (spec((4, 256), jnp.float32),) * 2
    u, weights = spec((*size[:2], 3, 256), jnp.float32), spec((5, 256), jnp.float32)
    back = functools.partial(fused_gpu.adjoint, cell)
    assert "mosaic_gpu" in lowered(back, u, weights, state, None, series, series, state)


@recent
def test_one_segment_where_in_place_is_unsafe(monkeypatch, caplog):
    """Segments are corrected in place."""
    u, weights, initial, _ = draw("gru", (2, 512, 128), 0.9)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (u, weights, *initial)]

    def kernels_of(flags):
        monkeypatch.setenv("XLA_FLAGS", flags)
        solve = lambda u, weights, h: fused_gpu.solve(OURS["gru"], u, weights, (h,), None)
        return lowered(solve, *shapes).count("@mosaic_gpu")

    fused_gpu._say_once.cache_clear()
    assert kernels_of(in_place.FLAG) == 4 and not caplog.messages
    assert kernels_of("") == 1 and f"set XLA_FLAGS={in_place.FLAG}" in caplog.text
    with pytest.raises(NotImplementedError, match="in 4 segments: .*may lose"):
        fused_gpu.solve(OURS["gru"], u, weights, initial, None, segments=4)


def test_unsupported_says_why():
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0":
        half = jnp.zeros((1, 1, 3, 1), jnp.float16)
        assert "stores float32 or bfloat16, got float16" in fused_gpu.unsupported(half)
    else:
        assert "needs" in fused_gpu.unsupported(jnp.zeros((1, 1, 3, 1)))


@pytest.mark.parametrize("time, segments", [(2048, None), (1, None), (500, None), (500, 7), (9, 9)])
@pytest.mark.parametrize("batch, width", [(1, 128), (8, 1024), (32, 4096)])
def test_segments_cover_time_once(batch, width, time, segments):
    shape = fused_gpu._shape(jnp.zeros((batch, time, 3, width), jnp.bfloat16), False, segments)
    covered = shape.segments * shape.length
    assert time <= covered < time + shape.length
    assert shape.length % fused_gpu.ROWS == 0 and width % shape.tile == 0
    if segments is None and batch * width >= 32 * 1024:
        assert shape.segments == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_tiles_fit_into_shared_memory(dtype):
    most = 0
    for batch in (1, 4, 8, 12, 32, 100):
        for width in (128, 256, 1024, 1280, 4096):
            for time in (1, 200, 2048, 9000):
                u = jax.ShapeDtypeStruct((batch, time, 3, width), dtype)
                for arrays in (3, 5, 6, 7):  # forward, GRU, LSTM with one or both states seen
                    shape = fused_gpu._shape(u, True, None, arrays)
                    numbers = (shape.rows * arrays + 2 * (arrays > 3)) * shape.tile
                    stage = numbers * u.dtype.itemsize + 4 * kernels.KEEP
                    most = max(most, shape.stages * stage + shape.reserved)
                    assert shape.reserved >= 0 and shape.length % shape.rows == 0
    assert 100 * 1024 < most < 226 * 1024  # 227 KiB, barriers included


def test_fast_nonlinearities_are_right_to_float32():
    x = np.concatenate([np.linspace(-30, 30, 20001), [-200, 200, 0]]).astype(np.float32)
    wide = x.astype(np.float64)
    for fast, exact in (
        (fast_cells._sigmoid, 1 / (1 + np.exp(-wide))),
        (fast_cells._tanh, np.tanh(wide)),
    ):
        got = np.asarray(fast(jnp.asarray(x)))
        assert (
            np.all(np.isfinite(got)) and np.max(np.abs(got - exact)) < 5e-7
        )  # the CPU rounds 2^x otherwise
