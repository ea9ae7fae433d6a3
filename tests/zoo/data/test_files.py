"""Which files are in a corpus and in which split."""

import os
import shutil
from pathlib import Path

import pytest

from hackle.zoo.data import files, list_python_source, list_text_folder, open_corpus
from hackle.zoo.errors import UserError


def paths(corpus, split=None):
    return [file.path for file in corpus.files if split in (None, file.split)]


def fill(folder, **texts):
    for name, text in texts.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}.txt").write_bytes(data)
    return folder


def test_listing_is_sorted_and_the_same_twice_and_elsewhere(corpus_folder, tmp_path):
    first, second = list_text_folder(corpus_folder), list_text_folder(corpus_folder)
    assert first == second and paths(first) == sorted(paths(first))
    copy = tmp_path / corpus_folder.name
    shutil.copytree(corpus_folder, copy)
    assert list_text_folder(copy).fingerprint == first.fingerprint
    assert list_text_folder(copy).key == first.key


def test_splits_are_disjoint_and_complete(corpus_folder):
    corpus = list_text_folder(corpus_folder)
    train, validation = set(paths(corpus, "train")), set(paths(corpus, "validation"))
    assert train and validation and not train & validation
    assert train | validation == set(paths(corpus)) and len(paths(corpus)) == 40


def test_split_follows_the_content_and_not_the_name(corpus_folder, tmp_path):
    splits = {file.sha256: file.split for file in list_text_folder(corpus_folder).files}
    for i, path in enumerate(sorted(corpus_folder.rglob("*.py"), reverse=True)):
        shutil.copy(path, tmp_path / f"{i}.py")
    (tmp_path / "one_more.py").write_text("entirely new")
    moved = {file.sha256: file.split for file in list_text_folder(tmp_path).files}
    assert splits.items() <= moved.items()


def test_equal_files_count_once(tmp_path):
    fill(tmp_path, a="same", b="same", c="other", d="same")
    corpus = list_text_folder(tmp_path)
    assert paths(corpus) == ["a.txt", "c.txt"] and corpus.dropped == {"duplicate": 2}


def test_what_is_no_text_is_left_out_and_counted(tmp_path):
    fill(tmp_path, a="one", b=b"\xff\xfe\x00", c="two", d=" \n", e="")
    corpus = list_text_folder(tmp_path)
    assert paths(corpus) == ["a.txt", "c.txt"]
    assert corpus.dropped == {"empty": 2, "undecodable": 1}


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_any_change_changes_the_fingerprint(corpus_folder, tmp_path, change):
    folder = tmp_path / "f"
    shutil.copytree(corpus_folder, folder)
    before = list_text_folder(folder)
    file = folder / paths(before)[3]
    if change == "edit":
        file.write_bytes(file.read_bytes() + b"!")
    elif change == "add":
        (folder / "zz.py").write_text("new")
    elif change == "remove":
        file.unlink()
    else:
        file.rename(folder / "renamed.py")
    after = list_text_folder(folder)
    assert after.fingerprint != before.fingerprint and after.key != before.key


def test_patterns(tmp_path):
    for name in ("a.txt", "b.rst", "sub/c.rst", "sub/d.txt", ".git/e.txt", "sub/__pycache__/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for patterns, expected in {
        ("*.txt",): ["a.txt", "sub/d.txt"],
        ("*.rst", "a.*"): ["a.txt", "b.rst", "sub/c.rst"],
        ("**/*.rst",): ["b.rst", "sub/c.rst"],
        ("sub/*",): ["sub/c.rst", "sub/d.txt"],
    }.items():
        assert paths(list_text_folder(tmp_path, patterns)) == expected


def test_broken_links_and_pipes_are_passed_over(tmp_path):
    fill(tmp_path, a="one", b="two")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert paths(list_text_folder(tmp_path)) == ["a.txt", "b.txt"]


def test_empty_folder_names_folder_and_patterns(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path} holds no file that matches \*.py, \*.txt"):
        list_text_folder(tmp_path)
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(UserError, match=r"matches \*.c"):
        list_text_folder(tmp_path, ["*.c"])


def test_one_file_is_too_few(tmp_path):
    fill(tmp_path, a="alone", b="alone", c="")
    with pytest.raises(UserError, match=r"holds 1 usable text files.*1 duplicate, 1 empty"):
        list_text_folder(tmp_path)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_both_splits_always_have_a_file(tmp_path, count):
    for salt in range(8):
        folder = tmp_path / str(salt)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.txt").write_text(f"{salt} {i}")
        corpus = list_text_folder(folder)
        assert paths(corpus, "train") and paths(corpus, "validation")


def test_missing_folder_and_file_in_its_place(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a.txt is a file; expected a folder"):
        open_corpus(fill(tmp_path, a="x") / "a.txt")


def test_unreadable_folder_and_file(tmp_path, monkeypatch):
    # Permissions do not stop root, so the system calls are made to fail instead.
    fill(tmp_path, a="one", b="two")
    (tmp_path / "locked").mkdir()
    scandir, read = os.scandir, Path.read_bytes

    def no_scan(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", no_scan)
        with pytest.raises(UserError, match=r"cannot read folder .*locked: Permission denied"):
            list_text_folder(tmp_path)

    def no_read(path):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", no_read)
    with pytest.raises(UserError, match=r"cannot read .*b.txt: Permission denied"):
        list_text_folder(tmp_path)


def test_a_file_that_changes_after_listing_is_refused(tmp_path):
    corpus = list_text_folder(fill(tmp_path, a="one", b="two"))
    (tmp_path / "a.txt").write_text("three")
    with pytest.raises(UserError, match=r"a.txt changed"):
        corpus.read(corpus.files[0])


def test_standard_library_without_tests_tables_and_generated_files():
    corpus = list_python_source()
    kept = paths(corpus)
    assert len(kept) > 300 and {"ast.py", "json/decoder.py", "collections/__init__.py"} <= set(kept)
    for path in kept:
        assert path.endswith(".py") and not path.startswith(("encodings/", "pydoc_data/"))
        assert not {"test", "tests", "idle_test", "site-packages"} & set(path.split("/"))
    assert not {"token.py", "keyword.py", "html/entities.py", "stringprep.py"} & set(kept)
    assert corpus.dropped["table"] > 50 and corpus.dropped["generated"] >= 3
    sizes = {split: sum(f.size for f in corpus.split(split)) for split in files.SPLITS}
    assert 0.04 < sizes["validation"] / sum(sizes.values()) < 0.12


def test_python_without_source(tmp_path):
    with pytest.raises(UserError, match="no standard library source"):
        list_python_source(tmp_path / "none")
    with pytest.raises(UserError, match=r"standard library at .* holds 0 usable"):
        list_python_source(tmp_path)
