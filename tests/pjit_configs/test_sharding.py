"""From logical axes to shardings: structure, moments, refusals, and arrays that land there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from hackle.layers import parameter
from hackle.pjit_configs import (
    ConfigError,
    batch_sharding,
    build_mesh,
    bytes_per_device,
    check_batch,
    partition_specs,
    preset,
    rule_table,
    shardings,
)

SIZES = dict(data=1, fsdp=4, stream=1, seq=1, tensor=2)


class Module(nnx.Module):
    """One parameter of the given shape and axes, and something without axes."""

    def __init__(self, shape, axes, rngs):
        self.inner = nnx.Dict(weight=parameter(rngs, shape, axes, nnx.initializers.ones))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))


def abstract(shape=(8, 6), axes=("embed", "mlp")):
    return nnx.split(nnx.eval_shape(lambda: Module(shape, axes, nnx.Rngs(0))))[1]


def specs(shape, axes, rules=None, sizes=SIZES):
    return partition_specs(abstract(shape, axes), rules or rule_table("fsdp_tensor"), sizes)


def test_spec_follows_the_rules_and_keeps_the_structure():
    tree = abstract()
    found = partition_specs(tree, rule_table("fsdp_tensor"), SIZES)
    assert found["inner"]["weight"].get_value() == PartitionSpec("fsdp", "tensor")
    assert found["count"].get_value() == PartitionSpec()
    marker = jax.tree.map(lambda _: 0, found, is_leaf=lambda x: isinstance(x, PartitionSpec))
    assert jax.tree.structure(marker) == jax.tree.structure(tree)


def test_a_rule_over_several_mesh_axes_divides_by_their_product():
    rules = {**rule_table("data"), "embed": ("fsdp", "tensor")}
    assert specs((8,), ("embed",), rules)["inner"]["weight"].get_value() == PartitionSpec(
        ("fsdp", "tensor")
    )
    with pytest.raises(ConfigError, match="size 12 does not divide over fsdp=4 x tensor=2"):
        specs((12,), ("embed",), rules)


def test_dimension_that_does_not_divide_names_the_parameter():
    with pytest.raises(ConfigError) as caught:
        specs((8, 7), ("embed", "mlp"))
    assert str(caught.value) == (
        "inner.weight: dimension 1 (mlp) of size 7 does not divide over tensor=2"
    )


def test_mesh_axis_used_twice_names_the_parameter_even_at_size_one():
    for sizes in (SIZES, {**SIZES, "tensor": 1}):
        with pytest.raises(ConfigError) as caught:
            specs((4, 4), ("heads", "mlp"), sizes=sizes)
        message = str(caught.value)
        for word in ("inner.weight", "'tensor' is used twice", "'heads'", "'mlp'", "(4, 4)"):
            assert word in message


def test_axis_without_a_rule_and_rule_without_a_mesh_axis():
    with pytest.raises(ConfigError, match=r"inner\.weight: no rule for logical axis 'width'"):
        specs((8,), ("width",))
    with pytest.raises(ConfigError, match=r"inner\.weight: rule embed -> 'model'"):
        specs((8,), ("embed",), {"embed": "model"})


@pytest.mark.devices(8)
def test_moments_of_an_optimiser_lie_where_their_parameters_do():
    mesh = build_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    params = nnx.filter_state(abstract(), nnx.Param)
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    placed = shardings(state, rule_table("fsdp_tensor"), mesh)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for moment in (placed[0].mu, placed[0].nu):
        assert moment["inner"]["weight"].get_value().spec == PartitionSpec("fsdp", "tensor")
    assert placed[0].count == NamedSharding(mesh, PartitionSpec())


@pytest.mark.devices(8)
def test_arrays_are_made_in_place_and_bytes_are_counted():
    mesh = build_mesh({"fsdp": 4, "tensor": 2}, jax.devices()[:8])
    tree = abstract()
    placed = shardings(tree, rule_table("fsdp_tensor"), mesh)

    def make():
        return nnx.split(Module((8, 6), ("embed", "mlp"), nnx.Rngs(0)))[1]

    state = jax.jit(make, out_shardings=placed)()
    weight = state["inner"]["weight"][...]
    assert {shard.data.shape for shard in weight.addressable_shards} == {(2, 3)}
    again = jax.device_put(state, placed)
    np.testing.assert_array_equal(again["inner"]["weight"][...], np.ones((8, 6)))
    first = jax.devices()[0]
    there = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert bytes_per_device(tree, placed) == there == 2 * 3 * 4 + 4


@pytest.mark.devices(8)
def test_preset_places_a_state_on_its_own_mesh():
    found = preset("cpu8_fsdp")
    placed = found.shardings(abstract())
    weight = placed["inner"]["weight"].get_value()
    assert weight.spec == PartitionSpec("fsdp", None)
    assert weight.mesh == found.mesh()
    with pytest.raises(ConfigError, match=r"inner\.weight: dimension 0 \(embed\) of size 6"):
        found.shardings(abstract((6, 8)))


@pytest.mark.devices(8)
def test_batch_lies_over_rows_and_segments():
    mesh = build_mesh({"data": 2, "fsdp": 2, "seq": 2}, jax.devices()[:8])
    batch = jax.device_put(jnp.zeros((8, 6)), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
    check_batch(mesh, 8, 6)
    for rows in (6, 0):
        with pytest.raises(ConfigError, match=f"batch of {rows} rows .* multiple of 4"):
            check_batch(mesh, rows, 6)
    with pytest.raises(ConfigError, match="row length 7 does not divide over seq=2"):
        check_batch(mesh, 8, 7)
