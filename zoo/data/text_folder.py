"""Any local folder of UTF-8 text files as a corpus."""

import re
from collections.abc import Sequence
from pathlib import Path

from hackle.zoo.data.builder import TextFiles
from hackle.zoo.data.files import Corpus, list_corpus, matches, walk
from hackle.zoo.errors import UserError

PATTERNS = ("*.py", "*.txt", "*.md")


def list_text_folder(folder: str | Path, patterns: Sequence[str] = PATTERNS) -> Corpus:
    """Lists the files under `folder` that fit one of `patterns` (`hackle.zoo.data.files.matches`).

    Folders whose name starts with a dot, and `__pycache__`, are not entered.

    Raises:
      UserError: the folder is missing, unreadable, or holds fewer than two usable files.
    """
    root = Path(folder)
    if not root.exists():
        raise UserError(f"data folder {root} does not exist; expected a folder of text files")
    skip = lambda name: name.startswith(".") or name == "__pycache__"
    paths = [path for path in walk(root, skip) if matches(path, patterns)]
    wanted = ", ".join(patterns)
    if not paths:
        raise UserError(f"data folder {root} holds no file that matches {wanted}")
    label = re.sub(r"[^a-z0-9]+", "_", root.resolve().name.lower()).strip("_") or "folder"
    what = f"data folder {root} (patterns {wanted})"
    return list_corpus("text_folder", label, root, paths, what=what)


class TextFolder(TextFiles):
    """tfds builder "text_folder": one example per file, features `text` and `path`."""

    DESCRIPTION = "Text files of one local folder."
