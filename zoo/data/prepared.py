"""From a corpus to token files on disk: prepare once, check on reuse, open anywhere.

Tokens are made here and not while training, because encoding costs whole cores: measured on the
standard library, one core encodes 1.1 million tokens a second (2.3 million on two), while rows
cut from stored tokens come at 50 million a second from one. They are stored flat (uint16 where
the vocabulary allows) with document offsets, beside their tokenizer: a row, also one from the
middle of a long document, is then one gather from a memory map.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hackle.zoo.data.builder import TextFiles, build, read_texts
from hackle.zoo.data.files import SPLITS, Corpus
from hackle.zoo.data.python_source import PythonSource, list_python_source
from hackle.zoo.data.text_folder import TextFolder, list_text_folder
from hackle.zoo.data.tokenizer import (
    END_OF_TEXT,
    FILE_NAME,
    Tokenizer,
    check_vocab_size,
    load_tokenizer,
    train_tokenizer,
)
from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path

FORMAT = 1
METADATA = "metadata.json"
PYTHON = "python"  # what a corpus is called that is the standard library
BUILDERS: Mapping[str, type[TextFiles]] = {"python_source": PythonSource, "text_folder": TextFolder}


@dataclass(frozen=True)
class Split:
    """Size of one split; `tokens` counts the end-of-text tokens, `bytes` is UTF-8 text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared corpus on disk; picklable, opens its files when asked.

    Attributes:
      folder: holds tokenizer.json, metadata.json, `<split>.tokens` and `<split>.offsets.npy`.
      corpus: builder name and label, such as "python_source cpython-3.11.7".
      fingerprint: sha256 over the corpus content and the tokenizer; two runs with the same one
        read the same tokens. For the recipe that a checkpoint remembers.
      vocab_size: one more than the largest token id.
      eos_id: the token that ends every document.
      splits: name -> `Split`.
      reused: found on disk and not made by this call.
    """

    folder: Path
    corpus: str
    fingerprint: str
    corpus_fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    splits: Mapping[str, Split]
    dropped: Mapping[str, int]
    reused: bool

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer.

        Raises:
          UserError: tokenizer.json is not the one that made the tokens.
        """
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise UserError(f"{tokenizer.path} is not the tokenizer of the tokens beside it")
        return tokenizer

    def tokens(self, split: str) -> np.ndarray:
        """[N] read-only memory map of all tokens of `split`, documents one after the other."""
        return np.memmap(self.folder / f"{self._known(split)}.tokens", self.dtype, mode="r")

    def offsets(self, split: str) -> np.ndarray:
        """[documents + 1] int64, where each document starts in `tokens(split)`, and its length."""
        return np.load(self.folder / f"{self._known(split)}.offsets.npy")

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when a model with `vocab_size` rows can't take these token ids."""
        if vocab_size < self.vocab_size:
            raise UserError(
                f"the tokenizer in {self.folder} has {self.vocab_size} tokens but the model's "
                f"vocabulary is {vocab_size}; expected at least as many"
            )

    def describe(self) -> str:
        """One line for people: what it is, how large, where, and whether it was reused."""
        sizes = ", ".join(
            f"{name} {split.documents:,} documents / {split.tokens:,} tokens"
            for name, split in self.splits.items()
        )
        verb = "reused" if self.reused else "prepared"
        return f"data: {verb} {self.corpus} ({sizes}; vocabulary {self.vocab_size}) {self.folder}"

    def _known(self, split: str) -> str:
        if split not in self.splits:
            raise UserError(f"unknown split {split!r}; expected one of {', '.join(self.splits)}")
        return split


def open_corpus(source: str | Path) -> Corpus:
    """Lists a corpus by name: "python" is the standard library, anything else a folder.

    Raises:
      UserError: the folder is missing, unreadable or empty.
    """
    if source == PYTHON:
        return list_python_source()
    return list_text_folder(local_path(source, "corpus"))


def prepare(
    corpus: Corpus | str | Path,
    data_dir: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
) -> Prepared:
    """Makes (or finds) the token files of `corpus` under `data_dir`.

    The tfds dataset (ArrayRecord, text as it is) goes to `data_dir/<builder>/<key>/`, the tokens
    to `data_dir/tokens/<builder>-<key>-<tokenizer>/`, where key holds the hash of the content:
    changed files are another directory. Both are written under another name and renamed when
    whole; a killed run can leave a hidden `.*.partial-*` folder behind, which nothing reads.

    Args:
      corpus: a listing, or what `open_corpus` takes.
      vocab_size: of the tokenizer to train on the train split.
      tokenizer: use this tokenizer.json (or folder with one) instead of training.

    Raises:
      UserError: bad corpus, tokenizer or vocabulary size, or `data_dir` can't be written.
    """
    if not isinstance(corpus, Corpus):
        corpus = open_corpus(corpus)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if given is None:
        check_vocab_size(vocab_size)
    elif given.eos_id is None:
        raise UserError(f"tokenizer {given.path} has no {END_OF_TEXT} token to end documents with")
    kind = f"bpe{vocab_size}" if given is None else given.sha256[:12]
    data_dir = local_path(data_dir, "data_dir")
    folder = data_dir / "tokens" / f"{corpus.name}-{corpus.key}-{kind}"
    found = _reusable(folder, corpus, given)
    if found is not None:
        return found

    scratch = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write data folder {data_dir}: {error.strerror}") from None
    try:
        dataset = build(BUILDERS[corpus.name], corpus, data_dir)
        if given is None:
            train = (text for chunk in read_texts(dataset, corpus, "train") for _, text in chunk)
            given = train_tokenizer(train, vocab_size, scratch / FILE_NAME)
        else:
            shutil.copyfile(given.path, scratch / FILE_NAME)
        _write(scratch, corpus, dataset, given)
        # Another process may have been faster; anything else that is there is damaged.
        found = _reusable(folder, corpus, given)
        if found is not None:
            return found
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    except OSError as error:
        if _reusable(folder, corpus, given) is None:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return replace(load_prepared(folder), reused=False)


