"""Preparing: same bytes every time, reused only when it fits, never half-written."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from hackle.zoo.data import (
    END_OF_TEXT,
    list_python_source,
    list_text_folder,
    load_prepared,
    prepare,
    train_tokenizer,
)
from hackle.zoo.data import prepared as module
from hackle.zoo.data.files import list_corpus
from hackle.zoo.errors import UserError
from tests.zoo.data.conftest import write_corpus


def stored(prepared, split):
    """{path: text} by way of the tokens."""
    tokens, offsets = prepared.tokens(split), prepared.offsets(split)
    tokenizer = prepared.tokenizer()
    texts = []
    for a, b in itertools.pairwise(offsets):
        assert tokens[b - 1] == prepared.eos_id and prepared.eos_id not in tokens[a : b - 1]
        texts.append(tokenizer.decode(tokens[a : b - 1]))
    return sorted(texts)


def listed(corpus, split):
    return sorted(corpus.read(file).decode() for file in corpus.split(split))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tokens_decode_to_the_listed_files(prepared, corpus_folder):
    corpus = list_text_folder(corpus_folder)
    for split in ("train", "validation"):
        assert stored(prepared, split) == listed(corpus, split)
        size = prepared.splits[split]
        assert size.documents == len(corpus.split(split))
        assert size.tokens == len(prepared.tokens(split)) == prepared.offsets(split)[-1]
        assert size.bytes == sum(file.size for file in corpus.split(split))
    assert prepared.tokens("train").dtype == np.uint16
    assert not prepared.reused and "data: prepared text_folder my_code" in prepared.describe()


def test_standard_library_sample(tmp_path):
    whole = list_python_source()
    few = [file.path for file in whole.files if file.path.startswith("json/")]
    corpus = list_corpus(whole.name, whole.label, whole.root, few, what="json")
    assert len(corpus.files) >= 4
    prepared = prepare(corpus, tmp_path, vocab_size=400)
    for split in ("train", "validation"):
        assert stored(prepared, split) == listed(corpus, split)
    assert "python_source" in prepared.corpus and whole.label in prepared.folder.name


def test_same_bytes_in_another_place(prepared, corpus_folder, tmp_path):
    again = prepare(corpus_folder, tmp_path, vocab_size=300)
    assert files_of(again.folder) == files_of(prepared.folder)
    assert again.fingerprint == prepared.fingerprint


def test_tokenizer_never_sees_the_validation_split(corpus_folder, tmp_path):
    corpus = list_text_folder(corpus_folder)
    prepared = prepare(corpus, tmp_path / "d", vocab_size=300)
    texts = listed(corpus, "train")
    alone = train_tokenizer(sorted(texts), 300, tmp_path / "tokenizer.json")
    assert alone.sha256 == prepared.tokenizer_sha256
    everything = train_tokenizer(texts + listed(corpus, "validation") * 9, 300, tmp_path / "all")
    assert everything.sha256 != prepared.tokenizer_sha256


def test_reused_when_it_fits_and_said(prepared, corpus_folder, monkeypatch):
    monkeypatch.setattr(module, "build", None)  # any attempt to build would fail
    again = prepare(corpus_folder, prepared.folder.parents[1], vocab_size=300)
    assert again.reused and again.describe().startswith("data: reused text_folder my_code")
    assert again.folder == prepared.folder and again.splits == prepared.splits


def test_changed_folder_or_vocabulary_is_another_directory(tmp_path):
    folder = write_corpus(tmp_path / "c", files=6)
    first = prepare(folder, tmp_path / "d", vocab_size=270)
    other_size = prepare(folder, tmp_path / "d", vocab_size=280)
    (folder / "more.py").write_text("added = True\n")
    changed = prepare(folder, tmp_path / "d", vocab_size=270)
    assert len({first.folder, other_size.folder, changed.folder}) == 3
    assert len({first.fingerprint, other_size.fingerprint, changed.fingerprint}) == 3
    assert not other_size.reused and not changed.reused
    assert sum(s.documents for s in changed.splits.values()) == 7
    (folder / "more.py").unlink()
    assert prepare(folder, tmp_path / "d", vocab_size=270).reused


def test_own_tokenizer(prepared, corpus_folder, tmp_path):
    tokenizer = train_tokenizer(["other texts " * 9], 260, tmp_path / "tokenizer.json")
    other = prepare(corpus_folder, tmp_path / "d", tokenizer=tmp_path)
    assert other.tokenizer_sha256 == tokenizer.sha256 and other.vocab_size == tokenizer.vocab_size
    assert stored(other, "train") == stored(prepared, "train")
    assert prepare(corpus_folder, tmp_path / "d", tokenizer=tokenizer.path).reused


def test_own_tokenizer_without_end_of_text(prepared, corpus_folder, tmp_path):
    text = (prepared.folder / "tokenizer.json").read_text().replace(END_OF_TEXT, "<other>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"has no <\|endoftext\|> token"):
        prepare(corpus_folder, tmp_path / "d", tokenizer=tmp_path)


def test_a_file_that_spells_the_end_of_text_is_text(tmp_path):
    folder = write_corpus(tmp_path / "c", files=5)
    (folder / "tricky.py").write_text(f'eos = "{END_OF_TEXT}"\n')
    prepared = prepare(folder, tmp_path / "d", vocab_size=300)
    corpus = list_text_folder(folder)
    for split in ("train", "validation"):
        assert stored(prepared, split) == listed(corpus, split)


def test_vocabulary_of_the_model(prepared):
    prepared.require_vocabulary(300)
    prepared.require_vocabulary(301)
    with pytest.raises(UserError, match="has 300 tokens but the model's vocabulary is 299"):
        prepared.require_vocabulary(299)


def copy_of(prepared, folder):
    shutil.copytree(prepared.folder, folder / prepared.folder.name)
    return folder / prepared.folder.name


@pytest.mark.parametrize(
    "damage",
    ["no metadata", "metadata", "field", "format", "short", "missing", "offsets", "tokenizer"],
)
def test_damage_is_named_and_never_reused(prepared, corpus_folder, tmp_path, damage):
    folder = copy_of(prepared, tmp_path / "tokens")
    metadata = folder / "metadata.json"
    known = json.loads(metadata.read_text())
    if damage == "no metadata":
        metadata.unlink()
    elif damage == "metadata":
        metadata.write_text(metadata.read_text()[:50])
    elif damage == "field":
        known.pop("dtype")
        metadata.write_text(json.dumps(known))
    elif damage == "format":
        metadata.write_text(json.dumps({**known, "format": 99}))
    elif damage == "short":
        os.truncate(folder / "train.tokens", 100)
    elif damage == "missing":
        (folder / "validation.tokens").unlink()
    elif damage == "offsets":
        np.save(folder / "train.offsets.npy", np.arange(4))
    else:
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match=str(folder)):
        load_prepared(folder).tokenizer()
    again = prepare(corpus_folder, tmp_path, vocab_size=300)
    assert not again.reused and files_of(again.folder) == files_of(prepared.folder)


def test_stale_content_under_the_right_name_is_not_reused(prepared, corpus_folder, tmp_path):
    folder = copy_of(prepared, tmp_path / "tokens")
    known = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**known, "corpus_fingerprint": "0" * 64}))
    assert not prepare(corpus_folder, tmp_path, vocab_size=300).reused


def test_no_prepared_corpus(tmp_path):
    with pytest.raises(UserError, match="is no prepared corpus"):
        load_prepared(tmp_path)


def test_opens_elsewhere_without_corpus_or_builder(prepared, tmp_path):
    moved = load_prepared(copy_of(prepared, tmp_path))
    assert (moved.tokens("train") == prepared.tokens("train")).all()
    assert moved.fingerprint == prepared.fingerprint
    with pytest.raises(UserError, match="unknown split 'test'; expected one of train, validation"):
        moved.tokens("test")


def test_failing_in_the_middle_leaves_nothing(corpus_folder, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus_folder, tmp_path, vocab_size=300)
    assert list((tmp_path / "tokens").iterdir()) == []
    assert not prepare(corpus_folder, tmp_path, vocab_size=300).reused


@pytest.mark.parametrize("where", ["dataset", "tokens"])
def test_killed_in_the_middle_is_not_reused(prepared, corpus_folder, tmp_path, where):
    """SIGKILL while the records, or the tokens, are half-written."""
    code = """
