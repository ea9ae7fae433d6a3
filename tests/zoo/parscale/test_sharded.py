"""Eight devices compute what one does, and streams meet only where they are joined."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import pjit_configs
from hackle.layers.sharding import axis_rules
from hackle.pjit_configs.sharding import batch_sharding
from hackle.zoo.parscale import ParScaleConfig, ParScaleLM

pytestmark = pytest.mark.devices(8)

CONFIG = ParScaleConfig.tiny(
    4, vocab_size=64, width=32, mlp_width=48, depth=3, heads=8, kv_heads=8, head_width=4
)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
SEGMENTS = np.repeat([[1] * 7 + [2] * 6 + [0] * 3], 8, axis=0).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return nnx.split(ParScaleLM(CONFIG, rngs=nnx.Rngs(0)))


def loss(graph, state, tokens, segments):
    scores = jax.nn.log_softmax(nnx.merge(graph, state)(tokens, segment_ids=segments)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


@pytest.fixture(scope="module")
def on_one_device(model):
    graph, state = model
    return jax.jit(jax.value_and_grad(lambda s: loss(graph, s, TOKENS, SEGMENTS)))(state)


@pytest.mark.parametrize(
    "name",
    ["cpu8_data", "cpu8_fsdp", "cpu8_tensor", "cpu8_stream", "cpu8_fsdp_stream_tensor"],
)
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


COLLECTIVE = re.compile(
    r"= (?P<shape>.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\((?P<rest>.*)"
)


def collectives(compiled):
    return [m for line in compiled.as_text().splitlines() if (m := COLLECTIVE.search(line))]


def test_streams_meet_only_in_the_aggregator(model):
    """On a mesh of streams the trunk communicates nothing; the join costs two all-reduces."""
    graph, state = model
    preset = pjit_configs.preset("cpu8_stream")
    mesh = preset.mesh()
    placed = preset.shardings(state)

    def features(state, tokens):
        with axis_rules(preset.rules):
            return nnx.merge(graph, state).features(tokens)

    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh)
        compiled = (
            jax.jit(features, in_shardings=(placed, rows), out_shardings=rows)
            .lower(state, TOKENS)
            .compile()
        )
    found = collectives(compiled)
    local = TOKENS.shape[0] // (mesh.shape["data"] * mesh.shape["fsdp"])
    joined = f"f32[{local},{TOKENS.shape[1]},{CONFIG.width}]"
    assert [m["shape"].split("{")[0] for m in found] == [joined, joined]
    assert ["pbld,pde->ble" in m["rest"] or "pbld,blp->bld" in m["rest"] for m in found] == [
        True
    ] * 2
    body = [line for line in compiled.as_text().splitlines() if "/while/body/" in line]
    assert body, "the trunk is a loop over its layers"
    assert not [line for line in body if COLLECTIVE.search(line)]


def test_the_collective_check_can_fail(model):
    """The same text of a tensor mesh does show collectives in the trunk."""
    graph, state = model
    preset = pjit_configs.preset("cpu8_tensor")
    mesh = preset.mesh()
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(
                lambda s, t: nnx.merge(graph, s).features(t),
                in_shardings=(preset.shardings(state), batch_sharding(mesh)),
            )
            .lower(state, TOKENS)
            .compile()
        )
    assert [m for m in collectives(compiled) if "/while/body/" in m["rest"]]
