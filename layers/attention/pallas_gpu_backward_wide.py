"""The backward kernel of `pallas_gpu.py` for wide heads: a warpgroup for dk, one for dv and dq.

At width 256 the sums of dk and of dv fill the registers of a warpgroup each, so that a tile has 64
keys and both warpgroups work on the same ones. Equations and order are those of
`pallas_gpu_backward.py`. Each makes its own transposed scores, six products in all instead of five;
ds^T goes from the first to the second through shared memory. There dq is made and added to global
memory 64 columns at a time, by bulk copies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.attention import tile_mask
from hackle.layers.attention.pallas_gpu_backward import every_head, fetch_queries
from hackle.layers.attention.pallas_gpu_forward import LOG2E
from hackle.layers.attention.pallas_gpu_tensor_core import (
    COLUMN,
    COMPUTE,
    PARAMS,
    ROW,
    ROWS,
    Shape,
    TensorCore,
    filled,
    load,
    swizzled,
)

_CHUNK = 64  # columns of dq


def backward(shape: Shape, scale: float, *, interpret: Any = None):
    """As `pallas_gpu_backward.backward`; tiles are of 64 queries and 64 keys."""
    core = TensorCore(interpret is not None)
    program, stages, width, queries = shape.program, shape.stages, shape.width, shape.queries
    tiles = shape.key_length // ROWS
    factor = scale * LOG2E

    def body(*refs):
        memory = (
            swizzled((ROWS, width), shape.dtype),  # keys
            swizzled((ROWS, width), shape.dtype),  # values
            swizzled((stages, queries, width), shape.dtype),  # queries
            swizzled((stages, queries, width), shape.dtype),  # dout
            swizzled((ROWS, queries), shape.dtype),  # ds^T
            swizzled((queries, _CHUNK), jnp.float32),  # dq
            plgpu.SMEM((stages, queries), jnp.float32),  # shift
            plgpu.SMEM((stages, queries), jnp.float32),  # drop
            plgpu.SMEM((stages, program.integers, queries), jnp.int32),
        )
        pair = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
        barriers = (
            plgpu.Barrier(num_arrivals=2),  # keys and values
            pair,  # queries and shift
            pair,  # dout and drop
            plgpu.Barrier(num_barriers=stages),  # integers
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),  # queries read
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),  # dout read
            plgpu.Barrier(),  # ds^T made
            plgpu.Barrier(),  # ds^T read
            plgpu.Barrier(num_arrivals=COMPUTE),  # keys and values read
        )
        pl.run_scoped(
            lambda memory, barriers: run(refs, memory, barriers),
            memory,
            barriers,
            collective_axes="warpgroup",
        )

    def run(refs, memory, barriers):
        (
            query_ref, key_ref, value_ref, dout_ref, shift_ref, drop_ref, order_ref, counts_ref,
            query_ints, key_ints, dquery_ref, dkey_ref, dvalue_ref,
        ) = refs  # fmt: skip
        (
            key_tile, value_tile, query_tiles, dout_tiles, ds_tile, dquery_tile,
            shift_tiles, drop_tiles, ints_tiles,
        ) = memory  # fmt: skip
        (
            fixed_here, query_here, dout_here, ints_here, query_free, dout_free,
            ds_here, ds_free, fixed_free,
        ) = barriers  # fmt: skip
        key_head, batch, entry = (lax.axis_index(name) for name in ("head", "batch", "entry"))
        me = lax.axis_index("warpgroup")
        mask_row = batch if order_ref.shape[0] > 1 else 0
        seen, visited, tile = (counts_ref[mask_row, entry, i] for i in range(3))
        rows = pl.ds(tile * ROWS, ROWS)
        each = functools.partial(every_head, shape, key_head)
        slot_of = lambda step: lax.rem(step, jnp.int32(stages))

        @pl.when(me == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(key_ref.at[batch, rows, key_head], key_tile, fixed_here)
            plgpu.copy_gmem_to_smem(value_ref.at[batch, rows, key_head], value_tile, fixed_here)
            fetch_queries(
                shape,
                (batch, key_head, mask_row, entry, seen, visited),
                (query_ref, dout_ref, shift_ref, drop_ref, order_ref, query_ints),
                (query_tiles, dout_tiles, shift_tiles, drop_tiles, ints_tiles),
                (query_here, dout_here, ints_here, query_free, dout_free),
            )

        def probabilities(scores, slot, key_integers):
            """`p^T`, from an accumulator of scores that nothing else runs behind but one."""
            shift = load(shift_tiles.at[slot], layout=COLUMN)
            p = jnp.exp2((scores + lax.broadcast_in_dim(shift, scores.shape, [1])) * factor)
            if key_integers is None:
                return p
            plgpu.barrier_wait(ints_here.at[slot])
            high = [lax.broadcast_in_dim(x, p.shape, [0]) for x in key_integers]
            wide = [
                lax.broadcast_in_dim(load(ints_tiles.at[slot, a], layout=COLUMN), p.shape, [1])
                for a in range(program.integers)
            ]
            return jnp.where(tile_mask.visible(program, wide, high), p, 0.0)

        def total(step):
            """The sum over all steps, and what is left of a tile: `step` adds to one matrix."""

            def mixed(head, i, count, carry):
                integers = [
                    load(key_ints.at[mask_row, a, rows], layout=ROW, optimized=False)
                    for a in range(program.integers)
                ]
                return step(head, i, count, carry, integers)

            nothing = filled((ROWS, width), 0.0, plgpu.Layout.WGMMA)
            found = each(step, nothing, 0, seen, 0)
            return each(mixed, found, seen, visited, shape.group * seen)

        def write(found, tile_ref, target):
            plgpu.barrier_arrive(fixed_free)  # no one reads keys and values any more
            plgpu.barrier_wait(fixed_free)
            tile_ref[...] = found.astype(shape.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile_ref, target.at[batch, rows, key_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == 0)
        def of_keys():
            plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_wait(fixed_here)

            def step(_, i, count, dk, key_integers=None):
                slot = slot_of(count)
                query, dout = query_tiles.at[slot], dout_tiles.at[slot]

                def gradient(acc):
                    def scores(s_acc, dp_acc):
                        plgpu.barrier_wait(query_here.at[slot])
                        core.multiply(s_acc, key_tile, query, transpose_b=True)
                        plgpu.barrier_wait(dout_here.at[slot])
                        core.multiply(dp_acc, value_tile, dout, transpose_b=True)
                        p = probabilities(core.read(s_acc, running=1), slot, key_integers)
                        drop = load(drop_tiles.at[slot], layout=COLUMN)
                        dp = core.read(dp_acc)
                        return p * (dp + lax.broadcast_in_dim(drop, dp.shape, [1]))

                    ds = core.zeros(scores, (ROWS, queries), (ROWS, queries)).astype(shape.dtype)
                    plgpu.barrier_arrive(dout_free.at[slot])
                    pl.when(count > 0)(lambda: plgpu.barrier_wait(ds_free))
                    ds_tile[...] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_here)
                    core.multiply(acc, ds, query)

                (dk,) = core.into(gradient, dk)
                plgpu.barrier_arrive(query_free.at[slot])
                return dk

            dk = total(step)
            pl.when(visited > 0)(lambda: plgpu.barrier_wait(ds_free))
            write(dk * scale, key_tile, dkey_ref)

        @pl.when(me == 1)
        def of_values_and_queries():
            plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_wait(fixed_here)

            def step(head, i, count, dv, key_integers=None):
                slot = slot_of(count)
                query, dout = query_tiles.at[slot], dout_tiles.at[slot]
                here = pl.ds(order_ref[mask_row, entry, i] * queries, queries)

                def gradient(acc):
                    def scores(s_acc):
                        plgpu.barrier_wait(query_here.at[slot])
                        core.multiply(s_acc, key_tile, query, transpose_b=True)
                        return probabilities(core.read(s_acc), slot, key_integers)

                    p = core.zeros(scores, (ROWS, queries)).astype(shape.dtype)
                    plgpu.barrier_arrive(query_free.at[slot])
                    plgpu.barrier_wait(dout_here.at[slot])
                    core.multiply(acc, p, dout)

                (dv,) = core.into(gradient, dv)
                plgpu.barrier_arrive(dout_free.at[slot])
                plgpu.barrier_wait(ds_here)
                for first in range(0, width, _CHUNK):
                    part = pl.ds(first, _CHUNK)

                    def of_queries(acc, part=part):
                        core.multiply(acc, ds_tile, key_tile.at[:, part], transpose_a=True)
                        return core.read(acc)

                    dq = core.zeros(of_queries, (queries, _CHUNK))
                    if first + _CHUNK == width:
                        plgpu.barrier_arrive(ds_free)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dquery_tile[...] = dq
                    plgpu.commit_smem()
                    core.add_to(dquery_tile, dquery_ref.at[batch, here, head, part])
                return dv

            write(total(step), value_tile, dvalue_ref)

    key_heads = shape.heads // shape.group
    out = jax.ShapeDtypeStruct((shape.batch, shape.key_length, key_heads, width), shape.dtype)
    return plgpu.kernel(
        body,
        out_type=(out, out),
        grid=(tiles, shape.batch, key_heads),
        grid_names=("entry", "batch", "head"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        **({} if interpret is None else {"interpret": interpret}),
    )
