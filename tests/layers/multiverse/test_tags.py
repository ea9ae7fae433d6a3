"""Tags: published ids, other sets, where their embeddings start."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hackle.layers.multiverse import Tag, Tags, embed_tags

PUBLISHED = [
    "<Think>", "</Think>", "<Parallel>", "</Parallel>", "<Goal>", "</Goal>",
    "<Outline>", "</Outline>", "<Path>", "</Path>", "<Conclusion>", "</Conclusion>",
]  # fmt: skip


def test_the_published_twelve():
    tokens = Tags().tokens()
    assert list(tokens) == PUBLISHED
    assert list(tokens.values()) == list(range(151665, 151677))
    assert (tokens["</Goal>"], tokens["</Path>"]) == (151670, 151674)
    assert Tags.numbered(151665) == Tags()
    assert list(Tags.numbered(7).tokens().values()) == list(range(7, 19))


def test_parathinker_ids():
    tokens = Tags.parathinker().tokens()
    for k in range(1, 9):
        assert tokens[f"<think{k}>"] == 151665 + 2 * (k - 1)
        assert tokens[f"</think{k}>"] == tokens[f"<think{k}>"] + 1
    assert (tokens["<summary>"], tokens["</summary>"]) == (151681, 151682)


def test_tags_are_found_in_a_tokenizer():
    places = {text: 3 * i + 5 for i, text in enumerate(PUBLISHED)}
    assert Tags().located(places.get).tokens() == places
    del places["</Path>"]
    with pytest.raises(ValueError, match="the tokenizer has no token </Path>"):
        Tags().located(places.get)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(path=()), "no path"),
        (dict(parallel=(), conclusion=()), "neither conclusion nor parallel"),
        (dict(goal=(Tag("Goal", 151665, 5),)), "<Goal> has token id 151665, which <Think> has too"),
        (dict(goal=(Tag("Goal", -1, 5),)), "<Goal> has token id -1"),
    ],
)
def test_tags_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Tags(), **changes)


def encode(text):
    """One token a letter."""
    return [ord(letter) - ord("/") for letter in text]


def test_embeddings_start_as_the_mean_of_the_word():
    table = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    tags = Tags.numbered(80)
    found = np.asarray(embed_tags(jnp.asarray(table), tags, encode))
    for text, token in tags.tokens().items():
        word = text.removeprefix("<").removesuffix(">")
        np.testing.assert_allclose(found[token], table[encode(word)].mean(0), rtol=1e-6)
    others = np.setdiff1d(np.arange(100), list(tags.tokens().values()))
    np.testing.assert_array_equal(found[others], table[others])
    assert not np.allclose(found[tags.path[0].open], found[tags.path[0].close]), "the slash counts"


def test_the_mean_is_taken_in_float32():
    table = jnp.full((100, 1), 1 + 2**-7, jnp.bfloat16).at[0].set(1)  # the slash
    found = embed_tags(table, Tags.numbered(80), encode)
    assert found.dtype == jnp.bfloat16
    mean = jnp.asarray((4 * (1 + 2**-7) + 1) / 5, jnp.float32).astype(jnp.bfloat16)
    assert found[Tags.numbered(80).path[0].close, 0] == mean


@pytest.mark.parametrize(
    "first, encode, message",
    [
        (95, encode, r"tag <Outline>.* token id 101, but the table has 100 rows|token id 10[0-9]"),
        (80, lambda text: [], r"the word of tag <Think> has tokens \[\]"),
        (80, lambda text: [3, 85], r"tokens \[3, 85\]; expected some of 0..99"),
        (80, lambda text: [400], r"tokens \[400\]"),
    ],
)
def test_embeddings_that_cannot_be(first, encode, message):
    with pytest.raises(ValueError, match=message):
        embed_tags(jnp.zeros((100, 2)), Tags.numbered(first), encode)
