"""What must hold for any ParScale model, whatever its weights."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.zoo.dense import DenseConfig, DenseLM
from hackle.zoo.generate import generate
from hackle.zoo.parscale import ParScaleConfig, ParScaleLM, is_stream_parameter, retrofit

SIZES = dict(
    vocab_size=61, width=16, mlp_width=24, depth=2, heads=4, kv_heads=2, head_width=4,
    max_length=64, prefix_length=3,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 11)), jnp.int32)


def make(streams, seed=0, **changes):
    """A model with large weights, so that every mistake shows."""
    model = ParScaleLM(
        ParScaleConfig(**{**SIZES, "streams": streams, **changes}), rngs=nnx.Rngs(seed)
    )
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, v in flat:
        v.set_value(v[...] * (1 if path[-1] == "scale" else 10))
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def copy(model):
    return nnx.clone(model)


def trunk(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state([(p, v) for p, v in flat if not is_stream_parameter(p)])


def test_one_stream_is_the_dense_model_exactly():
    model = make(1)
    sizes = {k: v for k, v in SIZES.items() if k != "prefix_length"}
    dense = DenseLM(DenseConfig(**sizes), rngs=nnx.Rngs(1))
    nnx.update(dense, nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(model(TOKENS), dense(TOKENS))
    assert not [p for p, _ in nnx.to_flat_state(nnx.state(model)) if is_stream_parameter(p)]


@pytest.mark.parametrize("streams", [2, 4, 8])
def test_no_prefix_makes_all_streams_equal_one(streams):
    one, many = make(1), make(streams, prefix_length=0)
    nnx.update(many, trunk(one))
    np.testing.assert_allclose(many(TOKENS), one(TOKENS), atol=1e-5)


def test_equal_prefixes_make_the_aggregator_irrelevant():
    model = make(3)
    prefix = model.blocks.block.attention.prefix
    for part in (prefix.key, prefix.value):
        part.set_value(jnp.broadcast_to(part[:, :1], part.shape))
    before = model(TOKENS)
    model.aggregator.output_weight.set_value(model.aggregator.output_weight * -3)
    model.aggregator.hidden_bias.set_value(model.aggregator.hidden_bias + 1)
    np.testing.assert_allclose(model(TOKENS), before, atol=1e-5)


def test_order_of_streams_does_not_matter():
    model, order = make(4), np.array([2, 0, 3, 1])
    mixed = copy(model)
    prefix, join = mixed.blocks.block.attention.prefix, mixed.aggregator
    for part in (prefix.key, prefix.value):
        part.set_value(part[:, order])
    join.hidden_weight.set_value(join.hidden_weight[order])
    join.output_weight.set_value(join.output_weight[:, order])
    join.output_bias.set_value(join.output_bias[order])
    np.testing.assert_allclose(mixed(TOKENS), model(TOKENS), atol=1e-5)
    join.output_bias.set_value(join.output_bias[order] + jnp.arange(4.0))
    assert np.abs(mixed(TOKENS) - model(TOKENS)).max() > 1e-3


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 6], [10, 1]])
def test_cache_equals_the_full_pass(streams, pieces):
    model = make(streams)
    cache = model.init_cache(2, 16)
    extend, out, at = nnx.jit(lambda m, t, c: m.extend(t, c)), [], 0
    for size in pieces:
        features, cache = extend(model, TOKENS[:, at : at + size], cache)
        out.append(features)
        at += size
    assert int(cache.length) == 11
    assert cache.key.shape == (2, *((4,) if streams > 1 else ()), 2, cache.prefix_length + 16, 2, 4)
    assert cache.prefix_length == (3 if streams > 1 else 0)
    np.testing.assert_allclose(model.logits(jnp.concatenate(out, axis=1)), model(TOKENS), atol=1e-5)


def test_cache_slots_are_prefix_then_tokens_then_empty():
    model = make(2)
    _, cache = model.extend(TOKENS[:, :4], model.init_cache(2, 6))
    prefix = model.blocks.block.attention.prefix
    for row in range(2):
        np.testing.assert_array_equal(
            cache.key[:, :, row, :3], np.swapaxes(prefix.key[...], 2, 3), "prefix, unrotated"
        )
    assert (np.asarray(cache.key[:, :, :, 3:7]) != 0).all()
    assert (np.asarray(cache.key[:, :, :, 7:]) == 0).all()
    assert cache.capacity == 6
    with pytest.raises(ValueError, match="3 tokens do not fit: 4 of 6 slots"):
        model.extend(TOKENS[:, :3], cache)


def test_unequal_rows_in_the_cache_do_not_disturb_each_other():
    model = make(3)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :2].tolist(), TOKENS[1, :5].tolist()]
    together = generate(model, prompts, max_new_tokens=5)
    assert together == [generate(model, [p], max_new_tokens=5)[0] for p in prompts]


@pytest.mark.parametrize("streams", [1, 3])
def test_packed_rows_equal_separate_rows(streams):
    model = make(streams)
    packed = model(TOKENS[:1], segment_ids=jnp.asarray([[1] * 4 + [2] * 5 + [0] * 2]))
    np.testing.assert_allclose(packed[0, :4], model(TOKENS[:1, :4])[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 4:9], model(TOKENS[:1, 4:9])[0], atol=1e-5)


def test_shifted_positions_change_models_with_prefixes_only():
    shifted = jnp.broadcast_to(jnp.arange(11) + 13, TOKENS.shape)
    for streams, differs in ((1, False), (4, True)):
        model = make(streams)
        change = np.abs(model(TOKENS, positions=shifted) - model(TOKENS)).max()
        assert (change > 1e-2) if differs else (change < 1e-4)


def loss(model, tokens):
    scores = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_reach_every_parameter_whatever_is_recomputed(remat):
    plain = make(3)
    graph, state = nnx.split(plain)
    grads = jax.grad(lambda s: loss(nnx.merge(graph, s), TOKENS))(state)
    for path, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad[...]).all() and np.abs(grad[...]).max() > 0, path
        if "prefix" in path:
            assert (np.abs(grad[...]).max(axis=(2, 3, 4)) > 0).all(), "a layer or stream is dead"
    again = nnx.split(make(3, remat=remat))[0]
    other = jax.grad(lambda s: loss(nnx.merge(again, s), TOKENS))(state)
    chex.assert_trees_all_close(grads, other, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_close():
    model = make(4, seed=3)
    nnx.update(model, jax.tree.map(lambda x: x / 3, nnx.state(model, nnx.Param)))
    exact = np.asarray(model(TOKENS))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    half = np.asarray(model(TOKENS))
    assert half.dtype == np.float32
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.05


def test_the_first_weights_of_the_trunk_do_not_depend_on_streams():
    first, other = (
        ParScaleLM(ParScaleConfig(**{**SIZES, "streams": p}), rngs=nnx.Rngs(7)) for p in (1, 4)
    )
    chex.assert_trees_all_equal(trunk(first), trunk(other))


def test_depth_does_not_change_the_program():
    def program(depth):
        graph, state = nnx.split(nnx.eval_shape(lambda: make(2, depth=depth)))
        text = jax.jit(lambda s: nnx.merge(graph, s)(TOKENS)).lower(state).as_text()
        return text.count("dot_general")

    assert program(2) == program(7)


def test_retrofit_keeps_the_trunk_and_adds_small_streams():
    sizes = {k: v for k, v in SIZES.items() if k != "prefix_length"}
    dense = DenseLM(DenseConfig(**sizes), rngs=nnx.Rngs(1))
    model = retrofit(dense, 4, prefix_length=5, smoothing=0.2, rngs=nnx.Rngs(2))
    assert (model.config.streams, model.config.prefix_length, model.config.smoothing) == (4, 5, 0.2)
    chex.assert_trees_all_equal(trunk(model), nnx.state(dense, nnx.Param))
    new = [v for p, v in nnx.to_flat_state(nnx.state(model)) if is_stream_parameter(p)]
    drawn = np.concatenate([np.ravel(v[...]) for v in new if np.any(v[...] != 0)])
    assert abs(drawn.std() - 0.02) < 2e-3 and abs(drawn.mean()) < 2e-3
    prefix = model.blocks.block.attention.prefix.key[...]
    assert not np.array_equal(prefix[0, 0], prefix[0, 1]), "streams must differ"
    with pytest.raises(ValueError, match="4 streams already"):
        retrofit(model, 8, rngs=nnx.Rngs(0))
    no_bias = DenseLM(DenseConfig(**sizes, qkv_bias=False), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="biases on query, key and value"):
        retrofit(no_bias, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(streams=0), "streams must be >= 1, got 0"),
        (dict(heads=3), "heads=3 is not a positive multiple of kv_heads=2"),
        (dict(head_width=5), "head_width=5 must be even"),
        (dict(smoothing=1.5), r"smoothing must be in \[0, 1\], got 1.5"),
        (dict(prefix_length=-1), "prefix_length must be >= 0"),
        (dict(width=0), "every size must be >= 1"),
        (dict(remat="some"), "remat='some' is not one of"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: make(**{"streams": 2, **changes}))


def test_wrong_rows_are_named():
    model = make(1)
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 3\)"):
        model(TOKENS, segment_ids=jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model(TOKENS.astype(jnp.float32))


def test_parameter_counts_of_small_models():
    for streams in (1, 2, 5):
        for tied in (True, False):
            config = ParScaleConfig(**SIZES, streams=streams, tie_embeddings=tied)
            state = nnx.state(nnx.eval_shape(lambda c=config: ParScaleLM(c, rngs=nnx.Rngs(0))))
            assert sum(x.size for x in jax.tree.leaves(state)) == config.parameter_count()
            tables = (1 if tied else 2) * config.vocab_size * config.width
            assert config.parameter_count(embedding=False) == config.parameter_count() - tables
    assert dataclasses.asdict(ParScaleConfig.qwen_3b(4))["rope_theta"] == 1e6
