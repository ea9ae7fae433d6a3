"""Whether what a GPU kernel writes in place is safe: in jaxlib 0.11 it may be lost.

XLA's dynamic-slice fusion, on by default there, moves a kernel next to the slice of a stacked array
that it reads or writes, as in a `lax.scan` over layers. A kernel that updates an operand in place
is moved as if it wrote all of its result: what it leaves as it was is then memory that nobody
wrote. XLA has since learnt to leave such kernels alone. Outside of this fusion they are right.
"""

import os

import jax

FLAG = "--xla_gpu_enable_dynamic_slice_fusion=false"


def unsafe() -> str | None:
    """Why in-place results may be lost on a GPU here, and what helps; None if they are safe."""
    if jax.__version_info__ < (0, 11) or FLAG in os.environ.get("XLA_FLAGS", "").split():
        return None
    return (
        f"jaxlib {jax.lib.__version__} may lose what kernels write in place; "
        f"set XLA_FLAGS={FLAG} before JAX starts"
    )
