"""Tokenizers: deterministic, lossless, and clear about what they can't read."""

import os
import subprocess
import sys

import pytest

from hackle.zoo.data import END_OF_TEXT, load_tokenizer, train_tokenizer
from hackle.zoo.data.tokenizer import FILE_NAME
from hackle.zoo.errors import UserError
from hackle.zoo.mapreduce.alphabet import write_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "class A:\n\tpass\r\n\r\n",
    "naïve 日本 🙂 \u0000\u200b",
    "   \n\n   trailing   ",
    "it's 1234567890",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS * 20, 290, tmp_path_factory.mktemp("tokenizer") / FILE_NAME)


@pytest.mark.parametrize("text", [*TEXTS, "", "never seen: Ω≠∀ \x7f\ufeff", END_OF_TEXT])
def test_round_trip_is_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_every_byte_has_a_token(tokenizer):
    text = "".join(map(chr, range(0x800)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_end_of_text_is_id_0_and_text_cannot_spell_it(tokenizer):
    assert tokenizer.eos_id == 0 and tokenizer.vocab_size == 290
    text = f"a{END_OF_TEXT}b"
    assert 0 not in tokenizer.encode(text)
    special = tokenizer.encode(text, special=True)
    assert special.count(0) == 1
    assert tokenizer.decode(special) == text
    assert tokenizer.decode(special, skip_special=True) == "ab"


def test_merges_are_learned(tokenizer):
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_training_is_the_same_in_another_process_with_one_thread(tokenizer, tmp_path):
    code = (
        "import sys, pathlib; from hackle.zoo.data.tokenizer import train_tokenizer; "
        "train_tokenizer(eval(sys.argv[1]) * 20, 290, pathlib.Path(sys.argv[2]))"
    )
    path = tmp_path / FILE_NAME
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, repr(TEXTS), str(path)]
    subprocess.run(command, check=True, env=environment)
    assert path.read_bytes() == tokenizer.path.read_bytes()
    assert load_tokenizer(path).sha256 == tokenizer.sha256


def test_loads_from_file_and_folder(tokenizer):
    for path in (tokenizer.path, tokenizer.path.parent, str(tokenizer.path)):
        again = load_tokenizer(path)
        assert again.sha256 == tokenizer.sha256
        assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read tokenizer .*tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"none\.json"):
        load_tokenizer(tmp_path / "none.json")
    for data in (b"{}", b"not json", b"\xff\xfe", b""):
        (tmp_path / FILE_NAME).write_bytes(data)
        with pytest.raises(UserError, match=r"is not a tokenizer.json"):
            load_tokenizer(tmp_path)


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match="256 is too small; expected at least 257"):
        train_tokenizer(TEXTS, 256, tmp_path / FILE_NAME)


def test_ids_outside_the_vocabulary(tokenizer):
    for bad in (-1, 290):
        with pytest.raises(UserError, match=f"token id {bad}"):
            tokenizer.decode([1, bad])


def test_what_a_tokenizer_has_no_token_for_is_said(tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path)  # of characters, without one for what it does not know
    with pytest.raises(UserError, match=r"tokenizer.json cannot encode 'caf\xe9': .*"):
        load_tokenizer(path).encode("caf\xe9")
    with pytest.raises(UserError, match=r"tokenizer.json cannot encode 'th\xe9': .*"):
        load_tokenizer(path).encode_batch(["a", "th\xe9"])
