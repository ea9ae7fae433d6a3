"""Text from a stream of tokens, and the tokens that end it."""

import json

import pytest

from hackle.zoo.data.tokenizer import FILE_NAME, train_tokenizer
from hackle.zoo.errors import UserError
from hackle.zoo.generate.text import TextStream, stop_tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = "def f(x):\n    return x + 1\n" * 50
    return train_tokenizer([text], 270, tmp_path_factory.mktemp("tokenizer") / FILE_NAME)


@pytest.mark.parametrize("text", ["plain", "naïve — ünïcode", "日本語 🙂 end", ""])
def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_ids_past_the_tokenizer_have_no_text(tokenizer):
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in [*tokenizer.encode("ab"), 270, 9999]]
    assert "".join(shown) + stream.finish() == "ab"


def test_a_cut_character_shows_at_the_end_only(tokenizer):
    stream = TextStream(tokenizer)
    cut = tokenizer.encode("🙂")[:-1]
    assert [stream.push(token) for token in cut] == [""] * len(cut)
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_the_end_of_text_token_is_not_shown(tokenizer):
    stream = TextStream(tokenizer)
    shown = [stream.push(token) for token in [*tokenizer.encode("x"), tokenizer.eos_id]]
    assert "".join(shown) == "x"


@pytest.mark.parametrize("form", [lambda word: word, lambda word: {"content": word}])
def test_stops_come_from_every_file_that_names_one(tokenizer, tmp_path, form):
    assert stop_tokens(tokenizer, tmp_path) == {tokenizer.eos_id}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": form("de")}))
    token = tokenizer.backend.token_to_id("de")
    assert token is not None and token not in (tokenizer.eos_id, 7, 8, 9)
    assert stop_tokens(tokenizer, tmp_path) == {tokenizer.eos_id, 7, 8, 9, token}


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"eos_token_id": "x"}', "eos_token_id='x' in .*; expected an integer or a list of them"),
        ('{"eos_token_id": [3, true]}', "eos_token_id=.3, True. in "),
        ("{", "generation_config.json is not JSON"),
    ],
)
def test_a_damaged_file_of_stops_is_told(tokenizer, tmp_path, text, said):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        stop_tokens(tokenizer, tmp_path)


def test_given_stops_replace_them_and_must_be_one_token(tokenizer, tmp_path):
    newline = tokenizer.encode("\n")
    assert stop_tokens(tokenizer, tmp_path, ["\n"]) == set(newline)
    with pytest.raises(UserError, match="stop text '🙂' is . tokens; expected one token"):
        stop_tokens(tokenizer, tmp_path, ["🙂"])
