"""What the kernels of `pallas_gpu.py` share: their shape, and the tensor cores of a warpgroup.

Where a kernel is interpreted, its products are plain ones: the interpreter of Pallas knows neither
an operand in registers nor a product that is added to one that exists, nor a copy that adds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.attention.tile_mask import Program

COMPUTE = 2  # warpgroups that compute; one more fetches
ROWS = 64  # of an accumulator: what a warpgroup multiplies at once
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
# Barriers stand in the kernels where they are needed: around what is written to shared memory.
PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
# Of jax 0.11, where the second argument may be left out.
load: Callable[..., jax.Array] = plgpu.load
_Ref = Any


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      query_length, key_length: whole tiles.
      heads, group: of queries; and how many of them read one head of keys.
      width: of a head, a multiple of 64.
      queries, keys: of a tile.
      stages: tiles that are fetched ahead.
      dtype: of queries, keys, values and their gradients.
    """

    batch: int
    query_length: int
    key_length: int
    heads: int
    group: int
    width: int
    queries: int
    keys: int
    stages: int
    dtype: Any
    program: Program


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as the tensor cores and bulk copies read it without conflicts."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def drain(steps: jax.Array, stages: int, *free: _Ref) -> None:
    """Waits until what `steps` tiles were fetched for is done, as if more were to be fetched."""

    def wait(i, nothing):
        @pl.when(i >= stages)
        def _():
            for barriers in free:
                plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(stages))])

    lax.fori_loop(steps, steps + stages, wait, None)


class _Plain:
    """An accumulator of an interpreted kernel."""

    def __init__(self, value: jax.Array):
        self.value = value


class TensorCore:
    """Products of one warpgroup. They run on their own until they are waited for, in order."""

    def __init__(self, interpreted: bool):
        self._interpreted = interpreted

    def zeros(self, body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
        """`body` of accumulators that are zero; gives what it gives."""
        if self._interpreted:
            return body(*(_Plain(jnp.zeros(shape, jnp.float32)) for shape in shapes))
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

    def into(self, body: Callable[..., None], *values: jax.Array) -> tuple[jax.Array, ...]:
        """`body` of accumulators that start from values; gives what they end at, once all is
        done."""
        if self._interpreted:
            held = [_Plain(value) for value in values]
            body(*held)
            return tuple(x.value for x in held)

        def run(refs):
            body(*refs)

        return pl.run_state(run)(tuple(plgpu.ACC.init(value) for value in values))

    def multiply(
        self, acc: Any, a: Any, b: _Ref, *, transpose_a: bool = False, transpose_b: bool = False
    ) -> None:
        """Adds `a b` to an accumulator; `a` is in registers or, like `b`, in shared memory."""
        if not self._interpreted:
            turn = lambda x, yes: x.transpose((1, 0)) if yes else x
            plgpu.wgmma(acc, turn(a, transpose_a), turn(b, transpose_b))
            return
        a = a if isinstance(a, jax.Array) else a[...]
        b = b[...]
        product = jnp.dot(
            a.T if transpose_a else a,
            b.T if transpose_b else b,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )
        acc.value = acc.value + product

    def read(self, acc: Any, running: int = 0) -> jax.Array:
        """An accumulator, once no more than the last `running` products run."""
        if self._interpreted:
            return acc.value
        return plgpu.wgmma_accumulator_load(acc, wait_n=running)

    def add_to(self, source: _Ref, target: _Ref) -> None:
        """Starts adding float32 of shared memory to global memory, where others add too."""
        if self._interpreted:
            target[...] = target[...] + source[...]
        else:
            plgpu.copy_smem_to_gmem(source, target, reduction_op="add")
