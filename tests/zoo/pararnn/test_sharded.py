"""Eight devices compute what one does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import pjit_configs
from hackle.layers.sharding import axis_rules
from hackle.pjit_configs import ConfigError
from hackle.pjit_configs.sharding import batch_sharding
from hackle.zoo.pararnn import ParaRNNConfig, ParaRNNLM

pytestmark = pytest.mark.devices(8)

SIZES = dict(vocab_size=64, width=32, mlp_width=48, depth=2, heads=4)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
SEGMENTS = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], 8, axis=0).astype(np.int32)


@pytest.fixture(scope="module", params=["gru", "lstm"])
def model(request):
    return nnx.split(ParaRNNLM(ParaRNNConfig(request.param, **SIZES), rngs=nnx.Rngs(0)))


def loss(graph, state, tokens, segments):
    scores = jax.nn.log_softmax(nnx.merge(graph, state)(tokens, segment_ids=segments)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


@pytest.fixture(scope="module")
def on_one_device(model):
    graph, state = model
    return jax.jit(jax.value_and_grad(lambda s: loss(graph, s, TOKENS, SEGMENTS)))(state)


@pytest.mark.parametrize("name", ["cpu8_data", "cpu8_fsdp", "cpu8_tensor"])
def test_loss_and_gradients_equal_those_of_one_device(name, model, on_one_device):
    graph, state = model
    preset = pjit_configs.preset(name)
    mesh = preset.mesh()
    assert mesh.size == 8
    placed = preset.shardings(state)
    rows = batch_sharding(mesh)

    def run(state, tokens, segments):
        with axis_rules(preset.rules):
            return jax.value_and_grad(lambda s: loss(graph, s, tokens, segments))(state)

    with jax.set_mesh(mesh):
        value, grads = jax.jit(
            run, in_shardings=(placed, rows, rows), out_shardings=(None, placed)
        )(jax.device_put(state, placed), TOKENS, SEGMENTS)
    expected, expected_grads = on_one_device
    np.testing.assert_allclose(value, expected, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected_grads), atol=1e-5)


def test_tensor_parallelism_splits_channels_and_heads(model):
    _, state = model
    preset = pjit_configs.preset("cpu8_tensor")
    parts = preset.mesh().shape["tensor"]
    placed = jax.device_put(state, preset.shardings(state))
    cell = placed["blocks"]["block"]["mixer"]["cell"]
    for name in ("weight", "state_weight", "bias"):
        array = cell[name][...]
        assert array.addressable_shards[0].data.size * parts == array.size, name


def test_heads_that_do_not_divide_are_refused_by_name():
    config = ParaRNNConfig("gru", **{**SIZES, "heads": 1})
    _, state = nnx.split(nnx.eval_shape(lambda: ParaRNNLM(config, rngs=nnx.Rngs(0))))
    with pytest.raises(ConfigError, match=r"mixer.cell.weight: dimension 1 \(heads\) of size 1"):
        pjit_configs.preset("cpu8_tensor").shardings(state)
