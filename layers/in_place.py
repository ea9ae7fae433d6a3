"""Whether what a GPU kernel writes in place is safe: from jaxlib 0.11 on it may be lost.

XLA's dynamic-slice fusion, on by default there, moves a kernel next to the slice of a stacked array
that it reads or writes, as in a `lax.scan` over layers. A kernel that updates an operand in place
is moved as if it wrote all of its result: what it leaves as it was is then memory that nobody
wrote (`tests/layers/test_in_place.py` shows it). Later XLA leaves such kernels alone; which jaxlib
has that is not known yet.
"""

import os

import jax

FIRST = (0, 11)  # of the versions of jax that are affected
FLAG = "--xla_gpu_enable_dynamic_slice_fusion=false"


def unsafe() -> str | None:
    """Why in-place results may be lost on a GPU here, and what helps; None if they are safe.

    It reads the environment. XLA does so once, when JAX first looks for devices: a flag that is
    set later is seen here, and has no effect.
    """
    name, _ = FLAG.split("=")
    given = [f for f in os.environ.get("XLA_FLAGS", "").split() if f.split("=")[0] == name]
    off = given and given[-1].partition("=")[2].lower() in ("false", "0")  # the last one counts
    if jax.__version_info__ < FIRST or off:
        return None
    return (
        f"jaxlib {jax.lib.__version__} may lose what kernels write in place; "
        f"set XLA_FLAGS={FLAG} before JAX starts"
    )
