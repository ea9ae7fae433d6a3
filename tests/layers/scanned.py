"""Errors of gradients through a scan over layers, where XLA stacks what kernels read and write.

`test_in_place.py` runs these in processes of their own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hackle.layers import masks, recurrent
from hackle.layers.attention import pallas_gpu, reference

LAYERS = 3


def recurrence(cell: str) -> float:
    """Of the fused method, in several segments, relative to scan."""
    batch, time, width = 8, 512, 1024
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)
    x, gates = draw(batch, time, width), draw(LAYERS, 3, width)
    weights = 0.5 * draw(LAYERS, {"gru": 3, "lstm": 5}[cell], width)

    def loss(x, gates, weights, method):
        def layer(x, given):
            gates, weights = given
            parts = (weights,) if cell == "gru" else (weights[:3], weights[3:])
            u = x[:, :, None] * gates
            return x + getattr(recurrent, cell)(u, *parts, method=method)[0], None

        return jnp.mean(jax.lax.scan(layer, x, (gates, weights))[0] ** 2)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    return error(run(x, gates, weights, "fused"), run(x, gates, weights, "scan"))


def attention() -> float:
    """Of `pallas_gpu`, relative to the reference in float32."""
    shape = (LAYERS, 2, 512, 4, 64)
    keys = jax.random.split(jax.random.key(0), 4)
    given = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]

    def run(attend, *given):
        def layer(carry, x):
            out, pull = jax.vjp(lambda *a: attend(*a, masks.Causal(), 0.1)[0], *x[:3])
            return carry, (out, *pull(x[3].astype(out.dtype)))

        return jax.lax.scan(layer, 0, given)[1]

    got = jax.jit(functools.partial(run, pallas_gpu.attend))(*given)
    wide = [x.astype(jnp.float32) for x in given]
    return error(got, jax.jit(functools.partial(run, reference.attend))(*wide))


def error(got, want) -> float:
    """The largest of all arrays, each in the norm; not a number counts as infinite."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    found = [jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b)) for a, b in pairs]
    return float(jnp.max(jnp.nan_to_num(jnp.stack(found), nan=jnp.inf)))
