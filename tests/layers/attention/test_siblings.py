"""A loss on one path moves nothing in its siblings: gradients are zero, not small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from hackle.layers import masks
from hackle.layers.attention import pallas_gpu, pallas_tpu, reference, xla

# Runs of a row: name, tokens, (block, path) at depths 1 and 2. Path a has a block of its own.
RUNS = (
    ("goal", 10, (0, 0), (0, 0)),
    ("a", 15, (1, 1), (0, 0)),
    ("a1", 30, (1, 1), (2, 1)),
    ("a2", 35, (1, 1), (2, 2)),
    ("b", 50, (1, 2), (0, 0)),
    ("end", 20, (0, 0), (0, 0)),
)
WIDTH, HEADS = 16, 2

interpreted_gpu = pytest.param(
    functools.partial(pallas_gpu.attend, interpret=plgpu.InterpretGPUParams())
    if jax.__version_info__ >= (0, 11)
    else None,
    jnp.bfloat16,
    id="pallas_gpu",
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 11),
        reason=f"the kernels need Pallas of jax 0.11 or newer, this is {jax.__version__}",
    ),
)
IMPLEMENTATIONS = [
    pytest.param(reference.attend, jnp.float32, id="reference"),
    pytest.param(xla.attend, jnp.float32, id="xla"),
    pytest.param(
        functools.partial(pallas_tpu.attend, interpret=pltpu.InterpretParams()),
        jnp.float32,
        id="pallas_tpu",
    ),
    interpreted_gpu,
]


def row():
    """The mask of one row, and the tokens of each run."""
    places, at = {}, 0
    for name, tokens, *_ in RUNS:
        places[name] = np.arange(at, at + tokens)
        at += tokens
    ids = np.concatenate([np.tile(np.asarray(r[2:])[..., None], r[1]) for r in RUNS], axis=-1)
    block, path = (jnp.asarray(ids[None, :, i], jnp.int32) for i in (0, 1))  # [1, depth, L]
    return masks.Causal() & masks.Branches(block, path, block, path), places


@pytest.mark.parametrize("attend, dtype", IMPLEMENTATIONS)
def test_no_gradient_reaches_a_sibling(attend, dtype, monkeypatch):
    monkeypatch.setattr(xla, "TILE", 16 * 160)  # several tiles
    mask, places = row()
    length = sum(map(len, places.values()))
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, length, WIDTH), dtype)
    kernel = jax.random.normal(keys[1], (3, WIDTH, HEADS, WIDTH), dtype) / 4
    weight = jax.random.normal(keys[2], (length, HEADS, WIDTH))

    def features(x):
        query, key, value = (jnp.einsum("bld,dhe->blhe", x, w) for w in kernel)
        return attend(query, key[:, :, :1], value[:, :, :1], mask, WIDTH**-0.5)

    (out, _), pull = jax.vjp(features, x)
    losses = {"a2": (("a1", "b"), ("goal", "a")), "b": (("a", "a1", "a2"), ("goal",))}
    for path, (siblings, seen) in losses.items():
        here = np.isin(np.arange(length), places[path])
        dout = jnp.where(here[:, None, None], weight, 0)[None].astype(out.dtype)
        dlse = jnp.where(here[:, None], weight[..., 0], 0)[None]
        (gradient,) = pull((dout, dlse))
        size = np.abs(np.asarray(gradient[0], np.float32)).max(-1)
        for name in siblings:
            np.testing.assert_array_equal(size[places[name]], 0)
        for name in (*seen, path):
            assert (size[places[name]] > 0).all(), name
