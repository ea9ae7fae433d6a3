"""What the docstring of `hackle.layers.linen` says about methods, names and transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn

from hackle.layers import linen

KEY = jax.random.key(0)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return linen.GatedMLP(8, 16, name="mlp")(x), None


def test_another_method_is_named_or_called_on_a_bound_module():
    x, state = jax.random.normal(KEY, (2, 5, 8)), jnp.zeros((2, 16))
    gru = linen.ParaGRU(8, 16, heads=2)
    variables = gru.init(KEY, x)
    named, _ = gru.apply(variables, x[:, 0], state, nnx_method="step")
    bound, _ = gru.bind(variables).step(x[:, 0], state)
    np.testing.assert_array_equal(named, bound)
    np.testing.assert_allclose(named, gru.apply(variables, x)[0][:, 0], atol=1e-6)
    with pytest.raises(errors.CallCompactUnboundModuleError):
        gru.apply(variables, x[:, 0], state, method="step")


def test_another_method_inside_a_module():
    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x, state):
            return linen.ParaGRU(8, 16, heads=2, name="gru").step(x, state)

    class SetUp(nn.Module):
        def setup(self):
            self.gru = linen.ParaGRU(8, 16, heads=2)

        def __call__(self, x, state):
            return self.gru.step(x, state)

    x, state = jnp.ones((2, 8)), jnp.zeros((2, 16))
    variables = Compact().init(KEY, x, state)
    assert list(variables["params"]) == ["gru"]
    expected = Compact().apply(variables, x, state)
    np.testing.assert_array_equal(SetUp().apply(variables, x, state)[0], expected[0])


def test_unnamed_layers_are_numbered_in_order_of_construction():
    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm, mlp = linen.RMSNorm(8), linen.GatedMLP(8, 16)
            return linen.RMSNorm(8, name="last")(mlp(norm(x)))

    params = Mine().init(KEY, jnp.ones((2, 3, 8)))["params"]
    assert set(params) == {"ToLinen_0", "ToLinen_1", "last"}
    assert set(params["ToLinen_0"]) == {"scale"}
    assert set(params["ToLinen_1"]) == {"gate", "up", "down"}


def test_transforms_take_a_module_around_a_face_and_no_face():
    x = jnp.ones((2, 3, 8))
    with pytest.raises(AttributeError):
        nn.remat(linen.GatedMLP)(8, 16).init(KEY, x)
    variables = MLP().init(KEY, x)
    again, _ = nn.remat(MLP)().apply(variables, x)
    np.testing.assert_allclose(again, MLP().apply(variables, x)[0], atol=1e-6)
    scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    with pytest.raises(errors.PartitioningUnspecifiedError):
        nn.scan(MLP, **scan)().init(KEY, x, None)
    stack = nn.scan(MLP, **scan, metadata_params={nn.PARTITION_NAME: "layers"})()
    down = stack.init(KEY, x, None)["params"]["mlp"]["down"]["weight"]
    assert down.names == ("layers", "mlp", "embed") and down.value.shape == (3, 16, 8)
