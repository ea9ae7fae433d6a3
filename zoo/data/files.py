"""Which files make a corpus: deterministic listing, duplicates out, a split by content hash.

Nothing here needs more than the standard library, so that asking "has the corpus changed?" at
every start costs one pass over the bytes and no heavy import.
"""

import fnmatch
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hackle.zoo.errors import UserError

SPLITS = ("train", "validation")

# A file is in the validation split when its hash, read as a fraction, is below this share.
VALIDATION_SHARE = 0.08


@dataclass(frozen=True)
class SourceFile:
    """One kept file: `path` relative to the corpus root, with forward slashes."""

    path: str
    sha256: str
    size: int
    split: str


@dataclass(frozen=True)
class Corpus:
    """A listed set of text files, and the hash that says whether it is still the same set.

    Attributes:
      name: the tfds builder that prepares it.
      label: a short directory-safe word for people, such as "cpython-3.11.7".
      root: the folder that the paths of `files` are relative to.
      files: the kept files, sorted by path.
      dropped: reason -> number of files left out ("duplicate", "undecodable", "empty", ...).
    """

    name: str
    label: str
    root: Path
    files: tuple[SourceFile, ...]
    dropped: Mapping[str, int]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every kept path, content hash and split; independent of where root is."""
        rows = [[file.path, file.sha256, file.split] for file in self.files]
        return hashlib.sha256(json.dumps([self.name, rows]).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Directory name of this very content: label and the head of the fingerprint."""
        return f"{self.label}-{self.fingerprint[:12]}"

    def split(self, name: str) -> tuple[SourceFile, ...]:
        return tuple(file for file in self.files if file.split == name)

    def read(self, file: SourceFile) -> bytes:
        """The bytes of `file`.

        Raises:
          UserError: the file is gone or is no longer what was listed.
        """
        location = self.root / file.path
        data = read_bytes(location)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise UserError(f"{location} changed while the corpus was being prepared; run again")
        return data


def read_bytes(location: Path) -> bytes:
    """The bytes of a file; an unreadable one is a `UserError` that names it."""
    try:
        return location.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {location}: {error.strerror or error}") from None


def walk(root: Path, skip_folder: Callable[[str], bool]) -> Iterator[str]:
    """Yields the relative forward-slash path of every file under `root`, sorted.

    Unlike with `Path.glob`, a folder that can't be listed is an error and not a silent gap.
    Linked folders are not entered; broken links, pipes and sockets are passed over.

    Raises:
      UserError: `root` or a folder under it is missing, no folder, or unreadable.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read folder {error.filename}: {error.strerror or error}")

    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; expected a folder of text files")
    paths = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not skip_folder(name)]
        relative = Path(folder).relative_to(root)
        paths += [(relative / name).as_posix() for name in names]
    for path in sorted(paths):
        if (root / path).is_file():
            yield path


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a relative path fits one of the glob patterns.

    A pattern without "/" is matched against the file name at any depth; one with "/" against the
    whole relative path, where "*" also crosses "/" and a leading "**/" also means "at the top".
    """
    name = path.rsplit("/", 1)[-1]
    for pattern in patterns:
        if fnmatch.fnmatchcase(path if "/" in pattern else name, pattern):
            return True
        if pattern.startswith("**/") and fnmatch.fnmatchcase(path, pattern[3:]):
            return True
    return False


def list_corpus(
    name: str,
    label: str,
    root: Path,
    paths: Sequence[str],
    *,
    what: str,
    skip_content: Callable[[bytes], str | None] = lambda data: None,
    dropped: Mapping[str, int] | None = None,
) -> Corpus:
    """Reads `paths` once and decides what is kept and where it goes.

    Left out and counted: files of white space only ("empty"), files that are not UTF-8
    ("undecodable"), files for which `skip_content` gives a reason, and all but the first of
    equal files ("duplicate"). The split depends on the content alone, so that a renamed file
    stays where it was. Both splits always get a file.

    Raises:
      UserError: fewer than two different files are left. `what` describes the source in it.
    """
    counts = Counter(dropped or {})
    kept: dict[str, tuple[str, int]] = {}
    for path in paths:
        data = read_bytes(root / path)
        digest = hashlib.sha256(data).hexdigest()
        if not data.strip():
            counts["empty"] += 1
        elif not _is_utf8(data):
            counts["undecodable"] += 1
        elif reason := skip_content(data):
            counts[reason] += 1
        elif digest in kept:
            counts["duplicate"] += 1
        else:
            kept[digest] = (path, len(data))
    if len(kept) < 2:
        raise UserError(
            f"{what} holds {len(kept)} usable text files ({_reasons(counts)}); expected at least "
            "2 different ones, to train on one and validate on another"
        )
    validation = {digest for digest in kept if fraction(digest) < VALIDATION_SHARE}
    if not validation:
        validation = {min(kept)}
    elif len(validation) == len(kept):
        validation.discard(max(kept))
    files = [
        SourceFile(path, digest, size, "validation" if digest in validation else "train")
        for digest, (path, size) in kept.items()
    ]
    files.sort(key=lambda file: file.path)
    return Corpus(name, label, root, tuple(files), dict(sorted(counts.items())))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def fraction(digest: str) -> float:
    """A hash, in hexadecimal digits, as a number from 0 to 1."""
    return int(digest[:8], 16) / 2**32


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "nothing left out"
