"""Paths that people give."""

import re
from pathlib import Path

from hackle.zoo.errors import UserError

# A Path has one slash left of two. A single letter may be a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | Path, name: str) -> Path:
    """`path` with `~` expanded.

    Args:
      name: of what the path is given as, for the error.

    Raises:
      UserError: it is a URL, such as a bucket's: files are read and written as local ones.
    """
    if _URL.match(str(path)):
        raise UserError(
            f"{name}={str(path)!r} is a URL; expected a path, which a bucket has once it is "
            "mounted (Cloud Storage: gcsfuse)"
        )
    return Path(path).expanduser()
