"""The Hopper kernels: on a Hopper, and without one in interpret mode and lowered for the chip."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from hackle.layers import attention, masks
from hackle.layers.attention import pallas_gpu, reference
from tests.layers.attention.drawing import branch_mask, random_mask, random_masks
from tests.layers.attention.test_pallas_tpu import check, draw, everything

try:
    from jax.sharding import AbstractDevice
except ImportError:  # not public before jax 0.11
    from jax._src.mesh import AbstractDevice

recent = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason=f"the kernels need Pallas of jax 0.11 or newer, this is {jax.__version__}",
)

# (B, L, S, H, K, E), mask, scale. Tiles are of 64 or 128 tokens.
SMALL = {
    "branches, grouped": (
        (1, 200, 200, 2, 1, 56),
        branch_mask(200, ((0, 20), (1, 60), (2, 60))),
        0.1,
    ),
    "a row of masks each": ((2, 120, 200, 1, 1, 128), random_masks(3, 2, 120, 200, 2), -0.06),
    "wide, nothing is seen": ((2, 60, 140, 2, 1, 136), masks.Padding(jnp.asarray([0, 130])), 0.06),
    "no scores": ((1, 70, 70, 1, 1, 64), None, 0.0),
}


@recent
@pytest.mark.parametrize("shape, mask, scale", SMALL.values(), ids=SMALL)
def test_interpreted_kernels(shape, mask, scale):
    given = draw(shape, jnp.bfloat16)
    attend = functools.partial(pallas_gpu.attend, interpret=plgpu.InterpretGPUParams())
    got = jax.jit(functools.partial(everything, attend, mask, scale))(*given)
    want = everything(reference.attend, mask, scale, *(x.astype(jnp.float32) for x in given))
    assert got[0].dtype == got[2].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    check(got, want, 5e-3)  # probabilities and results have 8 bits


def lowered(function, *arguments):
    """Its text for a Hopper that is not there."""
    chip = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def program(width, dtype, depth, backward):
    """`(function, arguments)` of packed branches of `depth`."""
    spec, length = jax.ShapeDtypeStruct, 1000
    query, key = spec((2, length, 4, width), dtype), spec((2, length, 2, width), dtype)
    ids, row = spec((2, depth, length), jnp.int32), spec((2, length), jnp.int32)

    def forward(query, key, value, ids, row):
        mask = masks.Causal() & masks.Branches(ids, ids, ids, ids) & masks.Segments(row, row)
        return pallas_gpu.attend(query, key, value, mask, width**-0.5)

    def both(query, key, value, ids, row, dout, dlse):
        attend = lambda *a: forward(*a, ids, row)
        return jax.vjp(attend, query, key, value)[1]((dout, dlse))

    given = (query, key, key, ids, row)
    if backward:
        return both, (*given, query, spec((2, length, 4), jnp.float32))
    return forward, given


@recent
@pytest.mark.parametrize(
    "width, dtype, depth, backward",
    [
        (128, jnp.bfloat16, 1, True),
        (56, jnp.float16, 6, True),
        (256, jnp.bfloat16, 6, True),
    ],
)
def test_lowers_for_hopper(width, dtype, depth, backward):
    function, given = program(width, dtype, depth, backward)
    assert lowered(function, *given).count("mosaic_gpu") >= 1 + backward


@recent
def test_lowers_under_vmap():
    """As streams are mapped over: one kernel of a larger batch."""
    function, (query, key, value, *ids) = program(64, jnp.bfloat16, 1, False)
    more = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    mapped = jax.vmap(function, in_axes=(0, 0, None, None, None))
    text = lowered(mapped, more(query), more(key), value, *ids)
    assert text.count("@mosaic_gpu") == 1 and "tensor<6x1024x4x64xbf16>" in text


def test_unsupported_says_why():
    query, key, value, *_ = draw((1, 9, 9, 1, 1, 8), jnp.bfloat16)
    if jax.default_backend() == "cpu":
        why = "needs? (jax 0.11|an NVIDIA GPU)|need an NVIDIA GPU|need jax 0.11"
        with pytest.raises(NotImplementedError, match=f"'pallas_gpu': .*({why})"):
            attention(query, key, value, implementation="pallas_gpu")
    elif pallas_gpu.unsupported(query, key, None) is None:
        wide = [jnp.zeros((1, 9, 1, 264), jnp.bfloat16)] * 2
        assert "up to 256, got 264" in pallas_gpu.unsupported(*wide, None)
        assert "bfloat16 or float16" in pallas_gpu.unsupported(
            query.astype(jnp.float32), key.astype(jnp.float32), None
        )


# --- on a Hopper ---------------------------------------------------------------------------------


def full_size(kind, batch, length):
    """Masks of a hundred tiles."""
    if kind == "none":
        return None
    if kind == "branches":
        return branch_mask(length, ((0, 40), (1, 90), (2, 70), (0, 30)))
    if kind == "blind":
        return masks.Padding(jnp.zeros((batch,), jnp.int32))
    if kind == "depth 6":
        rng = np.random.default_rng(1)
        return masks.Causal() & random_mask(rng, "branches", batch, length, length, 6)
    return random_masks(5, batch, length, length, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, width, length, dtype",
    [
        ("branches", 128, 1000, jnp.bfloat16),
        ("depth 6", 128, 777, jnp.float16),
        ("blind", 128, 640, jnp.bfloat16),
        ("random", 64, 1000, jnp.bfloat16),
        ("none", 56, 300, jnp.float16),
        ("branches", 96, 500, jnp.bfloat16),
        ("branches", 256, 700, jnp.bfloat16),
    ],
)
def test_on_hopper(kind, width, length, dtype):
    given = draw((2, length, length, 4, 2, width), dtype)
    if reason := pallas_gpu.unsupported(*given[:2], None):
        pytest.skip(reason)
    mask, scale = full_size(kind, 2, length), width**-0.5
    got = jax.jit(functools.partial(everything, pallas_gpu.attend, mask, scale))(*given)
    wide = [x.astype(jnp.float32) for x in given]
    want = jax.jit(functools.partial(everything, reference.attend, mask, scale))(*wide)
    check(got, want, 1e-2 if dtype == jnp.bfloat16 else 2e-3)
