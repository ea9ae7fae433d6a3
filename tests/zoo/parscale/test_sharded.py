"""Eight devices compute what one does, and streams meet only where they are joined."""

import re

import jax
import pytest
from flax import nnx

from hackle import pjit_configs
from hackle.layers.sharding import axis_rules
from hackle.pjit_configs.sharding import batch_sharding
from hackle.zoo.parscale import ParScaleConfig, ParScaleLM
from tests.zoo import sharded
from tests.zoo.sharded import TOKENS

pytestmark = pytest.mark.devices(8)

CONFIG = ParScaleConfig.tiny(
    4,
    vocab_size=sharded.VOCABULARY,
    width=32,
    mlp_width=48,
    depth=3,
    heads=8,
    kv_heads=8,
    head_width=4,
)


@pytest.fixture(scope="module")
def model():
    return nnx.split(ParScaleLM(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def on_one_device(model):
    return sharded.on_one_device(model)


@pytest.mark.parametrize(
    "name",
    ["cpu8_data", "cpu8_fsdp", "cpu8_tensor", "cpu8_stream", "cpu8_fsdp_stream_tensor"],
)
def test_loss_and_gradients_equal_those_of_one_device(name, model, on_one_device):
    sharded.assert_equal(sharded.on_preset(pjit_configs.preset(name), model), on_one_device)


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
