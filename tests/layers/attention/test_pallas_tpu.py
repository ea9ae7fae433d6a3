"""The TPU kernels: values and gradients in interpret mode, and what the TPU compiler makes of them.

Interpret mode fills what a kernel never wrote with NaN, and checks that copies do not race.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxprs_in_params

from hackle.layers import attention, masks
from hackle.layers.attention import pallas_tpu, reference
from tests import tpu_compile
from tests.layers.attention.drawing import branch_mask, random_mask, random_masks

# (B, L, S, H, K, E), dtype, mask. Tiles are of 128 to 512 tokens.
CASES = {
    "branches, grouped": (
        (1, 300, 300, 4, 2, 56),
        jnp.float32,
        branch_mask(300, ((0, 20), (1, 130), (2, 130), (0, 20))),
    ),
    "depth 6, rows of masks": (
        (2, 140, 140, 3, 1, 128),
        jnp.float32,
        masks.Causal() & random_mask(np.random.default_rng(1), "branches", 2, 140, 140, 6),
    ),
    "everything": ((2, 140, 260, 2, 1, 32), jnp.float32, random_masks(5, 2, 140, 260, 2)),
    "parts of a group, wide": ((1, 140, 140, 11, 1, 160), jnp.float32, masks.Causal()),
    "nothing is seen": (
        (2, 20, 150, 2, 1, 32),
        jnp.float32,
        masks.Padding(jnp.asarray([0, 130])),
    ),
    "bfloat16": (
        (1, 300, 300, 2, 1, 128),
        jnp.bfloat16,
        masks.Causal() & masks.Segments(*(jnp.arange(300)[None] // 140,) * 2),
    ),
}


def draw(shape, dtype):
    """Queries, keys, values, and cotangents of output and log-sum-exp."""
    b, l, s, h, k, e = shape
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = ((b, l, h, e), (b, s, k, e), (b, s, k, e), (b, l, h, e))
    arrays = [jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=False)]
    return *arrays, jax.random.normal(keys[4], (b, l, h))


def everything(attend, mask, scale, query, key, value, dout, dlse):
    """`(out, lse, dquery, dkey, dvalue)`."""
    (out, lse), pull = jax.vjp(lambda *a: attend(*a, mask, scale), query, key, value)
    return out, lse, *pull((dout, jnp.where(jnp.isfinite(lse), dlse, 0)))


def check(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        seen = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), seen)
        x, y = np.where(seen, x, 0), np.where(seen, y, 0)
        assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(y), 1e-3)


@pytest.mark.parametrize("shape, dtype, mask", CASES.values(), ids=CASES)
def test_values_and_gradients(shape, dtype, mask):
    given = draw(shape, dtype)
    attend = functools.partial(pallas_tpu.attend, interpret=pltpu.InterpretParams())
    scale = 0.7 * shape[-1] ** -0.5
    got = jax.jit(functools.partial(everything, attend, mask, scale))(*given)
    wide = [x.astype(jnp.float32) for x in given]
    want = everything(reference.attend, mask, scale, *wide)
    assert got[0].dtype == got[2].dtype == dtype and got[1].dtype == jnp.float32
    # In bfloat16, probabilities and results have 8 bits.
    check(got, want, 2e-6 if dtype == jnp.float32 else 5e-3)


def test_scale_may_be_negative():
    query, key, value, *_ = draw((1, 9, 9, 1, 1, 8), jnp.float32)
    out, lse = pallas_tpu.attend(query, key, value, None, -0.5, interpret=pltpu.InterpretParams())
    check((out, lse), reference.attend(query, key, value, None, -0.5), 2e-6)


@pytest.mark.parametrize("masks_mapped", [False, True], ids=["one mask", "masks"])
def test_vmap_is_a_larger_batch(masks_mapped):
    """As streams are mapped over: values are the same in each, keys are not."""
    query, key, value, *_ = draw((4, 20, 30, 2, 1, 16), jnp.float32)
    query, key = query.reshape(2, 2, *query.shape[1:]), key.reshape(2, 2, *key.shape[1:])
    lengths = jnp.asarray([[30, 17], [3, 0]]) if masks_mapped else jnp.asarray([30])

    def loss(attend, *arrays):
        def one(query, key, lengths):
            return attend(query, key, arrays[2], masks.Padding(lengths), 0.3)

        axes = (0, 0, 0 if masks_mapped else None)
        out, lse = jax.vmap(one, in_axes=axes)(*arrays[:2], lengths)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) ** 2)

    ours = functools.partial(pallas_tpu.attend, interpret=pltpu.InterpretParams())
    got, want = (
        jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2)))(query, key, value[:2])
        for attend in (ours, reference.attend)
    )
    check(got, want, 2e-6)


def test_copies_do_not_race(capfd):
    """Three tiles of keys, two buffers; copies are as late as they may be."""
    mode = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    given = draw((1, 140, 1100, 2, 1, 16), jnp.float32)
    mask = masks.Padding(jnp.asarray([1090]))
    got = everything(functools.partial(pallas_tpu.attend, interpret=mode), mask, 0.3, *given)
    check(got, everything(reference.attend, mask, 0.3, *given), 2e-6)
    assert "RACE" not in "".join(capfd.readouterr())


def test_unsupported_says_why():
    query, key, value, *_ = draw((1, 9, 9, 1, 1, 8), jnp.float32)
    if jax.default_backend() != "tpu":
        with pytest.raises(NotImplementedError, match="need a TPU, the default device is"):
            attention(query, key, value, implementation="pallas_tpu")


def largest(function, given):
    """Bytes of the largest array that a function makes, kernels' own memory apart."""

    def arrays(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (x.aval for x in eqn.outvars)
            if "pallas" not in eqn.primitive.name and "core_map" not in eqn.primitive.name:
                for inner in jaxprs_in_params(eqn.params):
                    yield from arrays(inner)

    found = arrays(jax.make_jaxpr(function)(*given).jaxpr)
    return max(x.size * x.dtype.itemsize for x in found if hasattr(x, "dtype"))


def test_memory_is_linear_in_length():
    """But for the states of tiles: some bytes for each pair of tiles."""
    size = lambda length: largest(
        *program((1, length, length, 16, 2, 128), jnp.bfloat16, 1, False, True)
    )
    assert size(131072) == 4 * size(32768) == 131072 * 16 * 128 * 4  # a float32 for each of dout


# --- the compiler --------------------------------------------------------------------------------


def program(shape, dtype, depth, segments, backward):
    """`(function, arguments)` of attention with branches of `depth`, and packing."""
    b, l, s, h, k, e = shape
    spec = jax.ShapeDtypeStruct
    query, key = spec((b, l, h, e), dtype), spec((b, s, k, e), dtype)
    ids = (spec((b, depth, l), jnp.int32),) * 2 + (spec((b, depth, s), jnp.int32),) * 2
    row = (spec((b, l), jnp.int32), spec((b, s), jnp.int32))

    def mask(ids, row):
        found = masks.Positions(*row) & masks.Branches(*ids)
        return found & masks.Segments(*row) if segments else found

    def forward(query, key, value, ids, row):
        return pallas_tpu.attend(query, key, value, mask(ids, row), e**-0.5)

    def both(query, key, value, ids, row, dout, dlse):
        attend = lambda *a: forward(*a, ids, row)
        return jax.vjp(attend, query, key, value)[1]((dout, dlse))

    given = (query, key, key, ids, row)
    if backward:
        return both, (*given, query, spec((b, l, h), jnp.float32))
    return forward, given


def usual_programs():
    yield "forward", *program((1, 4096, 4096, 16, 2, 128), jnp.bfloat16, 2, False, False)
    yield "backward", *program((1, 4096, 4096, 16, 2, 128), jnp.bfloat16, 2, False, True)


def more_programs():
    for name, shape, dtype, depth in (
        ("narrow", (2, 300, 500, 4, 4, 56), jnp.float32, 1),
        ("wide", (1, 1024, 1024, 8, 1, 256), jnp.float32, 6),
        ("half wide", (1, 1024, 1024, 8, 8, 192), jnp.bfloat16, 6),
        ("many heads", (1, 2048, 2048, 40, 1, 64), jnp.bfloat16, 1),
        ("three heads", (1, 1000, 1000, 9, 3, 128), jnp.bfloat16, 3),
    ):
        yield name, *program(shape, dtype, depth, True, True)


def long_programs():
    for length in (32768, 131072):
        shape = (1, length, length, 16, 2, 128)
        yield str(length), *program(shape, jnp.bfloat16, 1, False, True)


@pytest.mark.parametrize("chip", tpu_compile.CHIPS)
def test_compiles(chip):
    texts = tpu_compile.compiled(chip, usual_programs)
    kernels = {name: text.count("tpu_custom_call") for name, text in texts.items()}
    assert kernels == {"forward": 1, "backward": 3}
    for name in ("forward", "backward_queries", "backward_keys"):
        assert f"attention_{name}" in texts["backward"]


@pytest.mark.slow
@pytest.mark.parametrize("chip", tpu_compile.CHIPS)
def test_compiles_at_other_sizes(chip):
    assert len(tpu_compile.compiled(chip, more_programs)) == 5


@pytest.mark.slow
def test_compiles_at_131072_tokens():
    """On a chip of 16 GiB: a number of two bytes for each pair of tokens would be 32 GiB."""
    assert len(tpu_compile.compiled("v5e", long_programs)) == 2
