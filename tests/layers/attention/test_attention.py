"""One suite for all implementations of attention: values, gradients, odd sizes, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers import attention, attention_with_lse, in_place, masks, merge_attention
from hackle.layers.attention import cudnn, dispatch, xla
from tests.layers.attention.test_over_devices import HOPPER, TPU, Chip

IMPLEMENTATIONS = ["reference", "xla"]
SHAPES = {  # B, L, S, H, K, E
    "multi-head": (2, 8, 8, 4, 4, 8),
    "grouped": (2, 7, 7, 6, 2, 10),
    "multi-query": (1, 5, 5, 3, 1, 4),
    "one query": (3, 1, 9, 4, 2, 8),
    "odd cross": (1, 13, 29, 2, 1, 6),
}


def draw(shape, dtype=jnp.float32, seed=0):
    b, l, s, h, k, e = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((b, l, h, e), (b, s, k, e), (b, s, k, e))
    return [jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True)]


def softmax_loop(query, key, value, visible, scale):
    """Float64, one query and head at a time, numpy: shares no code with the implementations."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    lse = np.full(query.shape[:3], -np.inf)
    groups = query.shape[2] // key.shape[2]
    for b, l, h in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(visible[b % len(visible), l])
        if len(seen):
            scores = scale * key[b, seen, h // groups] @ query[b, l, h]
            lse[b, l, h] = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            out[b, l, h] = np.exp(scores - lse[b, l, h]) @ value[b, seen, h // groups]
    return out, lse


def ids(shape, high, seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def all_masks(b, l, s):
    """Every mask object, at sizes l x s."""
    yield "none", None
    yield "padding", masks.Padding(jnp.asarray([s, s // 2, 1][:b]))
    yield "segments", masks.Segments(ids((b, l), 2, 1), ids((b, s), 2, 2))
    yield "positions", masks.Positions(ids((b, l), 9, 3), ids((b, s), 9, 4))
    yield (
        "branches",
        masks.Branches(
            ids((b, 2, l), 2, 5), ids((b, 2, l), 3, 6), ids((b, 2, s), 2, 7), ids((b, 2, s), 3, 8)
        ),
    )
    yield (
        "prefix",
        masks.Prefix(2, masks.Positions(ids((b, l), 9, 3), ids((b, max(s - 2, 0)), 9, 4))),
    )
    yield "sees nothing", masks.Padding(jnp.zeros((b,), jnp.int32))
    if l == s:
        yield "causal", masks.Causal()
        yield "packed", masks.Causal() & masks.Segments(ids((b, l), 2, 1), ids((b, l), 2, 1))


CASES = [
    pytest.param(shape, mask, id=f"{name}-{kind}")
    for name, shape in SHAPES.items()
    for kind, mask in all_masks(shape[0], shape[1], shape[2])
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape, mask", CASES)
def test_values(shape, mask, implementation):
    query, key, value = draw(shape)
    l, s = shape[1], shape[2]
    visible = np.ones((1, l, s), bool) if mask is None else np.asarray(mask.dense(l, s))
    expected, expected_lse = softmax_loop(query, key, value, visible, shape[-1] ** -0.5)
    out, lse = attention_with_lse(query, key, value, mask=mask, implementation=implementation)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    assert out.dtype == query.dtype and lse.dtype == jnp.float32
    alone = attention(query, key, value, mask=mask, implementation=implementation)
    np.testing.assert_array_equal(out, alone)


@pytest.mark.parametrize("kind", ["causal", "padding", "sees nothing", "packed"])
def test_gradients_agree(kind):
    shape = SHAPES["grouped"]
    mask = dict(all_masks(shape[0], shape[1], shape[2]))[kind]
    args = draw(shape)
    weight = jax.random.normal(jax.random.key(9), args[0].shape)

    def loss(implementation, *args):
        out, lse = attention_with_lse(*args, mask=mask, implementation=implementation)
        return jnp.sum(out * weight) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0))

    results = [jax.grad(functools.partial(loss, i), (0, 1, 2))(*args) for i in IMPLEMENTATIONS]
    for a, b in zip(*results, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-6)
    x, direction = args[0], jax.random.normal(jax.random.key(3), args[0].shape)
    ahead, behind = (loss("xla", x + h * direction, *args[1:]) for h in (1e-2, -1e-2))
    slope = jnp.sum(results[1][0] * direction)
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-2, atol=2e-3)  # float32 differences


@pytest.mark.parametrize("queries", [16, 33, 100])
def test_xla_tiles_equal_the_reference(queries, monkeypatch):
    """Small tiles: several of them, the last one ragged, values and gradients."""
    monkeypatch.setattr(xla, "TILE", 16 * queries)
    query, key, value = draw((2, queries, queries, 4, 2, 8))
    mask = masks.Causal() & masks.Segments(ids((2, queries), 2, 1), ids((2, queries), 2, 1))

    def loss(implementation, query, key, value):
        out, lse = attention_with_lse(query, key, value, mask=mask, implementation=implementation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(lse)), (out, lse)

    (_, small), grads = jax.value_and_grad(functools.partial(loss, "xla"), (0, 1, 2), has_aux=True)(
        query, key, value
    )
    (_, whole), expected = jax.value_and_grad(
        functools.partial(loss, "reference"), (0, 1, 2), has_aux=True
    )(query, key, value)
    for a, b in zip((*small, *grads), (*whole, *expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_xla_memory_is_linear_in_length():
    def peak(length):
        query, key, value = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for _ in range(3))
        f = jax.grad(
            lambda *a: attention(*a, mask=masks.Causal(), implementation="xla").sum(), (0, 1, 2)
        )
        return jax.jit(f).lower(query, key, value).compile().memory_analysis().temp_size_in_bytes

    assert peak(32768) < 2.5 * peak(16384)
    assert peak(32768) < 32768**2  # a byte per entry of L x L would be more


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merge_is_exact(parts):
    shape = (2, 6, 30, 4, 2, 8)
    query, key, value = draw(shape)
    whole = attention_with_lse(query, key, value)

    def merged(query, key, value):
        cuts = np.array_split(np.arange(30), parts)
        pieces = [attention_with_lse(query, key[:, c], value[:, c]) for c in cuts]
        blind = masks.Padding(jnp.zeros((2,), jnp.int32))  # a part that sees nothing adds nothing
        pieces.append(attention_with_lse(query, key, value, mask=blind))
        return merge_attention(pieces)

    for a, b in zip(merged(query, key, value), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)

    def loss(f, *args):
        out, lse = f(*args)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    for a, b in zip(
        jax.grad(functools.partial(loss, merged), (0, 1, 2))(query, key, value),
        jax.grad(functools.partial(loss, attention_with_lse), (0, 1, 2))(query, key, value),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    query, key, value = draw((1, 64, 64, 4, 2, 32), jnp.bfloat16)
    out = attention(query, key, value, mask=masks.Causal(), implementation=implementation)
    visible = np.asarray(masks.Causal().dense(64, 64))
    expected, _ = softmax_loop(query, key, value, visible, 32**-0.5)
    assert out.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 5e-3  # one bfloat16 rounding of weights and one of the result


def test_branches_hide_siblings_only():
    """Row: shared, block 1 path 1, block 1 path 2, after the block; written out by hand."""
    block = jnp.asarray([[[0, 1, 1, 0]]])
    path = jnp.asarray([[[0, 1, 2, 0]]])
    dense = np.asarray((masks.Causal() & masks.Branches(block, path, block, path)).dense(4, 4))[0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(dense, np.asarray(expected, bool))


def test_masks_survive_jit_and_vmap():
    query, key, value = draw(SHAPES["grouped"])
    mask = masks.Causal() & masks.Padding(jnp.asarray([7, 3]))
    plain = attention(query, key, value, mask=mask)
    jitted = jax.jit(lambda q, k, v, m: attention(q, k, v, mask=m))(query, key, value, mask)
    np.testing.assert_allclose(plain, jitted, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), "query must be"),
        (lambda q, k, v: (q, k[:, 1:], v), "differ in shape"),
        (lambda q, k, v: (q[..., 1:], k, v), "batch or head width"),
        (lambda q, k, v: (q[:, :, :5], k, v), "not a multiple"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*draw(SHAPES["grouped"])))


def test_a_named_implementation_runs_or_raises(monkeypatch):
    query, key, value = draw(SHAPES["multi-head"])
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        attention(query, key, value, implementation="flash")
    if jax.default_backend() == "cpu":
        for name, needs in (("pallas_gpu", "need"), ("pallas_tpu", "need a TPU")):
            for function in (attention, attention_with_lse):
                with pytest.raises(NotImplementedError, match=f"'{name}': .*{needs}"):
                    function(query, key, value, implementation=name)
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        attention_with_lse(query, key, value, implementation="cudnn")
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
            attention(query, key, value, implementation="cudnn")


AMPERE = Chip("gpu", "8.0")


@pytest.mark.parametrize(
    "chip, kind, width, length, alone, with_lse",
    [
        (HOPPER, "causal", 64, 200, "cudnn", "pallas_gpu"),
        (HOPPER, "padding", 64, 200, "cudnn", "pallas_gpu"),
        (HOPPER, "packed", 64, 200, "pallas_gpu", "pallas_gpu"),
        (HOPPER, "packed", 264, 200, "xla", "xla"),
        (HOPPER, "packed", 64, 8, "xla", "xla"),  # few queries
        (AMPERE, "causal", 64, 200, "cudnn", "xla"),
        (AMPERE, "packed", 64, 200, "xla", "xla"),
        (TPU, "causal", 64, 200, "pallas_tpu", "pallas_tpu"),
        (TPU, "packed", 256, 200, "pallas_tpu", "pallas_tpu"),
        (TPU, "packed", 264, 200, "xla", "xla"),
        (TPU, "packed", 64, 8, "xla", "xla"),  # few queries
    ],
)
def test_what_none_chooses(chip, kind, width, length, alone, with_lse, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [chip])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setenv("XLA_FLAGS", in_place.FLAG)
    query = jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
    mask = dict(all_masks(1, length, length))[kind]
    assert dispatch._choose(None, dispatch._PREFERENCE, query, query, mask) == alone
    preference = [name for name in dispatch._PREFERENCE if name in dispatch._WITH_LSE]
    assert dispatch._choose(None, preference, query, query, mask) == with_lse


def test_kernels_that_write_in_place_need_a_flag(monkeypatch, caplog):
    """With which XLA leaves them alone; where None could have used one, that is a warning."""
    dispatch._say_once.cache_clear()
    monkeypatch.setattr(jax, "devices", lambda: [HOPPER])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    query = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.bfloat16)
    mask = dict(all_masks(1, 200, 200))["packed"]
    few = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    some = dict(all_masks(1, 8, 200))["none"]
    assert dispatch._choose(None, ["pallas_gpu", "xla"], few, query, some) == "xla"
    assert not caplog.messages  # too few for a kernel anyway
    assert dispatch._choose(None, dispatch._PREFERENCE, query, query, mask) == "xla"
    assert f"set XLA_FLAGS={in_place.FLAG}" in caplog.text
    with pytest.raises(NotImplementedError, match=f"set XLA_FLAGS={in_place.FLAG}"):
        dispatch._choose("pallas_gpu", dispatch._PREFERENCE, query, query, mask)


def test_none_says_once_what_it_chose(caplog):
    query, key, value = draw(SHAPES["multi-head"])
    dispatch._say_once.cache_clear()
    with caplog.at_level("INFO", logger="hackle"):
        attention(query, key, value)
        attention(query, key, value)
    assert [r.message.startswith("attention: chose 'xla'") for r in caplog.records] == [True]


def test_masks_refuse_other_sizes():
    query, key, value = draw(SHAPES["one query"])
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(query, key, value, mask=masks.Causal())
    with pytest.raises(ValueError, match="describes 5 tokens, but the array has 9"):
        wrong = masks.Segments(jnp.zeros((3, 1), int), jnp.zeros((3, 5), int))
        attention(query, key, value, mask=wrong)
    with pytest.raises(ValueError, match="Prefix of 10"):
        attention(query, key, value, mask=masks.Prefix(10))


def zeros(*shape, dtype=jnp.int32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    "mask, message",
    [
        # As `branch_structure` gives one row, without the batch.
        (masks.Branches(*[zeros(2, 9)] * 4), r"query_block must be integers \[B, depth, L\], got"),
        (masks.Branches(*[zeros(3, 2, 9)] * 2, *[zeros(3, 1, 9)] * 2), "depths differ; the ids"),
        (masks.Branches(zeros(3, 2, 9), *[zeros(3, 1, 9)] * 3), "depths differ; the ids have"),
        (masks.Segments(zeros(9), zeros(9)), r"Segments.query_ids must be integers \[B, L\], got"),
        (masks.Positions(zeros(3, 9), zeros(3, 9, dtype=float)), r"got float32 \(3, 9\)"),
        (masks.Padding(zeros(3, 1)), r"Padding.lengths must be integers \[B\], got int32 \(3, 1\)"),
        (masks.Padding(zeros(2)), r"masks.Padding.lengths has 2 rows, but the batch has 3"),
        (masks.Causal() & masks.Segments(zeros(3, 9), zeros(4, 9)), "key_ids has 4 rows, but the"),
    ],
)
def test_masks_refuse_other_shapes_and_types(mask, message):
    query = jnp.zeros((3, 9, 2, 8))
    for name in (None, "reference", "xla"):
        with pytest.raises(ValueError, match=message):
            attention(query, query, query, mask=mask, implementation=name)


@pytest.mark.parametrize(
    "mask, message",
    [
        (jnp.ones((4, 4), bool), r"got an array bool \(4, 4\)"),
        ("causal", "got 'causal'"),
        (masks.Causal, "got the class Causal"),
        ([masks.Causal()], r"got \[Causal\(\)\]"),
        (masks.Padding([3]), r"Padding.lengths must be an array of integers \[B\], got \[3\]"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    query = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message):
        attention(query, query, query, mask=mask)


def test_masks_with_one_row_are_for_all():
    query, key, value = draw(SHAPES["multi-head"])
    batch, length = query.shape[:2]
    row = jnp.arange(length)[None] // 3
    one = attention(query, key, value, mask=masks.Segments(row, row))
    rows = jnp.repeat(row, batch, axis=0)
    np.testing.assert_array_equal(
        one, attention(query, key, value, mask=masks.Segments(rows, rows))
    )


def test_dtypes_are_not_mixed_and_there_are_keys():
    query = jnp.zeros((1, 4, 2, 8))
    half = query.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="query float32, key bfloat16 and value bfloat16 differ"):
        attention(query, half, half)
    whole = query.astype(jnp.int32)
    with pytest.raises(ValueError, match="query must be floating-point, got int32"):
        attention(whole, whole, whole)
    with pytest.raises(ValueError, match=r"key \(1, 0, 2, 8\) has nothing to attend to"):
        attention(query, query[:, :0], query[:, :0])
    with pytest.raises(TypeError):
        masks.Causal() & None


def test_samples_of_one_prompt_share_it():
    """Shared-prefix sampling: a row of a prompt and its samples equals a row for each of them."""
    prompt, sizes = 5, (3, 4)
    length = prompt + sum(sizes)
    query, key, value = draw((1, length, length, 2, 2, 8))
    path = jnp.concatenate([jnp.full(n, i) for i, n in enumerate((prompt, *sizes))])
    branches = ((path > 0).astype(jnp.int32)[None, None], path[None, None])
    mask = masks.Causal() & masks.Branches(*branches, *branches)
    joint = attention(query, key, value, mask=mask)
    for sample in (1, 2):
        own = np.flatnonzero((path == 0) | (path == sample))
        alone = attention(query[:, own], key[:, own], value[:, own], mask=masks.Causal())
        np.testing.assert_allclose(joint[:, own], alone, atol=1e-6)


def test_cudnn_is_given_a_length_for_every_row(monkeypatch):
    """It takes no one length for all, which a mask may have; seen here without a GPU."""
    given = {}
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, **how: given.update(how) or q
    )
    args = draw((2, 8, 8, 4, 2, 8), jnp.bfloat16)
    cudnn.attend(*args, masks.Padding(jnp.asarray([5])), 1.0)
    np.testing.assert_array_equal(given["key_value_seq_lengths"], [5, 5])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["none", "causal", "padding", "one-padding", "prefix", "prefix-padding"]
)
@pytest.mark.parametrize("width", [56, 64, 96, 128, 160])
def test_cudnn_equals_the_reference(kind, width):
    """Values and gradients in bfloat16, every head width of the released models."""
    length, prefix = 160, 48
    lengths = jnp.asarray([160, 77])
    mask = {
        "none": None,
        "causal": masks.Causal(),
        "padding": masks.Padding(lengths),
        "one-padding": masks.Padding(lengths[1:]),
        "prefix": masks.Prefix(prefix, masks.Causal()),
        "prefix-padding": masks.Prefix(prefix, masks.Causal() & masks.Padding(lengths)),
    }[kind]
    keys = length + prefix if kind.startswith("prefix") else length
    args = draw((2, length, keys, 8, 2, width), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(9), args[0].shape)

    def run(implementation, *args):
        def loss(*args):
            out = attention(*args, mask=mask, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*args)
        return out, *grads

    wide = [x.astype(jnp.float32) for x in args]
    for a, b in zip(
        jax.jit(functools.partial(run, "cudnn"))(*args), run("reference", *wide), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-2  # bfloat16 operands


@pytest.mark.gpu
def test_cudnn_refuses_what_it_cannot_honour():
    query, key, value = draw((1, 16, 16, 2, 1, 64), jnp.bfloat16)
    packed = masks.Causal() & masks.Segments(ids((1, 16), 2, 1), ids((1, 16), 2, 1))
    with pytest.raises(NotImplementedError, match="cannot honour Segments"):
        attention(query, key, value, mask=packed, implementation="cudnn")
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        attention(*draw((1, 16, 16, 2, 1, 64)), implementation="cudnn")
