"""A row of a benchmark: compiled ahead, caught when it breaks, rounded."""

import contextlib
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class WrongResult(Exception):
    """A result that is not the reference's."""


class Skipped(Exception):
    """A row that cannot run here; the message says why."""


def measured(fill: Callable[[dict[str, Any]], None], rival) -> dict[str, Any]:
    """What `fill` writes into a row, floats to five digits; `failed` and `skipped` say why it came
    no further.

    Args:
      rival: whose `free()` gives back the memory that the row left, or None.
    """
    row: dict[str, Any] = {"failed": "", "skipped": ""}
    try:
        fill(row)
    except Skipped as error:
        row["skipped"] = " ".join(str(error).split())
    # A row that breaks, in whatever way, is reported and must not take the others with it.
    except Exception as error:
        row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    gc.collect()
    if rival is not None:
        rival.free()
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def compile_each(jobs: list[tuple[Any, str]], lowered: Callable[..., Any]) -> dict[Any, Any]:
    """What `lowered(*job)` compiles to, by job, many at a time.

    What cannot be compiled is left out: its row does it again, and reports why not.
    """
    programs = {}
    with ThreadPoolExecutor() as pool:
        started = {}
        for job in jobs:
            with contextlib.suppress(Exception):
                # Lowered here: to lower kernels in several threads at once has crashed.
                started[job] = pool.submit(lowered(*job).compile)
        for job, program in started.items():
            with contextlib.suppress(Exception):
                programs[job] = program.result()
    return programs
