"""Giving a trained trunk the tags, held against transformers' own resizing and adding of tokens."""

import importlib

import jax
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.layers.multiverse import Tags
from hackle.zoo.data import extend_tokenizer, train_tokenizer
from hackle.zoo.multiverse import add_tags, as_multiverse

torch = importlib.import_module("torch")
transformers = importlib.import_module("transformers")

TEXTS = ["Think of a Path, a Goal/Outline and a parallel Conclusion"] * 3
SIZES = dict(width=16, mlp_width=24, depth=1, heads=2, kv_heads=1, head_width=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train_tokenizer(TEXTS, 280, tmp_path_factory.mktemp("plain") / "tokenizer.json")


@pytest.fixture(scope="module")
def extended(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("extended") / "tokenizer.json"
    return extend_tokenizer(plain, Tags().tokens(), path)


def trunk(vocab_size, tied=False, name="dense-tiny", **changes):
    sizes = {**SIZES, "vocab_size": vocab_size, "tie_embeddings": tied, **changes}
    return zoo.create(name, rngs=nnx.Rngs(3), **sizes)


def official(trunk, plain, folder):
    """Table and head as the published training code makes them, written with torch here."""
    zoo.save_pretrained(trunk, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(plain.path))
    texts = list(Tags().tokens())
    tokenizer.add_special_tokens({"additional_special_tokens": texts})
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for text in texts:
            parts = tokenizer(text.strip("<>"), add_special_tokens=False).input_ids
            new = tokenizer.convert_tokens_to_ids(text)
            table[new] = table[parts].mean(0)
            if not trunk.config.tie_embeddings:
                head[new] = head[parts].mean(0)
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    return table.detach().numpy(), head.detach().numpy(), ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_a_padded_table_shrinks_and_gets_the_published_rows(tmp_path, plain, extended, tied, kind):
    changes = dict(qkv_bias=False, qk_norm=True) if kind == "Qwen3" else {}
    model = trunk(448, tied, **changes)
    table, head, ids = official(model, plain, tmp_path / "trunk")
    tags = Tags.numbered(plain.vocab_size)
    assert ids == list(tags.tokens().values())
    for tokenizer in (plain, extended):
        ours = add_tags(model, tokenizer, tags)
        rows = 64 * -(-(plain.vocab_size + 12) // 64)
        assert ours.config.vocab_size == rows == table.shape[0] < 448
        assert (ours.config.tags, ours.config.qk_norm) == (tags, kind == "Qwen3")
        np.testing.assert_allclose(ours.embedding.weight[...], table, atol=1e-7, rtol=0)
        if tied:
            assert ours.head is None
        else:
            np.testing.assert_allclose(ours.head.weight[...].T, head, atol=1e-7, rtol=0)
        count = sum(x.size for x in jax.tree.leaves(nnx.state(ours)))
        assert count == ours.config.parameter_count()
    assert model.embedding.weight.shape == (448, 16), "the trunk stays as it was"


def test_tags_split_into_the_tokens_of_their_words(plain, extended):
    model = trunk(320)
    ours = add_tags(model, plain, Tags.numbered(plain.vocab_size))
    table = np.asarray(model.embedding.weight[...])
    for text in ("<Path>", "</Outline>"):
        parts = plain.encode(text.strip("<>"))
        row = ours.embedding.weight[...][extended.backend.token_to_id(text)]
        np.testing.assert_allclose(row, table[parts].mean(0), atol=1e-7)
    assert len(plain.encode("/Outline")) > 1
    assert extended.encode("</Path>", special=True) == [extended.backend.token_to_id("</Path>")]
    assert extended.encode("Path of 2") == plain.encode("Path of 2")


def test_new_rows_of_no_token_are_the_mean(plain):
    model = trunk(plain.vocab_size)
    tags = Tags.numbered(plain.vocab_size)
    for tied in (False, True):
        model = trunk(plain.vocab_size, tied)
        ours = add_tags(model, plain, tags, multiple=100)
        table = np.asarray(ours.embedding.weight[...])
        assert table.shape[0] == ours.config.vocab_size == 300
        old = np.asarray(model.embedding.weight[...])
        np.testing.assert_array_equal(table[: plain.vocab_size], old)
        rest = table[plain.vocab_size + 12 :]
        assert rest.shape[0] > 0
        np.testing.assert_allclose(rest, np.broadcast_to(old.mean(0), rest.shape), atol=1e-7)


def test_logits_of_old_tokens_are_those_of_the_trunk(plain):
    model = trunk(320, name="parscale-tiny-p1")
    ours = add_tags(model, plain, Tags.numbered(plain.vocab_size))
    tokens = np.asarray([plain.encode(TEXTS[0])])
    known = plain.vocab_size
    np.testing.assert_allclose(
        ours(tokens)[..., :known], model(tokens)[..., :known], atol=1e-6, rtol=0
    )
    assert ours.config.qkv_bias and type(ours).__name__ == "MultiverseLM"


def test_dtype_stays(plain):
    model = trunk(320)
    nnx.update(model, jax.tree.map(lambda x: x.astype("bfloat16"), nnx.state(model)))
    ours = add_tags(model, plain, Tags.numbered(plain.vocab_size))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(ours))} == {"bfloat16"}


def test_ids_of_other_tokens_are_refused(plain, extended):
    free = plain.vocab_size
    taken = Tags.numbered(free - 3)
    word = plain.decode([free - 3])
    with pytest.raises(
        ValueError, match=rf"tag <Think> has token id {free - 3}, which is '{word}'"
    ):
        add_tags(trunk(448), plain, taken)
    with pytest.raises(ValueError, match=r"tag <Think> has token id \d+, which is '</Think>'"):
        add_tags(trunk(448), extended, Tags.numbered(free + 1))
    with pytest.raises(
        ValueError, match=rf"a token of id {free - 1}, but the trunk vocab_size=100"
    ):
        add_tags(trunk(100), plain, Tags.numbered(free))


def test_tags_of_a_trained_trunk_are_only_named(extended):
    model = trunk(320)
    tags = Tags().located(extended.backend.token_to_id)
    ours = as_multiverse(model, tags)
    assert ours.embedding.weight[...] is model.embedding.weight[...]
    assert ours.config.vocab_size == 320
    with pytest.raises(ValueError, match="tag <Think> has token id 151665, but vocab_size=320"):
        as_multiverse(model)
