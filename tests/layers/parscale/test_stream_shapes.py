"""Prefix and aggregator: what they refuse, by its message, and the prefix in front of attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.layers import attention, linen, masks, parscale

P, B, L, K, E, LENGTH, D = 4, 2, 5, 2, 8, 3, 6


@pytest.fixture
def aggregator():
    return parscale.StreamAggregator(P, D, rngs=nnx.Rngs(0))


@pytest.fixture
def prefix():
    return parscale.StreamPrefix(P, K, LENGTH, E, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((B, L, D), "float32", r"\[streams, batch, length, width\], got shape \(2, 5, 6\)"),
        ((P, B, L, K, D), "float32", r"got shape \(4, 2, 5, 2, 6\)"),
        ((3, B, L, D), "float32", "expected 4 streams on the leading axis, got 3 in shape"),
        ((P, B, L, 7), "float32", "expected width 6 on the last axis, got 7 in shape"),
        ((P, B, L, 1), "float32", "expected width 6 on the last axis, got 1 in shape"),
        ((P, B, L, D), "int32", "must be floating-point, got int32"),
    ],
)
def test_aggregator_refuses_other_arrays(aggregator, shape, dtype, message):
    for call in (aggregator, aggregator.weights):
        with pytest.raises(ValueError, match=f"StreamAggregator: .*{message}"):
            call(jnp.ones(shape, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_aggregator_takes_every_float(aggregator, dtype):
    joined = aggregator(jnp.ones((P, B, L, D), dtype))
    assert joined.shape == (B, L, D) and joined.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((B, L, K, E), "float32", r"kv_heads, head_width\], got shape \(2, 5, 2, 8\)"),
        ((3, B, L, K, E), "float32", "must have streams 4 on axis 0, got 3 in shape"),
        ((1, B, L, K, E), "float32", "must have streams 4 on axis 0, got 1 in shape"),
        ((P, B, L, 3, E), "float32", "must have kv_heads 2 on axis 3, got 3 in shape"),
        ((P, B, L, K, 4), "float32", "must have head_width 8 on axis 4, got 4 in shape"),
        ((P, B, L, K, E), "int32", "must be floating-point, got int32"),
    ],
)
def test_prefix_refuses_other_arrays(prefix, shape, dtype, message):
    good, bad = jnp.ones((P, B, L, K, E)), jnp.ones(shape, dtype)
    with pytest.raises(ValueError, match=f"StreamPrefix: key .*{message}"):
        prefix.prepend(bad, good, None)
    with pytest.raises(ValueError, match=f"StreamPrefix: value .*{message}"):
        prefix.prepend(good, bad, None)


def test_prefix_refuses_keys_and_values_of_two_lengths(prefix):
    with pytest.raises(ValueError, match=r"key \(4, 2, 5, 2, 8\) and value \(4, 2, 6, 2, 8\)"):
        prefix.prepend(jnp.ones((P, B, L, K, E)), jnp.ones((P, B, L + 1, K, E)), None)


def test_attention_over_a_prefix_as_its_docstring_says(prefix):
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (P, B, L, 2 * K, E))
    key, value = (jax.random.normal(k, (P, B, L, K, E)) for k in keys[1:])
    longer, values, mask = prefix.prepend(key, value, masks.Causal())
    assert longer.shape == values.shape == (P, B, LENGTH + L, K, E)
    out = jax.vmap(lambda q, k, v: attention(q, k, v, mask=mask))(query, longer, values)
    assert out.shape == query.shape
    for p in range(P):  # each stream alone, its prefix put there by hand
        first = [jnp.stack([a[p].swapaxes(0, 1)] * B) for a in (prefix.key, prefix.value)]
        k, v = jnp.concatenate([first[0], key[p]], 1), jnp.concatenate([first[1], value[p]], 1)
        alone = attention(query[p], k, v, mask=masks.Prefix(LENGTH, masks.Causal()))
        np.testing.assert_allclose(out[p], alone, atol=1e-6)
    with pytest.raises(ValueError, match="query must be"):
        attention(query, longer, values, mask=mask)


def test_linen_prefix_is_made_and_called_without_naming_its_method():
    tokens = jnp.ones((P, B, L, K, E))
    face = linen.StreamPrefix(P, K, LENGTH, E)
    variables = face.init(jax.random.key(0), tokens, tokens, None)
    called = face.apply(variables, tokens, tokens, None)
    named = face.apply(variables, tokens, tokens, None, nnx_method="prepend")
    bound = face.bind(variables).prepend(tokens, tokens, None)
    for other in (named, bound):
        assert other[2] == called[2] == masks.Prefix(LENGTH)
        np.testing.assert_array_equal(other[0], called[0])
        np.testing.assert_array_equal(other[1], called[1])
