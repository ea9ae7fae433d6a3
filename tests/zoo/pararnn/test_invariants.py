"""What must hold for any ParaRNN model, and its numbers from loops written out in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo import registry
from hackle.zoo.generate import generate
from hackle.zoo.pararnn import ParaRNNConfig, ParaRNNLM
from hackle.zoo.weights.folder import abstract_model, published_shapes

SIZES = dict(vocab_size=61, width=16, mlp_width=24, depth=2, heads=4)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 11)).astype(np.int32)
CELLS = ("gru", "lstm")


def make(cell, seed=0, **changes):
    """A model with large weights, so that every mistake shows."""
    model = ParaRNNLM(ParaRNNConfig(**{"cell": cell, **SIZES, **changes}), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, v in flat:
        if path[-1].endswith("scale") or path[-1] == "bias":
            v.set_value(v[...] + 0.3 * rng.normal(size=v.shape).astype(np.float32))
        elif path[-1] in ("weight",) and "cell" not in path and "conv" not in path:
            v.set_value(v[...] * 10)
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@pytest.fixture(scope="module", params=CELLS)
def model(request):
    return make(request.param)


# Sizes.


@pytest.mark.parametrize(
    "size, published", [("400m", 405.6e6), ("1b", 1.415e9), ("2.9b", 2.902e9), ("7b", 6.757e9)]
)
def test_parameter_counts_are_those_of_the_paper(size, published):
    count = zoo.entry(f"pararnn-{size}-gru").config.parameter_count()
    assert count == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize("name", [n for n in zoo.list_models() if n.startswith("pararnn")])
def test_parameter_counts_are_those_of_the_arrays(name):
    entry = zoo.entry(name)
    family = registry.FAMILIES[entry.family]
    leaves = jax.tree.leaves(abstract_model(family, entry.config)[1])
    total = sum(leaf.size for leaf in leaves)
    assert entry.config.parameter_count() == total
    tables = 2 * entry.config.vocab_size * entry.config.width
    assert entry.config.parameter_count(embedding=False) == total - tables
    shapes = published_shapes(family, entry.config).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == total


# Numbers.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def recurrence(cell, x, heads):
    """`[L, D]` to the same; one token, head and gate at a time."""
    weight, bias, a = cell["weight"], cell["bias"], cell["state_weight"]
    width = x.shape[1]
    part = width // heads
    c = h = np.zeros(width)
    out = []
    for row in x:
        u = [
            np.concatenate(
                [row[k * part : k * part + part] @ weight[k, :, g] for k in range(heads)]
            )
            + bias[g]
            for g in range(3)
        ]
        if "peephole" in cell:  # f, o, z
            p = cell["peephole"]
            f = sigmoid(a[0] * h + u[0] + p[0] * c)
            c = f * c + (1 - f) * np.tanh(a[2] * h + u[2])
            h = sigmoid(a[1] * h + u[1] + p[1] * c) * np.tanh(c)
        else:  # z, r, c
            z, r = sigmoid(a[0] * h + u[0]), sigmoid(a[1] * h + u[1])
            h = (1 - z) * h + z * np.tanh(a[2] * (h * r) + u[2])
        out.append(h)
    return np.stack(out)


def written_out(model, tokens):
    """Logits `[L, V]` of one row."""
    state = jax.tree.map(
        lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    )
    config, eps = model.config, model.config.norm_eps
    x = state["embedding"]["weight"][tokens]
    for layer in range(config.depth):
        block = jax.tree.map(lambda v: v[layer], state["blocks"]["block"])  # noqa: B023
        mixer, mlp = block["mixer"], block["mlp"]
        y = rms(x, block["mixer_norm"]["scale"], eps)
        branch, gate = y @ mixer["input"]["weight"], y @ mixer["gate"]["weight"]
        late = np.concatenate([np.zeros((config.taps - 1, config.width)), branch])
        conv = sum(
            mixer["conv"]["weight"][k] * late[config.taps - 1 - k : len(late) - k]
            for k in range(config.taps)
        )
        h = recurrence(mixer["cell"], silu(conv), config.heads)
        mixed = rms(h * silu(gate), mixer["norm"]["scale"], eps) @ mixer["output"]["weight"]
        x = block["skip_scale"] * x + mixed
        y = rms(x, block["mlp_norm"]["scale"], eps)
        hidden = silu(y @ mlp["gate"]["weight"]) * (y @ mlp["up"]["weight"])
        x = x + hidden @ mlp["down"]["weight"]
    return rms(x, state["final_norm"]["scale"], eps) @ state["head"]["weight"]


def test_logits_are_those_of_the_equations(model):
    logits = np.asarray(model(TOKENS))
    assert logits.dtype == np.float32 and np.abs(logits).max() > 1
    for row in range(2):
        np.testing.assert_allclose(logits[row], written_out(model, TOKENS[row]), atol=2e-5)


@pytest.mark.parametrize("part", ["conv.weight", "cell.state_weight", "cell.bias", "norm.scale"])
def test_the_equations_notice_every_part(model, part):
    changed = nnx.clone(model)
    owner, name = part.split(".")
    variable = getattr(getattr(changed.blocks.block.mixer, owner), name)
    variable.set_value(variable[...] + 0.1)
    assert np.abs(np.asarray(changed(TOKENS))[0] - written_out(model, TOKENS[0])).max() > 1e-3


# Memory.


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 6], [2, 9]])
def test_cache_equals_the_full_pass(model, pieces):
    cache = model.init_cache(2, 16)
    size = size_of(cache)
    extend, out, at = nnx.jit(lambda m, t, c: m.extend(t, c)), [], 0
    for count in pieces:
        features, cache = extend(model, TOKENS[:, at : at + count], cache)
        out.append(features)
        at += count
    assert size_of(cache) == size == size_of(model.init_cache(2, 10**6))
    np.testing.assert_allclose(model.logits(jnp.concatenate(out, axis=1)), model(TOKENS), atol=1e-5)


def size_of(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_padding_changes_nothing_wherever_it_stands(model):
    """Rows of unequal length, in two pieces: left, right, between, and a row of padding alone."""
    real = np.array([
        [0, 0, 1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 0, 0],
    ], bool)  # fmt: skip
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 61, real.shape).astype(np.int32)
    positions = np.where(real, np.cumsum(real, axis=1) - 1, -1)
    cache, out = model.init_cache(3, 8), []
    for piece in (slice(0, 4), slice(4, 7), slice(7, 8)):
        features, cache = model.extend(tokens[:, piece], cache, positions=positions[:, piece])
        out.append(features)
    found = np.asarray(model.logits(jnp.concatenate(out, axis=1)))
    for row in range(3):
        alone, end = model.extend(tokens[row : row + 1, real[row]], model.init_cache(1, 8))
        np.testing.assert_allclose(found[row, real[row]], model.logits(alone)[0], atol=1e-5)
        mine = jax.tree.map(lambda x: x[:, row : row + 1], cache)  # noqa: B023
        chex.assert_trees_all_close(mine, end, atol=1e-5)


def test_unequal_prompts_generate_what_each_does_alone(model):
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :2].tolist(), TOKENS[1, :5].tolist()]
    together = generate(model, prompts, max_new_tokens=6)
    assert together == [generate(model, [p], max_new_tokens=6)[0] for p in prompts]
    text = [*prompts[1], *together[1]]
    best = np.asarray(jnp.argmax(model(jnp.asarray([text], jnp.int32))[0], axis=-1))
    assert best[1:-1].tolist() == together[1]


def test_a_text_may_be_longer_than_any_table(model):
    out = generate(model, [[1] * 40], max_new_tokens=30)
    assert len(out[0]) == 30


def test_the_cache_refuses_other_rows(model):
    with pytest.raises(ValueError, match="cache holds 3 rows, got tokens of 2"):
        model.extend(TOKENS, model.init_cache(3, 8))
    with pytest.raises(ValueError, match="cache needs batch and length >= 1"):
        model.init_cache(0, 8)


# Packing.


def test_packed_rows_equal_separate_rows(model):
    packed = model(TOKENS[:1], segment_ids=jnp.asarray([[1] * 4 + [2] * 5 + [0] * 2]))
    np.testing.assert_allclose(packed[0, :4], model(TOKENS[:1, :4])[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 4:9], model(TOKENS[:1, 4:9])[0], atol=1e-5)
    assert np.abs(packed[0, 4:9] - model(TOKENS[:1])[0, 4:9]).max() > 1e-2


def test_gradients_do_not_leak_over_a_border(model):
    segments = jnp.asarray([[1] * 5 + [2] * 6])
    graph, state = nnx.split(model)
    table = state["embedding"]["weight"]

    def later(weight):
        changed = {**state, "embedding": {"weight": table.replace(weight)}}
        out = nnx.merge(graph, nnx.State(changed))(TOKENS[:1], segment_ids=segments)
        return jnp.sum(out[:, 5:] ** 2)

    touched = np.asarray(jnp.abs(jax.grad(later)(table[...])).max(axis=1) > 0)
    assert set(np.flatnonzero(touched)) == set(TOKENS[0, 5:].tolist())


def test_positions_are_not_used_and_branches_are_refused(model):
    shifted = np.broadcast_to(np.arange(11) + 13, TOKENS.shape)
    np.testing.assert_array_equal(model(TOKENS, positions=shifted), model(TOKENS))
    with pytest.raises(ValueError, match="a recurrence .* has no branches"):
        model(TOKENS, branches=object())
    with pytest.raises(ValueError, match="positions has shape"):
        model(TOKENS, positions=shifted[:, 1:])


# Running.


def loss(model, tokens):
    scores = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_reach_every_parameter_whatever_is_recomputed(cell):
    graph, state = nnx.split(make(cell))
    grads = jax.jit(jax.grad(lambda s: loss(nnx.merge(graph, s), TOKENS)))(state)
    for path, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad[...]).all() and np.abs(grad[...]).max() > 0, path
    for remat in ("dots", "full"):
        again = nnx.split(make(cell, remat=remat))[0]
        other = jax.jit(jax.grad(lambda s: loss(nnx.merge(again, s), TOKENS)))(state)  # noqa: B023
        chex.assert_trees_all_close(grads, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["newton", "shooting"])
def test_every_method_gives_the_same_logits(model, method):
    other = make(model.config.cell, recurrence=method)
    np.testing.assert_allclose(other(TOKENS), model(TOKENS), atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_stays_close(cell):
    model = make(cell)
    exact = np.asarray(model(TOKENS))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    half = np.asarray(model(TOKENS))
    assert half.dtype == np.float32
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.05
    cache = model.init_cache(2, 16)
    assert cache.tails.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(cache.states))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"cell": "rnn"}, "pararnn-tiny-gru: cell='rnn' is not one of gru, lstm"),
        ({"heads": 3}, "pararnn-tiny-gru: .*heads=3"),
        ({"recurrence": "fast"}, "pararnn-tiny-gru: .*'fast'"),
        ({"remat": "some"}, "pararnn-tiny-gru: remat='some'"),
        ({"streams": 2}, "unknown config field of pararnn-tiny-gru 'streams'"),
    ],
)
def test_create_refuses_by_name(overrides, message):
    with pytest.raises(zoo.UserError, match=message):
        zoo.create("pararnn-tiny-gru", rngs=nnx.Rngs(0), **overrides)