def load_prepared(folder: str | Path) -> Prepared:
    """Opens a directory that `prepare` made, on any machine; needs no corpus and no tfds data.

    Raises:
      UserError: it is no such directory, of another format, or files are missing or cut short.
    """
    folder = Path(folder)
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        if metadata["format"] != FORMAT:
            raise UserError(f"{folder} has format {metadata['format']}; expected {FORMAT}")
        splits = {name: Split(**size) for name, size in metadata["splits"].items()}
        prepared = Prepared(
            folder=folder,
            corpus=metadata["corpus"],
            fingerprint=metadata["fingerprint"],
            corpus_fingerprint=metadata["corpus_fingerprint"],
            tokenizer_sha256=metadata["tokenizer_sha256"],
            vocab_size=metadata["vocab_size"],
            eos_id=metadata["eos_id"],
            dtype=metadata["dtype"],
            splits=splits,
            dropped=metadata["dropped"],
            reused=True,
        )
        for name, split in splits.items():
            size = (folder / f"{name}.tokens").stat().st_size
            expected = split.tokens * np.dtype(prepared.dtype).itemsize
            if size != expected:
                raise UserError(f"{folder}/{name}.tokens has {size} bytes; expected {expected}")
            offsets = prepared.offsets(name)
            if len(offsets) != split.documents + 1 or offsets[-1] != split.tokens:
                raise UserError(f"{folder}/{name}.offsets.npy does not fit {METADATA}")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{folder} is no prepared corpus: {error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is no prepared corpus: {METADATA}: {error!r}") from None
    return prepared


def _reusable(folder: Path, corpus: Corpus, given: Tokenizer | None) -> Prepared | None:
    """The prepared corpus in `folder` if it is whole and made from this very content."""
    try:
        prepared = load_prepared(folder)
        tokenizer = prepared.tokenizer()
    except UserError:
        return None
    fits = prepared.corpus_fingerprint == corpus.fingerprint
    if given is not None:
        fits = fits and tokenizer.sha256 == given.sha256
    return prepared if fits else None


def _write(scratch: Path, corpus: Corpus, dataset: Path, tokenizer: Tokenizer) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    splits: dict[str, dict[str, int]] = {}
    hashes: dict[str, str] = {}
    for name in SPLITS:
        digest = hashlib.sha256()
        lengths: list[int] = []
        size = 0
        with open(scratch / f"{name}.tokens", "wb") as file:
            for ids, text_bytes in _encode(dataset, corpus, name, tokenizer):
                data = np.asarray(ids, dtype).tobytes()
                file.write(data)
                digest.update(data)
                lengths.append(len(ids))
                size += text_bytes
            file.flush()
            os.fsync(file.fileno())
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        np.save(scratch / f"{name}.offsets.npy", offsets)
        splits[name] = {"documents": len(lengths), "tokens": int(offsets[-1]), "bytes": size}
        hashes[name] = digest.hexdigest()
    identity = f"{FORMAT} {corpus.fingerprint} {tokenizer.sha256}"
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "corpus": f"{corpus.name} {corpus.label}",
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "corpus_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.name,
        "splits": splits,
        "dropped": dict(corpus.dropped),
        "tokens_sha256": hashes,
        "versions": {name: version(name) for name in ("tensorflow-datasets", "tokenizers")},
    }
    (scratch / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def _encode(
    dataset: Path, corpus: Corpus, split: str, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], int]]:
    """Yields each document's ids with its end-of-text, and its size in bytes, in stored order."""
    eos = tokenizer.eos_id
    assert eos is not None  # prepare() checked
    for chunk in read_texts(dataset, corpus, split):
        encoded = tokenizer.encode_batch([text for _, text in chunk])
        for (path, text), ids in zip(chunk, encoded, strict=True):
            if eos in ids:
                raise UserError(f"{path} encodes to the end-of-text token {eos} in its middle")
            yield [*ids, eos], len(text.encode())
