"""Loading onto meshes: every device reads its part, and the parts make the whole."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from hackle import pjit_configs, zoo
from hackle.zoo import UserError, registry
from hackle.zoo.weights.folder import abstract_model, open_checkpoint
from hackle.zoo.weights.placement import MESH_AXIS, placement
from tests.zoo.golden import write_golden_checkpoint
from tests.zoo.published import assert_same_tensors, stored


@pytest.fixture
def golden(tmp_path):
    return write_golden_checkpoint(tmp_path / "golden", 3)


def some_config(name):
    wide = dict(vocab_size=64, width=32, mlp_width=48, depth=2, heads=4)
    if name.startswith("pararnn"):
        return wide
    wide |= dict(kv_heads=4, head_width=8)
    return {**wide, "tie_embeddings": False} if name.startswith("dense") else wide


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["dense-tiny", "parscale-tiny-p2", "pararnn-tiny-lstm"])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (1, 2, 2, 1, 2), (2, 1, 1, 1, 4)])
@pytest.mark.parametrize("how", ["mesh", "preset"])
def test_sharded_loading_equals_unsharded(tmp_path, name, shape, how):
    model = zoo.create(name, rngs=nnx.Rngs(1), **some_config(name))
    zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=50_000)
    sizes = dict(zip(pjit_configs.MESH_AXES, shape, strict=True))
    mesh = pjit_configs.build_mesh(sizes)
    rules = pjit_configs.rule_table("fsdp_tensor")
    expected = pjit_configs.shardings(nnx.state(model), rules, mesh)
    if how == "preset":
        mesh = pjit_configs.Preset(
            name="x", description="x", chip=None, mesh_shape=sizes, rules=rules
        )
    loaded = zoo.from_pretrained(tmp_path / "out", mesh=mesh)
    placed = jax.tree.map(lambda x: x.sharding, nnx.state(loaded))
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(placed), strict=True):
        assert got.spec == want.spec and got.mesh == want.mesh
    gate = loaded.blocks.block.mlp.gate.weight[...]
    assert gate.addressable_shards[0].data.size * shape[1] * shape[4] == gate.size
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, nnx.state(loaded)), jax.tree.map(np.asarray, nnx.state(model))
    )
    # And a sharded model is written as the one it equals.
    zoo.save_pretrained(loaded, tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "again"))


@pytest.mark.devices(8)
def test_only_the_parts_of_a_device_are_read(tmp_path, monkeypatch):
    model = zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(1), **some_config("parscale"))
    zoo.save_pretrained(model, tmp_path / "out")
    made = []
    empty = np.empty
    monkeypatch.setattr(
        np, "empty", lambda shape, *a, **k: made.append(tuple(shape)) or empty(shape, *a, **k)
    )
    zoo.from_pretrained(tmp_path / "out", mesh=pjit_configs.build_mesh({"fsdp": 8}))
    monkeypatch.undo()
    assert (2, 4, 48) in made and (2, 32, 48) not in made


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_a_plain_mesh_places_as_the_rule_table_does(family):
    names = {
        "dense": "qwen3-8b",
        "parscale": "parscale-1.8b-p4",
        "multiverse": "multiverse-32b",
        "pararnn": "pararnn-7b-lstm",
    }
    config = zoo.entry(names[family]).config
    state = abstract_model(registry.FAMILIES[family], config)[1]
    sizes = dict(zip(pjit_configs.MESH_AXES, (1, 4, 4, 1, 2), strict=True))
    rules = pjit_configs.rule_table("fsdp_tensor")
    expected = pjit_configs.partition_specs(state, rules, sizes)
    for path, variable in nnx.to_flat_state(expected):
        axes = variable.get_metadata("axes")
        assert tuple(MESH_AXIS.get(axis) for axis in axes) == tuple(variable.get_value()), path


def test_meshes_that_do_not_fit_are_refused(golden):
    state = abstract_model(registry.FAMILIES["parscale"], open_checkpoint(golden).config)[1]
    with pytest.raises(TypeError, match="mesh is a int"):
        placement(state, 8)


@pytest.mark.devices(8)
def test_a_dimension_that_does_not_divide_is_named(golden):
    mesh = pjit_configs.build_mesh({"tensor": 8})
    with pytest.raises(UserError, match=r"attention\.\w+\.\w+: (kv_)?heads of size \d"):
        zoo.from_pretrained(golden, mesh=mesh)
    preset = pjit_configs.Preset(
        name="x",
        description="x",
        chip=None,
        mesh_shape={"tensor": 8},
        rules=pjit_configs.rule_table("tensor"),
    )
    with pytest.raises(UserError, match="does not divide over tensor=8"):
        zoo.from_pretrained(golden, mesh=preset)


@pytest.mark.devices(8)
def test_a_mesh_with_fewer_axes_shards_over_those_it_has(golden):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4), ("fsdp",), axis_types=(AxisType.Auto,))
    model = zoo.from_pretrained(golden, mesh=mesh)
    assert model.embedding.weight[...].sharding.shard_shape((32, 16)) == (32, 4)


@pytest.mark.devices(8)
def test_a_mesh_with_strange_axes_is_refused(golden):
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8), ("data", "model"))
    with pytest.raises(UserError, match=r"mesh axis 'model' is none of hackle's \(data, fsdp"):
        zoo.from_pretrained(golden, mesh=mesh)


def test_without_a_mesh_parameters_are_not_tied_to_a_device(golden):
    assert not zoo.from_pretrained(golden).embedding.weight[...].committed
