"""Real Python code that is always there: the running interpreter's standard library source."""

import platform
import re
import sys
import sysconfig
from collections import Counter
from pathlib import Path

from hackle.zoo.data.builder import TextFiles
from hackle.zoo.data.files import Corpus, list_corpus, walk
from hackle.zoo.errors import UserError

# What is left out, and why:
# - tests, and packages that are not the standard library;
SKIP_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
# - tables and boilerplate around them: character maps, HTML entities, help texts;
SKIP_PATHS = ("encodings/", "pydoc_data/", "html/entities.py")
# - anything whose head says that a program wrote it (token.py, keyword.py, _sysconfigdata...).
GENERATED = re.compile(
    rb"(?i)auto-?generated|automatically generated|file is generated|configuration generated"
)
HEAD = 512


def list_python_source(root: Path | None = None) -> Corpus:
    """Lists the standard library source of this interpreter (or of the one with stdlib `root`).

    Raises:
      UserError: the interpreter has no readable source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    if not root.is_dir():
        raise UserError(f"this Python keeps no standard library source at {root}")
    dropped: Counter[str] = Counter()
    paths = []
    for path in walk(root, SKIP_FOLDERS.__contains__):
        if not path.endswith(".py"):
            continue
        if path.startswith(SKIP_PATHS):
            dropped["table"] += 1
        else:
            paths.append(path)
    label = f"{sys.implementation.name}-{platform.python_version()}"
    return list_corpus(
        "python_source",
        label,
        root,
        paths,
        what=f"the standard library at {root}",
        skip_content=lambda data: "generated" if GENERATED.search(data[:HEAD]) else None,
        dropped=dropped,
    )


class PythonSource(TextFiles):
    """tfds builder "python_source": one example per file, features `text` and `path`."""

    DESCRIPTION = (
        "Source code of the running interpreter's standard library, without tests, tables and "
        "generated files."
    )
    LICENSE = "PSF-2.0"
