"""The published numbers of the golden model, in every way of running it, and with every known bug.

Values come from the official implementation in float64; 1e-4 separates all known bugs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.layers.attention import reference, xla
from hackle.layers.parscale import StreamAggregator, StreamPrefix
from hackle.layers.rotary import rotary
from hackle.zoo.generate import generate
from tests.zoo.golden import write_golden_checkpoint

ROWS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], np.int32)
SHORT = [3, 1, 4]

LOGITS = {
    1: {
        (0, 0): [-0.45190, -0.23201, -1.03660, 2.65618, -0.90328, -0.74647],
        (0, 4): [0.97642, 0.72918, -0.13552, 0.51549, 1.27139, 0.71076],
        (1, 4): [0.49526, 0.60259, 0.23908, 1.76777, 0.34233, 2.97728],
    },
    3: {
        (0, 0): [1.02013, 0.83698, -0.40042, 0.49335, 1.26354, 0.82598],
        (0, 4): [1.72341, 1.44990, -1.58959, 0.03683, 0.90499, 0.65000],
        (1, 4): [1.42336, 1.51614, -0.97149, 0.86629, 0.96344, 0.97636],
    },
}
SUMS = {1: (15.63839, 323.12691), 3: (28.10649, 315.00464)}
LOSS = {1: 4.882103, 3: 3.714579}
GREEDY = {
    1: [[10, 3, 3, 3, 3, 3], [5, 16, 19, 19, 19, 20]],
    3: [[8, 8, 8, 18, 18, 18], [21, 12, 11, 9, 8, 7]],
}
LAST_OF_SHORT = {
    1: [-0.50038, -0.34736, -0.85530, 2.54042],
    3: [1.97061, 1.80292, -2.36073, -0.12212],
}
POSITIONS_NOT_SHIFTED = [1.87207, 1.70397, -2.53268, 0.02416]

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=[1, 3], ids=["P1", "P3"])
def model(request, tmp_path_factory):
    return load(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def model3(tmp_path_factory):
    return load(tmp_path_factory, 3)


def load(tmp_path_factory, streams):
    folder = tmp_path_factory.mktemp("golden")
    return zoo.from_pretrained(write_golden_checkpoint(folder, streams))


def full(model, tokens):
    return model(tokens)


def steps(model, tokens):
    """Prefill of one token, then one token a step."""
    cache, out = model.init_cache(tokens.shape[0], 8), []
    for i in range(tokens.shape[1]):
        features, cache = model.extend(tokens[:, i : i + 1], cache)
        out.append(features)
    return model.logits(jnp.concatenate(out, axis=1))


def chunks(model, tokens):
    cache = model.init_cache(tokens.shape[0], 8)
    first, cache = model.extend(tokens[:, :3], cache)
    second, cache = model.extend(tokens[:, 3:], cache)
    assert int(cache.length) == tokens.shape[1]
    return model.logits(jnp.concatenate([first, second], axis=1))


def left_padded(model, tokens):
    """Two padding tokens before each row, in a full pass; they are cut off again."""
    padded = jnp.pad(tokens, ((0, 0), (2, 0)))
    return model(padded, segment_ids=jnp.pad(jnp.ones_like(tokens), ((0, 0), (2, 0))))[:, 2:]


def left_padded_cache(model, tokens):
    padded = jnp.pad(tokens, ((0, 0), (2, 0)))
    positions = jnp.broadcast_to(jnp.arange(-2, tokens.shape[1]), padded.shape)
    positions = jnp.maximum(positions, -1)
    cache = model.init_cache(tokens.shape[0], 10)
    features, cache = model.extend(padded, cache, positions=positions)
    return model.logits(features[:, 2:])


def on_from_left_padding(model, tokens):
    """Positions are not counted in slots: padding takes one and is at none."""
    padded = jnp.pad(tokens[:, :2], ((0, 0), (2, 0)))
    positions = jnp.broadcast_to(jnp.asarray([-1, -1, 0, 1]), padded.shape)
    features, cache = model.extend(padded, model.init_cache(len(tokens), 10), positions=positions)
    more, _ = model.extend(tokens[:, 2:], cache)
    return model.logits(jnp.concatenate([features[:, 2:], more], axis=1))


@pytest.mark.parametrize(
    "run", [full, steps, chunks, left_padded, left_padded_cache, on_from_left_padding]
)
def test_logits(model, run):
    logits = np.asarray(run(model, jnp.asarray(ROWS)))
    for (row, at), expected in LOGITS[model.streams].items():
        close(logits[row, at, :6], expected)
    total, absolute = SUMS[model.streams]
    assert abs(logits.sum() - total) < 1e-3
    assert abs(np.abs(logits).sum() - absolute) < 1e-3


def test_loss_is_cross_entropy_of_the_joined_logits(model):
    logits = model(jnp.asarray(ROWS))[:, :-1]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ROWS[:, 1:, None], axis=-1)
    assert abs(float(-picked.mean()) - LOSS[model.streams]) < 1e-5


def test_greedy_tokens_together_and_alone(model):
    rows = ROWS.tolist()
    assert generate(model, rows, max_new_tokens=6) == GREEDY[model.streams]
    for row, expected in zip(rows, GREEDY[model.streams], strict=True):
        assert generate(model, [row], max_new_tokens=6) == [expected]


def test_greedy_of_unequal_prompts_is_that_of_each_alone(model):
    together = generate(model, [SHORT, ROWS[1].tolist()], max_new_tokens=6)
    assert together == [
        generate(model, [SHORT], max_new_tokens=6)[0],
        GREEDY[model.streams][1],
    ]


def test_short_row(model):
    close(model(jnp.asarray([SHORT]))[0, -1, :4], LAST_OF_SHORT[model.streams])
    close(left_padded(model, jnp.asarray([SHORT]))[0, -1, :4], LAST_OF_SHORT[model.streams])


def test_positions_matter_with_prefixes_and_only_then(model):
    tokens = jnp.asarray([[0, 0, *SHORT]])
    ids = jnp.asarray([[0, 0, 1, 1, 1]])
    shifted = model(tokens, segment_ids=ids, positions=jnp.arange(5)[None])[0, -1, :4]
    if model.streams == 1:
        close(shifted, LAST_OF_SHORT[1])
    else:
        close(shifted, POSITIONS_NOT_SHIFTED)


def test_aggregation_weights(model3):
    seen = []

    class Watched(StreamAggregator):
        def weights(self, x):
            seen.append(super().weights(x))
            return seen[-1]

    watched = nnx.clone(model3)
    watched.aggregator.__class__ = Watched
    watched.features(jnp.asarray(ROWS))
    close(seen[0][0, -1], [0.09345, 0.83176, 0.07479], atol=1e-5)
    close(seen[0][1, -1], [0.07082, 0.83079, 0.09838], atol=1e-5)
    close(seen[0][0, 0], [0.08504, 0.60981, 0.30515], atol=1e-5)


# Each known bug, built into the model; the check above must notice every one of them.


def rotate_prefix(model, monkeypatch):
    right = StreamPrefix.prepend

    def wrong(self, key, value, mask):
        key, value, mask = right(self, key, value, mask)
        prefix = rotary(key[:, :, : self.length], jnp.arange(self.length)[None])
        return key.at[:, :, : self.length].set(prefix), value, mask

    monkeypatch.setattr(StreamPrefix, "prepend", wrong)


def tile_groups(model, monkeypatch):
    def wrong(query, key, value, mask, scale):
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.tile(x, (1, 1, groups, 1)) for x in (key, value))
        return reference.attend(query, key, value, mask, scale)

    monkeypatch.setattr(xla, "attend", wrong)


def aggregate_before_norm(model, monkeypatch):
    norm, aggregator = model.final_norm, model.aggregator
    model.final_norm = lambda x: x
    model.join = lambda x: norm(aggregator(x))


def concatenate_stream_major(model, monkeypatch):
    weight = model.aggregator.hidden_weight
    p, d, _ = weight.shape
    published = jnp.moveaxis(weight[...], 2, 0)  # [o, p, j]
    published = jnp.swapaxes(published, 1, 2).reshape(d, d * p)  # W1[o, j * P + p]
    weight.set_value(jnp.moveaxis(published.reshape(d, p, d), 0, 2))  # read as W1[o, p * D + j]


def smooth(value):
    def mutate(model, monkeypatch):
        model.aggregator.smoothing = value

    mutate.__name__ = f"smoothing {value}"
    return mutate


@pytest.mark.parametrize(
    "mutate, size",
    [
        (rotate_prefix, 1.05),
        (tile_groups, 3.98),
        (aggregate_before_norm, 0.27),
        (concatenate_stream_major, 0.75),
        (smooth(0.0), 0.065),
        (smooth(0.01), 0.059),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_the_golden_check_notices(mutate, size, model3, monkeypatch):
    """`size` is the largest error in the logits that the bug is known to cause."""
    expected = np.asarray(model3(jnp.asarray(ROWS)))
    mutant = nnx.clone(model3)
    mutate(mutant, monkeypatch)
    jax.clear_caches()
    error = np.abs(np.asarray(mutant(jnp.asarray(ROWS))) - expected).max()
    assert error == pytest.approx(size, rel=0.05)
    with pytest.raises(AssertionError):
        for (row, at), values in LOGITS[3].items():
            close(mutant(jnp.asarray(ROWS))[row, at, :6], values)
