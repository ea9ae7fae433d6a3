"""The backward kernel of `pallas_gpu.py`: one program is a tile of keys of one key head.

It goes through the tiles of queries that see its keys, each for every query head of its group, so
that gradients of keys and values add up in registers. It starts with the last tiles, which most
keys see: programs that run at the same time then read the same tiles, from the cache.

Known beforehand for each query are `shift = -lse / scale` and `drop = dlse - dout . out`, where
`dout . out = sum_j p_j dp_j` (FlashAttention-2, arXiv 2307.08691, algorithm 2). With
`c = scale * log2(e)`:

  p = 2^(c (s + shift)),  dv = p^T dout,  dp = dout v^T,  ds = p (dp + drop),
  dk = scale ds^T q,  dq = scale ds k.

Scores are made transposed, keys by queries: p^T and ds^T are then where the tensor cores take their
left operand from, registers. Each of two warpgroups has 64 of the keys; ds^T goes through shared
memory as well, since dq sums over the keys of both. Each makes one half of a tile of dq, and adds
it to global memory by bulk copies, in float32: many programs add to a tile, in any order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.attention import tile_mask
from hackle.layers.attention.pallas_gpu_forward import LOG2E
from hackle.layers.attention.pallas_gpu_tensor_core import (
    COLUMN,
    COMPUTE,
    PARAMS,
    ROW,
    ROWS,
    Shape,
    TensorCore,
    drain,
    filled,
    load,
    swizzled,
)


def backward(shape: Shape, scale: float, *, interpret: Any = None):
    """The kernel for a shape; `scale` is positive.

    Returns:
      A function of `(query, key, value, dout, shift [B,H,L], drop [B,H,L], order, counts, query
      integers, key integers, dquery Ref)`: float32, the shift -inf where nothing is seen; a
      plan for tiles of keys, `longest_first`; and float32 `[B,L,H,E]`, to which `dq / scale` is
      added. It gives dk and dv, as the key.
    """
    core = TensorCore(interpret is not None)
    program, stages, width = shape.program, shape.stages, shape.width
    queries, keys = shape.queries, COMPUTE * ROWS
    tiles = shape.key_length // keys
    factor = scale * LOG2E
    by_queries = queries > ROWS  # which half of dq a warpgroup makes: of queries or of width
    half = ROWS if by_queries else width // COMPUTE

    def body(*refs):
        memory = (
            swizzled((COMPUTE, ROWS, width), shape.dtype),  # keys
            swizzled((COMPUTE, ROWS, width), shape.dtype),  # values
            swizzled((stages, queries, width), shape.dtype),  # queries
            swizzled((stages, queries, width), shape.dtype),  # dout
            swizzled((2, COMPUTE, ROWS, queries), shape.dtype),  # ds^T
            swizzled((COMPUTE, ROWS, half if not by_queries else width), jnp.float32),  # dq
            plgpu.SMEM((stages, queries), jnp.float32),  # shift
            plgpu.SMEM((stages, queries), jnp.float32),  # drop
            plgpu.SMEM((stages, program.integers, queries), jnp.int32),
        )
        pair = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
        barriers = (
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),  # keys and values
            pair,  # queries and shift
            pair,  # dout and drop
            plgpu.Barrier(num_barriers=stages),  # integers
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),  # queries read
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),  # dout read
            plgpu.Barrier(num_arrivals=COMPUTE),  # ds^T of both
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
            key_tile, value_tile, query_tiles, dout_tiles, ds_tiles, dquery_tile,
            shift_tiles, drop_tiles, ints_tiles,
        ) = memory  # fmt: skip
        fixed_here, query_here, dout_here, ints_here, query_free, dout_free, ds_here = barriers
        key_head, batch, entry = (lax.axis_index(name) for name in ("head", "batch", "entry"))
        me = lax.axis_index("warpgroup")
        mask_row = batch if order_ref.shape[0] > 1 else 0
        seen, visited, tile = (counts_ref[mask_row, entry, i] for i in range(3))
        slot_of = lambda step: lax.rem(step, jnp.int32(stages))

        each = functools.partial(every_head, shape, key_head)

        @pl.when(me == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")
            for w in range(COMPUTE):
                rows = pl.ds(tile * keys + w * ROWS, ROWS)
                here = fixed_here.at[w]
                plgpu.copy_gmem_to_smem(key_ref.at[batch, rows, key_head], key_tile.at[w], here)
                plgpu.copy_gmem_to_smem(value_ref.at[batch, rows, key_head], value_tile.at[w], here)

            fetch_queries(
                shape,
                (batch, key_head, mask_row, entry, seen, visited),
                (query_ref, dout_ref, shift_ref, drop_ref, order_ref, query_ints),
                (query_tiles, dout_tiles, shift_tiles, drop_tiles, ints_tiles),
                (query_here, dout_here, ints_here, query_free, dout_free),
            )

        @pl.when(me < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            rows = pl.ds(tile * keys + me * ROWS, ROWS)
            my_key, my_value, my_dquery = key_tile.at[me], value_tile.at[me], dquery_tile.at[me]
            plgpu.barrier_wait(fixed_here.at[me])

            def step(head, i, count, carry, key_integers=None):
                slot = slot_of(count)
                query, dout = query_tiles.at[slot], dout_tiles.at[slot]
                ds_buffer = ds_tiles.at[lax.rem(count, jnp.int32(2))]
                here = order_ref[mask_row, entry, i] * queries

                def gradients(dk, dv):
                    def scores(s_acc, dp_acc):
                        plgpu.barrier_wait(query_here.at[slot])
                        core.multiply(s_acc, my_key, query, transpose_b=True)
                        plgpu.barrier_wait(dout_here.at[slot])
                        core.multiply(dp_acc, my_value, dout, transpose_b=True)
                        s = core.read(s_acc, running=1)
                        shift = load(shift_tiles.at[slot], layout=COLUMN)  # late: registers are few
                        p = jnp.exp2((s + lax.broadcast_in_dim(shift, s.shape, [1])) * factor)
                        if key_integers is not None:
                            plgpu.barrier_wait(ints_here.at[slot])
                            high = [lax.broadcast_in_dim(x, s.shape, [0]) for x in key_integers]
                            wide = [
                                lax.broadcast_in_dim(
                                    load(ints_tiles.at[slot, a], layout=COLUMN),
                                    s.shape,
                                    [1],
                                )
                                for a in range(program.integers)
                            ]
                            p = jnp.where(tile_mask.visible(program, wide, high), p, 0.0)
                        dp = core.read(dp_acc)
                        drop = load(drop_tiles.at[slot], layout=COLUMN)
                        ds = p * (dp + lax.broadcast_in_dim(drop, s.shape, [1]))
                        # Both narrow before a product holds on to p: more would not fit into the
                        # registers.
                        narrow = p.astype(shape.dtype), ds.astype(shape.dtype)
                        p, ds = lax.optimization_barrier(narrow)
                        core.multiply(dv, p, dout)
                        return ds

                    ds = core.zeros(scores, (ROWS, queries), (ROWS, queries))
                    ds_buffer.at[me][...] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_here)
                    plgpu.barrier_wait(ds_here)

                    def of_query(acc):
                        part = pl.ds(me * ROWS, ROWS)
                        for w in range(COMPUTE):
                            a, b = ds_buffer.at[w], key_tile.at[w]
                            if by_queries:
                                a = a.at[:, part]
                            else:
                                b = b.at[:, part]
                            core.multiply(acc, a, b, transpose_a=True)
                        core.multiply(dk, ds, query)
                        dq = core.read(acc, running=1)
                        plgpu.barrier_arrive(dout_free.at[slot])
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        my_dquery[...] = dq
                        plgpu.commit_smem()
                        if by_queries:
                            target = dquery_ref.at[batch, pl.ds(here + me * ROWS, ROWS), head]
                        else:
                            target = dquery_ref.at[batch, pl.ds(here, ROWS), head, part]
                        core.add_to(my_dquery, target)

                    core.zeros(of_query, (ROWS, width if by_queries else half))

                dk, dv = core.into(gradients, *carry)
                plgpu.barrier_arrive(query_free.at[slot])
                return dk, dv

            nothing = filled((ROWS, width), 0.0, plgpu.Layout.WGMMA)
            carry = each(step, (nothing, nothing), 0, seen, 0)

            def mixed(head, i, count, carry):
                integers = [
                    load(key_ints.at[mask_row, a, rows], layout=ROW, optimized=False)
                    for a in range(program.integers)
                ]
                return step(head, i, count, carry, integers)

            dk, dv = each(mixed, carry, seen, visited, shape.group * seen)
            plgpu.barrier_arrive(ds_here)  # no one reads keys any more
            plgpu.barrier_wait(ds_here)
            my_key[...] = (dk * scale).astype(shape.dtype)
            my_value[...] = dv.astype(shape.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(my_key, dkey_ref.at[batch, rows, key_head])
            plgpu.copy_smem_to_gmem(my_value, dvalue_ref.at[batch, rows, key_head])
            plgpu.wait_smem_to_gmem(0)

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


def every_head(shape: Shape, key_head, step, carry, first, last, done):
    """Steps `(head, i, count, carry)` over tiles `first..last`, last first, each of all heads."""

    def one_tile(t, carry):
        i, before = last - 1 - t, done + t * shape.group
        each = lambda g, carry: step(key_head * shape.group + g, i, before + g, carry)
        return lax.fori_loop(0, shape.group, each, carry)

    return lax.fori_loop(0, last - first, one_tile, carry)


def fetch_queries(shape: Shape, place, arrays, tiles, barriers) -> None:
    """What the warpgroup that fetches does for a tile of keys: all queries that see it, in turn.

    Args:
      place: batch, key head, row of the mask and entry of the plan; what its tile visits.
      arrays: in global memory.
      tiles: `shape.stages` of each array in shared memory.
      barriers: of what has arrived, and of what is free again.
    """
    batch, key_head, mask_row, entry, seen, visited = place
    query_ref, dout_ref, shift_ref, drop_ref, order_ref, query_ints = arrays
    query_tiles, dout_tiles, shift_tiles, drop_tiles, ints_tiles = tiles
    query_here, dout_here, ints_here, query_free, dout_free = barriers
    queries, stages = shape.queries, shape.stages
    last_head = (key_head + 1) * shape.group - 1

    def other(i):
        return order_ref[mask_row, entry, jnp.maximum(i, 0)]

    def step(head, i, count, current, mixed=False):
        slot = lax.rem(count, jnp.int32(stages))
        rows = pl.ds(current * queries, queries)
        following = other(jnp.where(head == last_head, i - 1, i))  # arrives while this one waits
        pl.when(count >= stages)(lambda: plgpu.barrier_wait(query_free.at[slot]))
        here = query_here.at[slot]
        plgpu.copy_gmem_to_smem(query_ref.at[batch, rows, head], query_tiles.at[slot], here)
        plgpu.copy_gmem_to_smem(shift_ref.at[batch, head, rows], shift_tiles.at[slot], here)
        if mixed:
            source = query_ints.at[mask_row, :, rows]
            plgpu.copy_gmem_to_smem(source, ints_tiles.at[slot], ints_here.at[slot])
        pl.when(count >= stages)(lambda: plgpu.barrier_wait(dout_free.at[slot]))
        here = dout_here.at[slot]
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, rows, head], dout_tiles.at[slot], here)
        plgpu.copy_gmem_to_smem(drop_ref.at[batch, head, rows], drop_tiles.at[slot], here)
        return following

    def fetch(first, last, done, **kind):
        each = functools.partial(step, **kind)
        every_head(shape, key_head, each, other(last - 1), first, last, done)

    fetch(0, seen, 0)
    fetch(seen, visited, shape.group * seen, mixed=True)
    drain(shape.group * visited, stages, query_free, dout_free)
