"""Norm, rotary, MLP, embedding, linear, stack, sharding names, Linen faces."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import hackle.layers as layers
from hackle.layers import linen


def test_rmsnorm_is_its_equation_and_float32_inside():
    x = np.random.default_rng(0).normal(size=(3, 5, 8)) * 30
    norm = layers.RMSNorm(8, 1e-5, rngs=nnx.Rngs(0))
    norm.scale.set_value(jnp.arange(8.0))
    expected = np.arange(8.0) * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)
    half = norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float64), expected, rtol=2e-2, atol=1e-6)


def test_rotary_is_a_rotation_by_relative_position():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, 1, 8))
    turned = layers.rotary(jnp.asarray(x, jnp.float32), jnp.asarray([[5]]), 100.0)[0, 0, 0]
    angle = 5 * 100.0 ** (-np.arange(0, 8, 2) / 8)
    pairs = (x[0, 0, 0, :4] + 1j * x[0, 0, 0, 4:]) * np.exp(1j * angle)
    np.testing.assert_allclose(turned, np.concatenate([pairs.real, pairs.imag]), atol=1e-6)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 8)), jnp.float32)

    def score(i, j):
        return jnp.sum(layers.rotary(q, jnp.asarray([[i]])) * layers.rotary(k, jnp.asarray([[j]])))

    np.testing.assert_allclose(score(7, 3), score(104, 100), atol=1e-5)
    np.testing.assert_array_equal(layers.rotary(q, jnp.asarray([[0]])), q)
    with pytest.raises(ValueError, match="even head width, got 7"):
        layers.rotary(q[..., :7], jnp.asarray([[0]]))


def test_gated_mlp_is_its_equation():
    mlp = layers.GatedMLP(4, 6, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 4))
    gate, up, down = (np.asarray(m.weight[...], np.float64) for m in (mlp.gate, mlp.up, mlp.down))
    hidden = x @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)), expected, atol=1e-7)


def test_gradients_of_a_token_add_up_in_float32():
    """300 of them, of which a bfloat16 sum would lose all after the 256th."""
    table = layers.Embedding(5, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(table)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    tokens = jnp.asarray([3] * 300 + [1, -1, 5])  # the last two are no rows

    def loss(state):
        rows = nnx.merge(graph, state)(tokens)
        return jnp.nansum(rows.astype(jnp.float32) * 2.0)

    (gradient,) = jax.tree.leaves(jax.grad(loss)(half))
    assert gradient.dtype == jnp.bfloat16
    want = np.asarray([0, 2, 0, 600, 0])[:, None].repeat(3, 1)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), want)


def test_embedding_both_ways_and_out_of_range():
    table = layers.Embedding(5, 3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(
        table(jnp.asarray([[4, 0]]))[0], table.weight[...][jnp.asarray([4, 0])]
    )
    x = table(jnp.asarray([1, 2])).astype(jnp.bfloat16)
    logits = table.attend(x)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 5)
    for outside in (5, -1):
        assert np.isnan(table(jnp.asarray([outside]))).all(), "it must not read another row"


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)])
def test_gradients_of_the_head(dtype, atol):
    rng = np.random.default_rng(0)
    x, w, g = (rng.normal(size=size) for size in ((3, 5, 4), (4, 7), (3, 5, 7)))
    x = jnp.asarray(x, dtype)
    weight = jnp.asarray(w, jnp.float32)
    logits, pull = jax.vjp(layers.project_to_vocabulary, x, weight)
    dx, dw = pull(jnp.asarray(g, jnp.float32))
    assert (logits.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(logits, exact @ w, atol=atol)
    np.testing.assert_allclose(np.asarray(dx, np.float64), g @ w.T, atol=atol)
    np.testing.assert_allclose(dw, np.einsum("abd,abv->dv", exact, g), atol=2 * atol)


def test_linear_contracts_groups_of_axes():
    layer = layers.Linear(
        (2, 3), (4,), ("heads", "head_width", "embed"), bias=True, rngs=nnx.Rngs(0)
    )
    layer.bias.set_value(jnp.arange(4.0))
    x = np.random.default_rng(0).normal(size=(5, 2, 3))
    expected = np.einsum("nhe,hed->nd", x, np.asarray(layer.weight[...])) + np.arange(4.0)
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)
    assert layer.bias.get_metadata("axes") == ("embed",)


def make_block(rngs):
    return layers.GatedMLP(4, 8, rngs=rngs)


@pytest.mark.parametrize("remat", layers.REMAT_POLICIES)
def test_stack_equals_a_loop_over_its_layers(remat):
    stack = layers.Stack(make_block, 3, rngs=nnx.Rngs(1))
    graph, state = nnx.split(stack)
    block = nnx.split(stack.block)[0]
    assert state["block"]["gate"]["weight"].get_metadata("axes") == ("layers", "embed", "mlp")
    x = jax.random.normal(jax.random.key(0), (2, 4)) * 10

    def scanned(state, x):
        out, ys = nnx.merge(graph, state).scan(
            lambda b, x, i: (x + b(x), i * 2), x, jnp.arange(3), remat=remat
        )
        return jnp.sum(out**2), ys

    def looped(state, x):
        for i in range(3):
            x = x + nnx.merge(block, jax.tree.map(lambda a, i=i: a[i], state["block"]))(x)
        return jnp.sum(x**2)

    (value, ys), grads = jax.value_and_grad(scanned, has_aux=True)(state, x)
    expected, expected_grads = jax.value_and_grad(looped)(state, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(ys, [0, 2, 4])
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-7)
    weights = np.asarray(state["block"]["gate"]["weight"][...])
    assert not np.array_equal(weights[0], weights[1]), "every layer draws its own weights"


def test_stack_refuses_unknown_remat_and_no_depth():
    stack = layers.Stack(make_block, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="unknown remat policy 'some'"):
        stack.scan(lambda b, x, _: (x, None), jnp.ones(4), remat="some")
    with pytest.raises(ValueError, match="depth >= 1, got 0"):
        layers.Stack(make_block, 0, rngs=nnx.Rngs(0))


def test_parameter_needs_a_name_per_dimension():
    with pytest.raises(ValueError, match="needs 2 axis names"):
        layers.parameter(nnx.Rngs(0), (2, 3), ("embed",), nnx.initializers.zeros)
    with pytest.raises(ValueError, match="every size must be >= 1"):
        layers.parameter(nnx.Rngs(0), (0,), ("embed",), nnx.initializers.zeros)


def test_linen_faces_compute_the_same_and_name_their_axes():
    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.GatedMLP(8, 16)(linen.RMSNorm(8)(x))

    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    variables = Mine().init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)["params"]["ToLinen_0"]
    assert tuple(specs["down"]["weight"]) == ("mlp", "embed")
    params = nn.unbox(variables)["params"]["ToLinen_0"]
    mlp = layers.GatedMLP(8, 16, rngs=nnx.Rngs(0))
    for name in ("gate", "up", "down"):
        getattr(mlp, name).weight.set_value(params[name]["weight"])
    expected = mlp(layers.RMSNorm(8, rngs=nnx.Rngs(0))(x))
    np.testing.assert_allclose(Mine().apply(variables, x), expected, atol=1e-6)


def test_every_layer_class_has_a_linen_face():
    with_parameters = {"Stack"}  # takes blocks, has no parameters of its own
    for module in (layers, layers.parscale, layers.recurrent):
        for name in module.__all__:
            member = getattr(module, name)
            if isinstance(member, type) and issubclass(member, nnx.Module):
                assert name in with_parameters or hasattr(linen, name), name


def test_linen_prefix_and_aggregator():
    tokens = jnp.ones((3, 2, 5, 2, 8))
    prefix = linen.StreamPrefix(3, 2, 4, 8)
    variables = prefix.init(jax.random.key(0), tokens, tokens, None, nnx_method="prepend")
    key, value, mask = prefix.apply(variables, tokens, tokens, None, nnx_method="prepend")
    assert key.shape == value.shape == (3, 2, 9, 2, 8) and mask.length == 4
    join = linen.StreamAggregator(3, 8)
    streams = jax.random.normal(jax.random.key(0), (3, 2, 5, 8))
    variables = join.init(jax.random.key(0), streams)
    assert join.apply(variables, streams).shape == (2, 5, 8)
