"""Byte-level BPE tokenizers: train one, load any published `tokenizer.json`."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"

# The 256 bytes and the end of text.
SMALLEST_VOCABULARY = 257

# How text is cut before merging, as in the Qwen2 family (the ParScale checkpoints' tokenizer):
# words keep one leading sign or space, digits stand alone, indentation stays together. On the
# standard library, at 4096 entries, 1 % fewer tokens than GPT-2's pattern.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
      backend: the `tokenizers.Tokenizer`; finds special tokens in text.
      sha256: of the bytes of tokenizer.json; what prepared data are keyed by.
      vocab_size: one more than the largest id; a model's table needs at least as many rows.
      eos_id: id of `<|endoftext|>`, which ends documents; None when the file has none.
    """

    backend: tokenizers.Tokenizer
    path: Path
    sha256: str
    vocab_size: int
    eos_id: int | None

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """A copy that takes the spelling of a special token in a text for plain text."""
        plain = tokenizers.Tokenizer.from_file(str(self.path))
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, nothing added. `special` reads `<|...|>` as special tokens.

        Raises:
          UserError: the text has something that the tokenizer has no token for.
        """
        backend = self.backend if special else self.plain
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"tokenizer {self.path} cannot encode {text!r}: {error}") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores; raises what it raises."""
        try:
            encoded = self.plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception:  # it does not say which text
            return [self.encode(text) for text in texts]
        return [one.ids for one in encoded]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
          UserError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a `tokenizer.json`, or the one in a folder (a published model's, for one).

    Raises:
      UserError: there is none, or it is not a tokenizer file.
    """
    path = local_path(path, "tokenizer")
    if path.is_dir():
        path = path / FILE_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}") from None
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json that can be read: {error}") from None
    ids = backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise UserError(f"tokenizer {path} has an empty vocabulary")
    return Tokenizer(
        backend=backend,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=max(ids) + 1,
        eos_id=backend.token_to_id(END_OF_TEXT),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a lossless byte-level BPE on `texts` and writes it to `path`.

    The same texts give the same file, byte for byte, with any number of threads. Id 0 is
    `<|endoftext|>`. A corpus too small for `vocab_size` entries gives fewer.

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    path.write_text(backend.to_str(), encoding="utf-8")
    return load_tokenizer(path)


def extend_tokenizer(tokenizer: Tokenizer, special: Iterable[str], path: Path) -> Tokenizer:
    """Writes a copy of a tokenizer to `path` in which the texts `special` are special tokens.

    Those that it does not have yet get the ids behind its last one, in their order.
    """
    backend = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    tokens = [tokenizers.AddedToken(text, special=True, normalized=False) for text in special]
    backend.add_special_tokens(tokens)
    path.write_text(backend.to_str(), encoding="utf-8")
    return load_tokenizer(path)


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError when `vocab_size` has no room for the 256 bytes and the end of text."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary size {vocab_size} is too small; expected at least {SMALLEST_VOCABULARY}"
        )
