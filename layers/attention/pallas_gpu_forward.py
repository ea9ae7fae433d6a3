"""The forward kernel of `pallas_gpu.py`: one program is a tile of queries of one head.

Two warpgroups compute, each for 64 of the queries, and one fetches tiles of keys and values into
shared memory ahead of them (FlashAttention-3, arXiv 2407.08608, section 3.1). While one warpgroup
makes probabilities, the other one has the tensor cores to itself: they take turns at a barrier.
Softmax is online, in powers of two: after each tile of keys, with `c = scale * log2(e)`,

  m' = max(m, c * max_j s_j),  p_j = 2^(c s_j - m'),  l' = 2^(m - m') l + sum_j p_j,
  o' = 2^(m - m') o + sum_j p_j v_j.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.attention import tile_mask
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

LOG2E = math.log2(math.e)
# Of the running maximum before the first key; finite, so that no difference is undefined.
_LOWEST = -1e30
_Ref = Any


def forward(shape: Shape, scale: float, *, interpret: Any = None):
    """The kernel for a shape; `scale` is not negative.

    Returns:
      A function of `(query [B,L,H,E], key [B,S,K,E], value [B,S,K,E], order, counts, query
      integers, key integers)`, the last four as in `tile_mask`, the plan `longest_first`. It gives
      the output, as the query, and the log-sum-exp, `[B,H,L]` float32. Lengths are whole tiles.
    """
    core = TensorCore(interpret is not None)
    program, stages, keys, width = shape.program, shape.stages, shape.keys, shape.width
    tiles = shape.query_length // shape.queries
    factor = scale * LOG2E

    def body(
        query_ref, key_ref, value_ref, order_ref, counts_ref, query_ints, key_ints, out_ref, lse_ref
    ):
        def with_memory(memory, barriers):
            run(
                (query_ref, key_ref, value_ref, order_ref, counts_ref, query_ints, key_ints),
                (out_ref, lse_ref),
                memory,
                barriers,
            )

        memory = (
            swizzled((COMPUTE, ROWS, width), shape.dtype),
            swizzled((stages, keys, width), shape.dtype),
            swizzled((stages, keys, width), shape.dtype),
            plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            plgpu.SMEM((stages, program.integers, keys), jnp.int32),
        )
        arrived = plgpu.Barrier(num_barriers=stages)
        consumed = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages)
        barriers = (
            plgpu.Barrier(num_barriers=COMPUTE),
            arrived,
            arrived,
            arrived,
            consumed,
            consumed,
            plgpu.Barrier(num_arrivals=COMPUTE),
        )
        pl.run_scoped(with_memory, memory, barriers, collective_axes="warpgroup")

    def run(inputs, outputs, memory, barriers):
        query_ref, key_ref, value_ref, order_ref, counts_ref, query_ints, key_ints = inputs
        out_ref, lse_ref = outputs
        query_tile, key_tiles, value_tiles, lse_tile, ints_tiles = memory
        query_here, key_here, value_here, ints_here, key_free, value_free, turn = barriers
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        entry = lax.axis_index("entry")
        me = lax.axis_index("warpgroup")
        mask_row = batch if order_ref.shape[0] > 1 else 0
        seen, visited, tile = (counts_ref[mask_row, entry, i] for i in range(3))
        slot_of = lambda step: lax.rem(step, jnp.int32(stages))

        @pl.when(me == COMPUTE)
        def fetch():
            plgpu.set_max_registers(40, action="decrease")
            key_head = lax.div(head, jnp.int32(shape.group))

            def step(i, other):
                slot = slot_of(i)
                rows = pl.ds(other * keys, keys)
                later = order_ref[mask_row, entry, jnp.minimum(i + 1, order_ref.shape[2] - 1)]
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(key_free.at[slot]))
                here = key_here.at[slot]
                plgpu.copy_gmem_to_smem(key_ref.at[batch, rows, key_head], key_tiles.at[slot], here)

                @pl.when(i >= seen)
                def _():
                    source = key_ints.at[mask_row, :, rows]
                    plgpu.copy_gmem_to_smem(source, ints_tiles.at[slot], ints_here.at[slot])

                pl.when(i >= stages)(lambda: plgpu.barrier_wait(value_free.at[slot]))
                here = value_here.at[slot]
                plgpu.copy_gmem_to_smem(
                    value_ref.at[batch, rows, key_head], value_tiles.at[slot], here
                )
                return later

            lax.fori_loop(0, visited, step, order_ref[mask_row, entry, 0])
            drain(visited, stages, key_free, value_free)

        @pl.when(me < COMPUTE)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds(tile * shape.queries + me * ROWS, ROWS)
            my_query, my_lse = query_tile.at[me], lse_tile.at[me]
            plgpu.copy_gmem_to_smem(query_ref.at[batch, rows, head], my_query, query_here.at[me])
            plgpu.barrier_wait(query_here.at[me])
            pl.when(visited > 0)(lambda: plgpu.barrier_wait(key_here.at[0]))

            def take_turn():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            # The second warpgroup is half a step behind.
            pl.when(me == 1)(take_turn)

            def step(i, carry, query_integers=None):
                out, top, total = carry
                slot = slot_of(i)

                def scores(acc):
                    core.multiply(acc, my_query, key_tiles.at[slot], transpose_b=True)
                    take_turn()
                    return core.read(acc)

                s = core.zeros(scores, (ROWS, keys))
                if query_integers is not None:
                    plgpu.barrier_wait(ints_here.at[slot])
                    wide = [lax.broadcast_in_dim(x, s.shape, [0]) for x in query_integers]
                    high = [
                        lax.broadcast_in_dim(
                            load(ints_tiles.at[slot, a], layout=COLUMN), s.shape, [1]
                        )
                        for a in range(program.integers)
                    ]
                    s = jnp.where(tile_mask.visible(program, wide, high), s, -jnp.inf)
                plgpu.barrier_arrive(key_free.at[slot])
                new = jnp.maximum(top, jnp.max(s, axis=1) * factor)
                shrink = jnp.exp2(top - new)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(new, s.shape, [0]))
                out = out * lax.broadcast_in_dim(shrink, out.shape, [0])
                total = total * shrink
                narrow = p.astype(shape.dtype)
                if width <= 128:
                    total = total + jnp.sum(p, axis=1)
                    out, total, new, narrow = lax.optimization_barrier((out, total, new, narrow))
                plgpu.barrier_arrive(turn)  # done with the probabilities
                plgpu.barrier_wait(value_here.at[slot])
                plgpu.barrier_wait(turn)  # the tensor cores are free
                if width > 128:
                    total = total + jnp.sum(p, axis=1)

                def values(acc):
                    core.multiply(acc, narrow, value_tiles.at[slot])
                    following = i + 1
                    pl.when(following < visited)(
                        lambda: plgpu.barrier_wait(key_here.at[slot_of(following)])
                    )

                (out,) = core.into(values, out)
                plgpu.barrier_arrive(value_free.at[slot])
                return out, new, total

            carry = (
                filled((ROWS, width), 0.0, plgpu.Layout.WGMMA),
                filled((ROWS,), _LOWEST, ROW),
                filled((ROWS,), 0.0, ROW),
            )
            carry = lax.fori_loop(0, seen, step, carry)

            def mixed(i, carry):
                integers = [
                    load(query_ints.at[mask_row, a, rows], layout=ROW, optimized=False)
                    for a in range(program.integers)
                ]
                return step(i, carry, integers)

            out, top, total = lax.fori_loop(seen, visited, mixed, carry)
            pl.when(me == 0)(take_turn)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            out = out * lax.broadcast_in_dim(1.0 / total, out.shape, [0])
            my_query[...] = out.astype(shape.dtype)
            my_lse[...] = jnp.where(some, (top + jnp.log(total) * LOG2E) / LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(my_query, out_ref.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(my_lse, lse_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

    size = (shape.batch, shape.query_length, shape.heads, width)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(size, shape.dtype),
            jax.ShapeDtypeStruct((size[0], size[2], size[1]), jnp.float32),
        ),
        grid=(tiles, shape.batch, shape.heads),
        grid_names=("entry", "batch", "head"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        **({} if interpret is None else {"interpret": interpret}),
    )