import os, signal, sys
from hackle.zoo.data import builder, prepare, prepared
def kill_after(generator, n):
    for i, item in enumerate(generator):
        if i == n:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
if sys.argv[3] == "dataset":
    make = builder.TextFiles._generate_examples
    builder.TextFiles._generate_examples = lambda self, files: kill_after(make(self, files), 3)
else:
    encode = prepared._encode
    prepared._encode = lambda *args: kill_after(encode(*args), 3)
prepare(sys.argv[1], sys.argv[2], vocab_size=300)
"""
    command = [sys.executable, "-c", code, str(corpus_folder), str(tmp_path), where]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert any(path.is_dir() for path in (tmp_path / "tokens").iterdir())  # it had begun
    again = prepare(corpus_folder, tmp_path, vocab_size=300)
    assert not again.reused and files_of(again.folder) == files_of(prepared.folder)


def test_two_at_the_same_time(prepared, corpus_folder, tmp_path):
    code = "import sys; from hackle.zoo.data import prepare; prepare(*sys.argv[1:], vocab_size=300)"
    command = [sys.executable, "-c", code, str(corpus_folder), str(tmp_path)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    again = prepare(corpus_folder, tmp_path, vocab_size=300)
    assert again.reused and files_of(again.folder) == files_of(prepared.folder)
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_loses_the_race_for_the_directory(prepared, corpus_folder, tmp_path, monkeypatch):
    write = module._write

    def write_and_lose(*args):
        write(*args)
        copy_of(prepared, tmp_path / "tokens")

    monkeypatch.setattr(module, "_write", write_and_lose)
    assert prepare(corpus_folder, tmp_path, vocab_size=300).reused
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_damaged_records_are_refused(corpus_folder, tmp_path):
    corpus = list_text_folder(corpus_folder)
    first = prepare(corpus, tmp_path, vocab_size=300)
    shutil.rmtree(first.folder)
    # The same directory with other content: as if the listing's hash had been cut too short.
    wrong = replace(corpus.files[0], sha256="0" * 64)
    other = replace(corpus, files=(wrong, *corpus.files[1:]))
    object.__setattr__(other, "fingerprint", corpus.fingerprint)
    with pytest.raises(UserError, match="is damaged"):
        prepare(other, tmp_path, vocab_size=300)


def test_unwritable_data_folder(corpus_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write data folder .*file"):
        prepare(corpus_folder, tmp_path / "file", vocab_size=300)


def test_full_disk(corpus_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        prepare(corpus_folder, tmp_path, vocab_size=300)


def test_bad_vocabulary_size_before_anything_is_made(corpus_folder, tmp_path):
    with pytest.raises(UserError, match="vocabulary size 100 is too small"):
        prepare(corpus_folder, tmp_path / "d", vocab_size=100)
    assert not (tmp_path / "d").exists()


def test_prepares_quietly(corpus_folder, tmp_path, capfd):
    prepare(corpus_folder, tmp_path, vocab_size=300)
    assert capfd.readouterr() == ("", "")


def test_never_imports_tensorflow(corpus_folder, tmp_path):
    """With a `tensorflow` on the path that ends the program when it is imported."""
    code = """
import sys
from hackle.zoo.data import batches, prepare
prepared = prepare(sys.argv[1], sys.argv[2], vocab_size=300)
batch = next(batches(prepared, "train", batch=2, length=16))
assert batch["tokens"].shape == (2, 16)
assert "tensorflow" not in sys.modules
"""
    trap = tmp_path / "path" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("import os; os._exit(77)")
    path = os.pathsep.join(filter(None, [str(trap.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    imports = [sys.executable, "-c", "import tensorflow"]
    assert subprocess.run(imports, env=environment).returncode == 77
    command = [sys.executable, "-c", code, str(corpus_folder), str(tmp_path / "d")]
    assert subprocess.run(command, env=environment).returncode == 0
