"""What must hold for any Multiverse model: paths know nothing of each other, and all is joined."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import pjit_configs, zoo
from hackle.layers import masks
from hackle.layers.multiverse import Tags, branch_structure
from hackle.layers.sharding import axis_rules
from hackle.pjit_configs.sharding import batch_sharding
from hackle.zoo.dense import DenseConfig, DenseLM
from hackle.zoo.multiverse import MultiverseConfig, MultiverseLM, as_multiverse
from hackle.zoo.multiverse.params import as_dense
from tests.zoo.multiverse.documents import (
    DOCUMENT,
    END_PATH,
    INNER,
    TAGS,
    VOCAB,
    block,
    positions_of,
    sees,
    text,
)

SIZES = dict(
    vocab_size=VOCAB, width=16, mlp_width=24, depth=2, heads=4, kv_heads=2, head_width=4,
    max_length=128,
)  # fmt: skip
TRUNKS = {
    "qwen2.5": {},
    "qwen3": dict(qkv_bias=False, qk_norm=True),
    "llama": dict(qkv_bias=False, tie_embeddings=False),
}


def make(trunk="qwen2.5", **changes):
    """A model with large weights, so that every mistake shows."""
    config = MultiverseConfig(**{**SIZES, "tags": TAGS, **TRUNKS[trunk], **changes})
    model = MultiverseLM(config, rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, v in flat:
        v.set_value(v[...] * (1 if path[-1] == "scale" else 10))
    nnx.update(model, nnx.from_flat_state(flat))
    return model


@nnx.jit
def run(model, tokens, **rows):
    return model(tokens, **rows)


def logits(model, tokens):
    rows = np.asarray([tokens], np.int32)
    return np.asarray(run(model, rows, branches=branch_structure(rows, TAGS)))[0]


def wide(model, rows, **given):
    """Features in float64, where what is equal differs by rounding of 1e-15 alone."""
    with jax.enable_x64(True):
        graph, state = nnx.split(model)
        model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float64), state))
        return np.asarray(_features(model, rows, **given))


@nnx.jit
def _features(model, tokens, **given):
    return model.features(tokens, **given)


def features(model, tokens):
    rows = np.asarray([tokens], np.int32)
    return wide(model, rows, branches=branch_structure(rows, TAGS))[0]


def test_the_document_is_one_of_three_depths():
    assert branch_structure(np.array(DOCUMENT), TAGS).block.shape == (3, len(DOCUMENT))
    assert len(DOCUMENT) < SIZES["max_length"]


@dataclasses.dataclass(frozen=True)
class Written(masks.Mask):
    """A mask that is written out."""

    visible_to: np.ndarray

    def visible(self, query_index, key_index):
        return jnp.asarray(self.visible_to)[query_index[:, None], key_index[None, :]][None]


@pytest.mark.parametrize("trunk", TRUNKS)
def test_logits_are_those_of_the_written_out_mask_and_positions(trunk):
    model = make(trunk)
    x, positions = model.embedding(np.asarray([DOCUMENT])), positions_of(DOCUMENT)[None]
    mask = Written(sees(DOCUMENT))
    x, _ = model.blocks.scan(lambda block, x, _: (block(x, positions, mask), None), x)
    expected = model.logits(model.final_norm(x))[0]
    np.testing.assert_allclose(logits(model, DOCUMENT), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_path_is_what_it_is_alone_behind_what_it_sees(trunk):
    """A dense model on the visible tokens alone, at their positions, predicts the same."""
    model = make(trunk)
    found = features(model, DOCUMENT)
    dense, visible, positions = as_dense(model), sees(DOCUMENT), positions_of(DOCUMENT)
    # Those that see no two siblings: else what they see is no plain text.
    chain = [visible[np.ix_(seen, seen)].sum() for seen in map(np.flatnonzero, visible)]
    count = visible.sum(axis=1)
    chosen = np.flatnonzero(chain == count * (count + 1) // 2)
    assert sum(DOCUMENT[t] == END_PATH for t in chosen) == 6 and len(chosen) > 40
    rows = np.zeros((3, len(chosen), len(DOCUMENT)), np.int32)
    for row, t in enumerate(chosen):
        seen = np.flatnonzero(visible[t])
        rows[0, row, : seen.size] = np.array(DOCUMENT)[seen]
        rows[1, row, : seen.size] = positions[seen]
        rows[2, row, : seen.size] = 1
    alone = wide(dense, rows[0], positions=rows[1], segment_ids=rows[2])
    last = rows[2].sum(axis=1) - 1
    alone = alone[np.arange(len(chosen)), last]
    np.testing.assert_allclose(found[chosen], alone, atol=1e-12, rtol=0)
    # With plain causal attention over everything it is not so.
    plain = wide(dense, np.asarray([DOCUMENT]))[0]
    assert np.abs(plain[chosen] - alone).max() > 0.1


def test_without_blocks_it_is_the_dense_model_exactly():
    model = make()
    tokens = text(0, 20)
    branches = branch_structure(np.asarray([tokens]), TAGS)
    np.testing.assert_array_equal(branches.position, [np.arange(20)])
    dense = DenseLM(DenseConfig(**SIZES), rngs=nnx.Rngs(1))
    nnx.update(dense, nnx.state(model, nnx.Param))
    expected = run(dense, np.asarray([tokens]))[0]
    np.testing.assert_array_equal(run(model, np.asarray([tokens]))[0], expected)
    np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-6)


def test_order_of_paths_does_not_matter_behind_the_block():
    model = make()
    paths, after = [text(1, 4), [*text(2, 1), *INNER], text(3, 2)], text(4, 5)
    goals = [text(5, 1)] * 3

    def behind(order):
        document = [*block(goals, [paths[i] for i in order], text(6, 3)), *after]
        return features(model, document)[-len(after) - 4 :]

    np.testing.assert_allclose(behind([0, 1, 2]), behind([2, 0, 1]), atol=1e-12)


def test_packed_documents_equal_separate_ones():
    model = make()
    first, second = DOCUMENT, [*text(7, 2), *INNER, *text(8, 3)]
    row = np.asarray([[*first, *second, 0, 0]], np.int32)
    segments = np.asarray([[1] * len(first) + [2] * len(second) + [0, 0]], np.int32)
    branches = branch_structure(row, TAGS, segment_ids=segments)
    packed = wide(model, row, segment_ids=segments, branches=branches)[0]
    np.testing.assert_allclose(packed[: len(first)], features(model, first), atol=1e-12)
    separate = features(model, second)
    np.testing.assert_allclose(packed[len(first) : -2], separate, atol=1e-12)


def test_the_loss_of_a_path_has_no_gradient_in_its_siblings():
    model = make(tie_embeddings=False)
    paths = [[1, 2, 3, 4], [10, 11, 12], [20, 21]]
    tokens = np.asarray([[30, 31, *block([[40]] * 3, paths, [41, 42])]], np.int32)
    branches = branch_structure(tokens, TAGS)

    graph, state = nnx.split(model)

    def loss(state, path):
        scores = jax.nn.log_softmax(nnx.merge(graph, state)(tokens, branches=branches))
        inside = (branches.path[:, 0] == path)[:, :-1]
        picked = jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(inside, picked, 0.0))

    grad = jax.jit(jax.grad(loss))
    for number, own in enumerate(paths, start=1):
        rows = np.abs(grad(state, number)["embedding"]["weight"][...]).sum(axis=1)
        others = [token for path in paths if path is not own for token in path]
        assert (rows[others] == 0).all()
        assert (rows[[*own, 30, 31, 40]] > 0).all()


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["cpu8_fsdp", "cpu8_fsdp_stream_tensor"])
def test_eight_devices_compute_what_one_does(name):
    model = make("qwen3", heads=8, kv_heads=8)
    graph, state = nnx.split(model)
    rows = np.asarray([DOCUMENT] * 8, np.int32)
    branches = branch_structure(rows, TAGS)

    def loss(state, rows, branches):
        scores = jax.nn.log_softmax(nnx.merge(graph, state)(rows, branches=branches)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, rows[:, 1:, None], axis=-1))

    expected, expected_grads = jax.jit(jax.value_and_grad(loss))(state, rows, branches)
    preset = pjit_configs.preset(name)
    mesh = preset.mesh()
    placed, batch = preset.shardings(state), batch_sharding(mesh)

    def sharded(state, rows, branches):
        with axis_rules(preset.rules):
            return jax.value_and_grad(loss)(state, rows, branches)

    with jax.set_mesh(mesh):
        places = (placed, batch, jax.tree.map(lambda _: batch, branches))
        value, grads = jax.jit(sharded, in_shardings=places, out_shardings=(None, placed))(
            jax.device_put(state, placed), rows, branches
        )
    np.testing.assert_allclose(value, expected, atol=1e-5)
    chex.assert_trees_all_close(jax.device_get(grads), jax.device_get(expected_grads), atol=1e-5)


def test_branches_of_other_rows_are_named():
    model, tokens = make(), np.asarray([DOCUMENT, DOCUMENT])
    good = branch_structure(tokens, TAGS)
    one = branch_structure(tokens[0], TAGS)
    for branches, message in (
        (one, r"branches.block has shape \(3, \d+\); expected \[B, depth, L\]"),
        (branch_structure(tokens[:1], TAGS), r"branches.block has shape \(1, 3, \d+\)"),
        (good._replace(path=good.path[:, :2]), r"branches.path has shape \(2, 2, \d+\)"),
        (good._replace(position=one.position), r"branches.position has shape \(\d+,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda branches=branches: model(tokens, branches=branches))


def test_tags_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match="tag <Path> has token id 151673, but vocab_size=151673"):
        nnx.eval_shape(lambda: make(tags=Tags(), vocab_size=151673))
    with pytest.raises(ValueError, match=r"tags='x'; expected layers\.multiverse\.Tags"):
        make(tags="x")
    with pytest.raises(ValueError, match="tags="):
        make(tags={"route": []})


def test_only_a_decoder_of_one_stream_is_a_trunk():
    def abstract(name):
        return nnx.eval_shape(lambda: zoo.create(name, rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match="ParaRNNLM does not attend"):
        as_multiverse(abstract("pararnn-tiny-gru"), TAGS)
    with pytest.raises(ValueError, match="2 streams; expected 1"):
        as_multiverse(abstract("parscale-tiny-p2"), TAGS)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_counts_of_small_models(trunk):
    model = make(trunk)
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == model.config.parameter_count()
