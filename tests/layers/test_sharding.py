"""Logical names of activations: where they lie, and rules that do not fit the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from hackle.layers.recurrent import ParaGRU, gru
from hackle.layers.sharding import axis_rules, constrain, mesh_axes


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((1, 4, 2), ("data", "seq", "tensor"), axis_types=(kind,) * 3)


def test_constrain_does_nothing_without_rules_or_mesh_and_names_what_is_wrong():
    x = jnp.ones((4, 2))
    assert constrain(x, "batch", None) is x
    with axis_rules({"batch": "data"}):
        assert constrain(x, "batch", None) is x
        with pytest.raises(ValueError, match="needs 2 names"):
            constrain(x, "batch")


@pytest.mark.devices(8)
def test_constrain_places_activations():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), axis_rules({"batch": "data", "mlp": "tensor"}):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "mlp"))(jnp.ones((8, 4)))
        assert y.sharding.spec == jax.sharding.PartitionSpec("data", "tensor")
        with pytest.raises(KeyError, match="no rule for logical axis 'heads'"):
            constrain(jnp.ones((8, 4)), "batch", "heads")


@pytest.mark.devices(8)
def test_mesh_axes_of_one_device_are_left_out():
    rules = {"batch": ("data", "tensor"), "length": "seq", "state": "data", "embed": None}
    assert mesh_axes("batch", None, "anything") == ((), (), ())
    with jax.set_mesh(make_mesh()), axis_rules(rules):
        assert mesh_axes("batch", None, "length") == (("tensor",), (), ("seq",))
        assert mesh_axes("state", "embed") == ((), ())


REFUSALS = [
    (
        {"batch": "date"},
        r"rule batch -> 'date': mesh axis 'date'; expected one of \['data', 'seq', ",
    ),
    (
        {"state": "seq"},
        "rule state -> 'seq': mesh axis 'seq' already splits 'length' of this array",
    ),
    ({"batch": ("seq", "seq")}, "mesh axis 'seq' already splits 'batch' of this array"),
]
RULES = {"batch": "data", "length": "seq", "state": "tensor"}


def constrained(u):
    return constrain(u, "batch", "length", None, "state")


def recurrence(u):
    return gru(u, jnp.zeros((3, 4)))


@pytest.mark.devices(8)
@pytest.mark.parametrize("run", [constrained, recurrence])
@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_rules_that_do_not_fit_the_mesh_are_named(run, change, message):
    with (
        jax.set_mesh(make_mesh()),
        axis_rules({**RULES, **change}),
        pytest.raises(ValueError, match=message),
    ):
        run(jnp.zeros((2, 8, 3, 4)))


@pytest.mark.devices(8)
@pytest.mark.parametrize("run", [constrained, recurrence])
def test_meshes_of_explicit_axes_are_refused(run):
    """`jax.make_mesh` makes them so unless told otherwise."""
    with (
        jax.set_mesh(make_mesh(AxisType.Explicit)),
        axis_rules(RULES),
        pytest.raises(ValueError, match="mesh axis 'data' is Explicit; expected Auto, as in jax.m"),
    ):
        run(jnp.zeros((2, 8, 3, 4)))


@pytest.mark.devices(8)
def test_a_layer_over_a_mesh_equals_one_device():
    """ParaGRU as the README does it, with padding and packed rows."""
    layer = ParaGRU(6, 8, heads=2, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 6)), jnp.float32)
    reset, lengths = jnp.zeros((2, 64), bool).at[:, 20].set(True), jnp.asarray([64, 33])
    expected = layer(x, reset=reset, lengths=lengths)

    @nnx.jit
    def run(layer, x):
        with axis_rules(RULES):
            return layer(x, reset=reset, lengths=lengths)

    with jax.set_mesh(make_mesh()):
        spec = jax.sharding.NamedSharding(make_mesh(), PartitionSpec("data", "seq"))
        y, state = run(layer, jax.device_put(x, spec))
    assert len(y.sharding.device_set) == 8 and y.addressable_shards[0].data.shape == (2, 16, 4)
    np.testing.assert_allclose(y, expected[0], atol=2e-6)
    np.testing.assert_allclose(state, expected[1], atol=2e-6)
