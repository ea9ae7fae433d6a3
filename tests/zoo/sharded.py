"""What tests of models over meshes share: packed rows, their loss, and two ways to run it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hackle.layers.sharding import axis_rules
from hackle.pjit_configs.sharding import batch_sharding

VOCABULARY = 64
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (8, 16)).astype(np.int32)
SEGMENTS = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], 8, axis=0).astype(np.int32)


def loss(graph, state, tokens, segments):
    scores = jax.nn.log_softmax(nnx.merge(graph, state)(tokens, segment_ids=segments)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


def on_one_device(model):
    """Loss and gradients of a model that is split into `(graph, state)`."""
    graph, state = model
    return jax.jit(jax.value_and_grad(lambda s: loss(graph, s, TOKENS, SEGMENTS)))(state)


def on_preset(preset, model):
    """The same on all eight devices, laid out as a preset says."""
    graph, state = model
    mesh = preset.mesh()
    assert mesh.size == 8
    placed, rows = preset.shardings(state), batch_sharding(mesh)

    def run(state, tokens, segments):
        with axis_rules(preset.rules):
            return jax.value_and_grad(lambda s: loss(graph, s, tokens, segments))(state)

    with jax.set_mesh(mesh):
        jitted = jax.jit(run, in_shardings=(placed, rows, rows), out_shardings=(None, placed))
        return jitted(jax.device_put(state, placed), TOKENS, SEGMENTS)


def assert_equal(found, expected):
    """Loss and gradients of two runs."""
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-5)
