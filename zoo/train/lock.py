"""One process at a time trains in a folder."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

from hackle.zoo.errors import UserError

FILE_NAME = ".lock"
_log = logging.getLogger("hackle")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Inside, no other process gets here with the same folder; of several processes that are one
    run, the first holds the lock for all.

    The file stays. The lock does not: the system frees it when the process ends, however it ends.

    Raises:
      UserError: another process is inside.
    """
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                file = held.enter_context(open(out / FILE_NAME, "a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"out={str(out)!r}: another process trains there; wait for its end, or choose "
                    "another folder"
                ) from None
            except OSError as error:  # not every file system has locks
                _log.warning(
                    "%s cannot be locked (%s): only one process may train there", out, error
                )
        yield
