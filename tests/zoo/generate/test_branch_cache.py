"""Paths in one row of one cache, and what makes that exact, in float64.

The document nests three deep, and has separators between siblings.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.layers.multiverse import BranchStructure, Tags, branch_structure
from hackle.zoo.dense import DenseConfig, DenseLM
from tests.layers.multiverse import documents
from tests.layers.multiverse.documents import Block

TAGS = Tags.numbered(41)
VOCAB, LENGTH, DEPTH, CHUNK = 53, 128, 3, 8
INNER = Block(0, [1, 1], [[2, Block(0, [1, 0], [[2], [3]], 1, 1), 1], [4]], 1, 1)


def document(*order):
    """A block of three paths in this order, of which the one of number 0 nests."""
    paths = [[1, INNER, 1], [5], [2]]
    return [3, Block(1, [1, 1, 1], [paths[i] for i in order], 2, 1), 2]


def spelled(items, layout="strict"):
    """Token ids of a document in this vocabulary, text by its length in tokens alone."""
    ids = documents.ids(documents.write(items, layout=layout))
    tags = ids >= min(documents.ID.values())
    text = np.where(ids == documents.NEWLINE, 40, ids % 7)
    return np.where(tags, ids - min(documents.ID.values()) + 41, text).astype(np.int32)


TOKENS = spelled(document(0, 1, 2))


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=VOCAB, width=16, mlp_width=24, depth=2, heads=4, kv_heads=2)
    config = DenseConfig(**sizes, head_width=4, max_length=256, embedding_std=0.5)
    model = DenseLM(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    scale = lambda x: (x * 8 if x.ndim > 2 else x).astype(jnp.float64)
    return nnx.merge(graph, jax.tree.map(scale, state))


@functools.partial(nnx.jit, static_argnames="layout")
def _run(model, tokens, branches, layout):
    return model.features(tokens, branches=branches)


def run(model, tokens, layout="strict", shift=0):
    """Features [L, D] of one text in one pass, which is padded to one length."""
    found = branch_structure(tokens, TAGS, layout=layout, depth=DEPTH, cut=True)
    pad = lambda x: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, LENGTH - len(tokens))])[None]
    block, path, position = map(pad, found)
    branches = BranchStructure(block, path, position + shift)
    return np.asarray(_run(model, pad(tokens), branches, layout))[0, : len(tokens)]


@nnx.jit
def _extend(model, tokens, cache, branches):
    return model.extend(tokens, cache, branches=branches)


def feed(model, cache, order, tokens=TOKENS):
    """Appends tokens in this order, eight at a time: their features in that order, the cache."""
    found = branch_structure(tokens, TAGS, depth=DEPTH)
    out = []
    for start in range(0, len(order), CHUNK):
        at = order[start : start + CHUNK]
        missing = CHUNK - len(at)
        ids = [np.pad(x[:, at], ((0, 0), (0, missing)))[None] for x in found[:2]]
        position = np.pad(found.position[at], (0, missing), constant_values=-1)[None]
        branches = BranchStructure(*ids, position)
        chunk = np.pad(tokens[at], (0, missing))[None]
        features, cache = _extend(model, chunk, cache, branches)
        cache = cache.forget(jnp.int32(missing))
        out.append(np.asarray(features)[0, : len(at)])
    return np.concatenate(out), cache


def empty(model):
    return model.init_cache(1, LENGTH, branch_depth=DEPTH)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


CONCLUSION = int(np.flatnonzero(TOKENS == TAGS.conclusion[0].open)[-1])
POSITION = branch_structure(TOKENS, TAGS).position


def test_the_document():
    found = branch_structure(TOKENS, TAGS)
    assert found.block.shape == (DEPTH, len(TOKENS)) and len(TOKENS) < LENGTH
    assert len(TOKENS) > POSITION.max() + 20


@pytest.mark.parametrize("order", ["text", "side by side", "paths backwards"])
def test_any_order_of_arrival_gives_what_one_pass_gives(model, order):
    """Paths side by side, then what joins them, nothing computed again."""
    orders = {
        "text": np.arange(len(TOKENS)),
        "side by side": np.argsort(POSITION, kind="stable"),
        "paths backwards": np.lexsort([-np.arange(len(TOKENS)), POSITION]),
    }
    features, cache = feed(model, empty(model), orders[order])
    close(features, run(model, TOKENS)[orders[order]])
    assert int(cache.length) == len(TOKENS)


def test_order_of_the_slots_does_not_matter(model):
    """Of a cache whose paths have ended."""
    _, cache = feed(model, empty(model), np.arange(CONCLUSION))
    slots = np.random.default_rng(0).permutation(CONCLUSION)
    slots = np.concatenate([slots, np.arange(CONCLUSION, LENGTH)])
    moved = dataclasses.replace(
        cache,
        key=cache.key[:, :, slots],
        value=cache.value[:, :, slots],
        positions=cache.positions[:, slots],
        block=cache.block[..., slots],
        path=cache.path[..., slots],
    )
    rest = np.arange(CONCLUSION, len(TOKENS))
    features, _ = feed(model, moved, rest)
    close(features, feed(model, cache, rest)[0])
    close(features, run(model, TOKENS)[CONCLUSION:])


def spans(tokens):
    """Slices of the outermost paths, in the strict layout."""
    found = branch_structure(tokens, TAGS)
    outer = found.path[0]
    return [np.flatnonzero(outer == i) for i in range(1, outer.max() + 1)]


def permuted(order):
    """The document with its outermost paths in another order, token for token."""
    paths = spans(TOKENS)
    start, end = paths[0][0], paths[-1][-1] + 1
    moved = [TOKENS[paths[i]] for i in order]
    return np.concatenate([TOKENS[:start], *moved, TOKENS[end:]])


def test_order_of_paths_does_not_matter(model):
    """The published layout tells orders apart, by its separators."""
    for order in ((2, 0, 1), (1, 2, 0)):
        other = permuted(order)
        close(run(model, other)[CONCLUSION:], run(model, TOKENS)[CONCLUSION:])
        leaks = run(model, other, "published") - run(model, TOKENS, "published")
        assert np.abs(leaks[CONCLUSION:]).max() > 1e-3


def test_a_path_is_what_it_is_alone(model):
    """In the published layout paths behind the first know of those before them."""
    shared = np.arange(spans(TOKENS)[0][0])
    for layout in ("strict", "published"):
        packed, gaps = run(model, TOKENS, layout), []
        for path in spans(TOKENS)[1:]:  # the first one nests
            path = path[: -1 if layout == "published" else None]
            alone = TOKENS[np.concatenate([shared, path])]
            positions = branch_structure(TOKENS, TAGS, layout=layout).position
            positions = positions[np.concatenate([shared, path])]
            gaps.append(packed[path] - causal(model, alone, positions)[len(shared) :])
        if layout == "strict":
            assert max(np.abs(gap).max() for gap in gaps) < 1e-12
        else:
            assert min(np.abs(gap).max() for gap in gaps) > 1e-3


def causal(model, tokens, positions):
    pad = lambda x: np.pad(x, (0, LENGTH - len(tokens)))[None]
    found = _causal(model, pad(tokens), pad(positions))
    return np.asarray(found)[0, : len(tokens)]


@nnx.jit
def _causal(model, tokens, positions):
    return model.features(tokens, positions=positions)


def test_only_differences_of_positions_count(model):
    """Rotary angles are rounded to float32, and those of shifted positions otherwise."""
    moved, plain = run(model, TOKENS, shift=17), run(model, TOKENS)
    np.testing.assert_allclose(moved, plain, rtol=0, atol=1e-7)


def test_a_cut_text_is_the_start_of_the_whole(model):
    whole = run(model, TOKENS)
    for end in range(1, len(TOKENS), 7):
        close(run(model, TOKENS[:end]), whole[:end])


def test_caches_and_branches_must_fit(model):
    found = branch_structure(TOKENS[None, :CHUNK], TAGS, depth=2, cut=True)
    with pytest.raises(ValueError, match="the cache holds no branches"):
        model.extend(TOKENS[None, :CHUNK], model.init_cache(1, 16), branches=found)
    with pytest.raises(ValueError, match="cache holds branches of depth 3, got 2"):
        model.extend(TOKENS[None, :CHUNK], empty(model), branches=found)
    with pytest.raises(ValueError, match="branches.block has shape"):
        model.extend(TOKENS[None, :4], empty(model), branches=found)
    with pytest.raises(ValueError, match="branch_depth >= 0, got 1, 4 and -1"):
        model.init_cache(1, 4, branch_depth=-1)


def test_tokens_without_branches_are_in_no_path(model):
    plain, _ = model.extend(TOKENS[None, :CHUNK], model.init_cache(1, 16))
    other, _ = model.extend(TOKENS[None, :CHUNK], empty(model))
    close(plain, other)
