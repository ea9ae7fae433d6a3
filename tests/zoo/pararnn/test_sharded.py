"""Eight devices compute what one does."""

import dataclasses

import jax
import pytest
from flax import nnx

from hackle import pjit_configs
from hackle.pjit_configs import ConfigError
from hackle.zoo.pararnn import ParaRNNConfig, ParaRNNLM
from tests.zoo import sharded

pytestmark = pytest.mark.devices(8)

SIZES = dict(vocab_size=sharded.VOCABULARY, width=32, mlp_width=48, depth=2, heads=4)


@pytest.fixture(scope="module", params=["gru", "lstm"])
def model(request):
    return nnx.split(ParaRNNLM(ParaRNNConfig(request.param, **SIZES), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def on_one_device(model):
    return sharded.on_one_device(model)


@pytest.mark.parametrize("name", ["cpu8_data", "cpu8_fsdp", "cpu8_tensor"])
def test_loss_and_gradients_equal_those_of_one_device(name, model, on_one_device):
    sharded.assert_equal(sharded.on_preset(pjit_configs.preset(name), model), on_one_device)


def test_time_over_devices_equals_one_device(model, on_one_device):
    preset = dataclasses.replace(pjit_configs.preset("cpu8_data"), mesh_shape={"data": 2, "seq": 4})
    sharded.assert_equal(sharded.on_preset(preset, model), on_one_device)


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
