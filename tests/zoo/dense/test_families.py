"""What distinguishes the families of dense decoders holds with a cache and in training, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.layers import Llama3Scaling, SelfAttention, masks
from hackle.zoo.dense import DenseConfig, DenseLM
from hackle.zoo.parscale import retrofit

FAMILIES = {
    "qwen3": dict(qkv_bias=False, qk_norm=True),
    "llama": dict(qkv_bias=False, rope_scaling=Llama3Scaling(8.0, original_length=32)),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 11)), jnp.int32)


def make(family):
    sizes = dict(vocab_size=61, width=16, mlp_width=24, depth=2, heads=4, kv_heads=2, head_width=8)
    config = DenseConfig(**sizes, max_length=64, rope_theta=50.0, **FAMILIES[family])
    model = DenseLM(config, rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(model))
    for path, v in flat:
        v.set_value(v[...] * (1 if path[-1] == "scale" else 10))
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_equals_the_full_pass(family):
    model = make(family)
    cache, out = model.init_cache(2, 16), []
    extend = nnx.jit(lambda m, t, c: m.extend(t, c))
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        features, cache = extend(model, TOKENS[:, start:stop], cache)
        out.append(features)
    np.testing.assert_allclose(model.logits(jnp.concatenate(out, axis=1)), model(TOKENS), atol=1e-5)


def test_heads_are_normed_before_they_are_rotated():
    layer = SelfAttention(6, 2, 1, 4, qk_norm=True, norm_eps=1e-3, rngs=nnx.Rngs(0))
    layer.query_norm.scale.set_value(jnp.asarray([1.0, 2.0, 3.0, 4.0]))
    layer.key_norm.scale.set_value(jnp.asarray([0.5, 0.25, 2.0, 1.0]))
    x = jax.random.normal(jax.random.key(0), (1, 3, 6))
    at_zero = jnp.zeros((1, 3), jnp.int32)
    query, key, value = layer.project(x, at_zero)
    for found, linear, scale in (
        (query, layer.query, [1, 2, 3, 4]),
        (key, layer.key, [0.5, 0.25, 2, 1]),
    ):
        raw = np.einsum("bld,dhe->blhe", x, linear.weight[...])
        expected = raw / np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-3) * np.array(scale)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = np.einsum("bld,dhe->blhe", x, layer.value.weight[...])
    np.testing.assert_allclose(value, plain, atol=1e-6)
    # A rotation keeps lengths: norming afterwards would give another result.
    turned, _, _ = layer.project(x, at_zero + 7)
    lengths = [np.linalg.norm(np.asarray(q), axis=-1) for q in (turned, query)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    assert layer(x, at_zero, masks.Causal()).shape == x.shape


def test_gradients_reach_the_norms_of_query_and_key():
    graph, state = nnx.split(make("qwen3"))
    grads = jax.jit(jax.grad(lambda s: nnx.merge(graph, s)(TOKENS).std()))(state)
    attention = grads["blocks"]["block"]["attention"]
    for name in ("query_norm", "key_norm"):
        found = np.abs(attention[name]["scale"][...])
        assert found.shape == (2, 8) and (found > 0).all(), name


@pytest.mark.parametrize("field", ["qk_norm", "rope_scaling"])
def test_streams_are_built_around_qwen2_alone(field):
    changes = {"qk_norm": True} if field == "qk_norm" else {"rope_scaling": Llama3Scaling(8.0)}
    model = nnx.eval_shape(lambda: DenseLM(DenseConfig.tiny(**changes), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=f"a ParScale trunk has no {field}; this one has"):
        retrofit(model, 2, rngs=nnx.Rngs(0))
