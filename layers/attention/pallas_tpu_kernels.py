"""The kernels of `pallas_tpu.py`. A program owns one tile and streams the tiles that it visits.

Forward and for gradients of queries it owns a tile of queries, of `part` heads that read the same
key head; for gradients of keys and values it owns a tile of keys. Which tiles it visits is a row of
a plan in scalar memory (`tile_mask.plan`); it copies them from HBM itself, the next one while it
computes on one, so that hidden tiles cost nothing. Tiles that are wholly visible come first, in a
loop without masks. With `c = scale * log2(e)`, softmax is online, in powers of two:

  m' = max(m, c max_j s_j),  p_j = 2^(c s_j - m'),  l' = 2^(m - m') l + sum_j p_j,
  o' = 2^(m - m') o + sum_j p_j v_j

and backward (FlashAttention-2, arXiv 2307.08691, algorithm 2), with `p = 2^(c s - lse)` and
`delta_i = dout_i . out_i` known beforehand,

  dp = dout v^T,  ds = p (dp - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T dout.

What belongs to queries lies along sublanes in the first two kernels, and along lanes in the third,
which makes scores transposed: no kernel turns a tile of scores around.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hackle.layers.attention import tile_mask
from hackle.layers.attention.tile_mask import Program

LANES = 128
LOG2E = math.log2(math.e)
# Of the running maximum before the first key; finite, so that no difference is undefined.
_LOWEST = -1e30
_VMEM = 32 * 2**20  # bytes that a program may take
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
)
_Ref = Any


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      query_length, key_length: whole tiles.
      heads, key_heads: of queries, and of keys.
      part: query heads of one program; they share a key head.
      width: of a head, whole lanes.
      queries, keys: of a tile, whole lanes.
      mask_rows: of the integers and plans: 1, or one for each row of the batch.
      dtype: of queries, keys, values and their gradients.
    """

    batch: int
    query_length: int
    key_length: int
    heads: int
    key_heads: int
    part: int
    width: int
    queries: int
    keys: int
    mask_rows: int
    dtype: Any
    program: Program

    @property
    def rows(self) -> int:
        """Of the scores of one program."""
        return self.part * self.queries

    @property
    def parts(self) -> int:
        return self.heads // self.part

    @property
    def query_tiles(self) -> int:
        return self.query_length // self.queries

    @property
    def key_tiles(self) -> int:
        return self.key_length // self.keys

    @property
    def integers(self) -> int:
        """Of a token, and what fills the sublanes."""
        return pl.cdiv(self.program.integers, 8) * 8


def forward(shape: Shape, scale: float, *, interpret: Any = None):
    """The kernel for a shape; `scale` is not negative.

    Returns:
      A function of `(order, counts, query integers, query, key, value, key integers)`, arrays as
      `pallas_tpu.py` lays them out. It gives the output, as the query, and the log-sum-exp,
      `[B,parts,tiles,1,rows]` float32.
    """
    factor = scale * LOG2E

    def body(
        order, counts, query_ints, query, key, value, key_ints, out, lse,
        key_buffer, value_buffer, ints_buffer, semaphores, columns, total, top, length,
    ):  # fmt: skip
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, _LOWEST)
        length[...] = jnp.zeros_like(length)
        _turn(columns, query_ints[...], counts)

        def step(slot, mixed):
            s = factor * _dot(_rows(query), key_buffer[slot], transposed=True)
            if mixed:
                s = s + _of_rows(shape, columns, ints_buffer[slot])
            before = top[:, :1]
            new = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
            p = jnp.exp2(s - new)
            shrink = jnp.exp2(before - new)
            sums = length[:, :1] * shrink + jnp.sum(p, axis=1, keepdims=True)
            length[...] = jnp.broadcast_to(sums, length.shape)
            top[...] = jnp.broadcast_to(new, top.shape)
            total[...] = total[...] * shrink + _dot(p.astype(shape.dtype), value_buffer[slot])

        copies = _copies_of_keys(shape, key, value, key_ints, key_buffer, value_buffer, ints_buffer)
        _stream(order, counts, copies, semaphores, step)
        some = length[...] > 0
        sums = jnp.where(some, length[...], 1.0)
        out[...] = (total[...] / sums[:, :1]).astype(shape.dtype).reshape(out.shape)
        found = jnp.where(some, top[...] / LOG2E + jnp.log(sums), -jnp.inf)
        lse[...] = jnp.transpose(found)[:1]

    return pl.pallas_call(
        body,
        out_shape=[_like_query(shape), _row_per_tile(shape)],
        grid=(shape.batch, shape.parts, shape.query_tiles),
        in_specs=[*_plan_specs(shape, shape.key_tiles), _ints_spec(shape, shape.queries)]
        + [_query_spec(shape)]
        + [pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=[_query_spec(shape), _row_spec(shape)],
        scratch_shapes=[
            *_buffers_of_keys(shape),
            pltpu.VMEM((shape.queries, LANES), jnp.int32),
            pltpu.VMEM((shape.rows, shape.width), jnp.float32),
            pltpu.VMEM((shape.rows, LANES), jnp.float32),
            pltpu.VMEM((shape.rows, LANES), jnp.float32),
        ],
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name="attention_forward",
    )


def backward_queries(shape: Shape, scale: float, *, interpret: Any = None):
    """The kernel of `dq`, a function of `(order, counts, query integers, query, dout, lse, delta,
    key, value, key integers)`: lse in powers of two, inf where nothing is seen.
    """
    factor = scale * LOG2E

    def body(
        order, counts, query_ints, query, dout, lse, delta, key, value, key_ints, dquery,
        key_buffer, value_buffer, ints_buffer, semaphores, columns, total, lse_column, delta_column,
    ):  # fmt: skip
        total[...] = jnp.zeros_like(total)
        _turn(columns, query_ints[...], counts)
        for column, row in ((lse_column, lse), (delta_column, delta)):
            column[...] = jnp.transpose(jnp.broadcast_to(row[...], (LANES, shape.rows)))

        def step(slot, mixed):
            s = factor * _dot(_rows(query), key_buffer[slot], transposed=True)
            if mixed:
                s = s + _of_rows(shape, columns, ints_buffer[slot])
            p = jnp.exp2(s - lse_column[:, :1])
            dp = _dot(_rows(dout), value_buffer[slot], transposed=True)
            ds = p * (dp - delta_column[:, :1])
            total[...] += _dot(ds.astype(shape.dtype), key_buffer[slot])

        copies = _copies_of_keys(shape, key, value, key_ints, key_buffer, value_buffer, ints_buffer)
        _stream(order, counts, copies, semaphores, step)
        dquery[...] = (scale * total[...]).astype(shape.dtype).reshape(dquery.shape)

    return pl.pallas_call(
        body,
        out_shape=_like_query(shape),
        grid=(shape.batch, shape.parts, shape.query_tiles),
        in_specs=[*_plan_specs(shape, shape.key_tiles), _ints_spec(shape, shape.queries)]
        + [_query_spec(shape)] * 2
        + [_row_spec(shape)] * 2
        + [pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=_query_spec(shape),
        scratch_shapes=[
            *_buffers_of_keys(shape),
            pltpu.VMEM((shape.queries, LANES), jnp.int32),
            pltpu.VMEM((shape.rows, shape.width), jnp.float32),
            pltpu.VMEM((shape.rows, LANES), jnp.float32),
            pltpu.VMEM((shape.rows, LANES), jnp.float32),
        ],
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name="attention_backward_queries",
    )


def backward_keys(shape: Shape, scale: float, *, interpret: Any = None):
    """The kernel of `dk` and `dv`, a function of `(order, counts, key integers, key, value, query,
    dout, lse, delta, query integers)`; the plan is one for tiles of keys.
    """
    factor = scale * LOG2E
    parts = shape.parts // shape.key_heads  # that read one key head

    def body(
        order, counts, key_ints, key, value, query, dout, lse, delta, query_ints, dkey, dvalue,
        query_buffer, dout_buffer, lse_buffer, delta_buffer, ints_buffer, semaphores, columns,
        total_key, total_value,
    ):  # fmt: skip
        total_key[...] = jnp.zeros_like(total_key)
        total_value[...] = jnp.zeros_like(total_value)
        _turn(columns, key_ints[...], counts)
        batch, key_head = pl.program_id(0), pl.program_id(1)
        mask_row = batch if query_ints.shape[0] > 1 else 0

        def copies(turn, tile, slot):
            place = (batch, key_head * parts + turn)
            rows = pl.ds(pl.multiple_of(tile * shape.queries, LANES), shape.queries)
            return [
                (query.at[*place, :, rows], query_buffer.at[slot]),
                (dout.at[*place, :, rows], dout_buffer.at[slot]),
                (lse.at[*place, tile], lse_buffer.at[slot]),
                (delta.at[*place, tile], delta_buffer.at[slot]),
                (query_ints.at[mask_row, tile], ints_buffer.at[slot]),
            ]

        def step(slot, mixed):
            here, dout_here = _rows(query_buffer.at[slot]), _rows(dout_buffer.at[slot])
            s = factor * _dot(key[...], here, transposed=True)  # keys by queries
            if mixed:
                s = s + _of_columns(shape, columns, ints_buffer[slot])
            p = jnp.exp2(s - lse_buffer[slot])
            total_value[...] += _dot(p.astype(shape.dtype), dout_here)
            ds = p * (_dot(value[...], dout_here, transposed=True) - delta_buffer[slot])
            total_key[...] += _dot(ds.astype(shape.dtype), here)

        _stream(order, counts, copies, semaphores, step, turns=parts)
        dkey[...] = (scale * total_key[...]).astype(shape.dtype)
        dvalue[...] = total_value[...].astype(shape.dtype)

    size = (shape.batch, shape.key_heads, shape.key_length, shape.width)
    tile = pl.BlockSpec((None, None, shape.keys, shape.width), lambda b, h, i: (b, h, i, 0))
    queries = pltpu.VMEM((2, shape.part, shape.queries, shape.width), shape.dtype)
    row = pltpu.VMEM((2, 1, shape.rows), jnp.float32)
    return pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(size, shape.dtype)] * 2,
        grid=(shape.batch, shape.key_heads, shape.key_tiles),
        in_specs=[*_plan_specs(shape, shape.query_tiles), _ints_spec(shape, shape.keys), tile, tile]
        + [pl.BlockSpec(memory_space=pl.ANY)] * 5,
        out_specs=[tile, tile],
        scratch_shapes=[
            queries,
            queries,
            row,
            row,
            pltpu.VMEM((2, shape.integers, shape.queries), jnp.int32),
            pltpu.SemaphoreType.DMA((5, 2)),
            pltpu.VMEM((shape.keys, LANES), jnp.int32),
            pltpu.VMEM((shape.keys, shape.width), jnp.float32),
            pltpu.VMEM((shape.keys, shape.width), jnp.float32),
        ],
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name="attention_backward_keys",
    )


# --- streams -------------------------------------------------------------------------------------

_Copies = Callable[[Any, Any, Any], Sequence[tuple[_Ref, _Ref]]]


def _stream(
    order: _Ref,
    counts: _Ref,
    copies: _Copies,
    semaphores: _Ref,
    compute: Callable[[Any, bool], None],
    *,
    turns: int = 1,
) -> None:
    """`compute(slot, mixed)` for every tile of a plan, `turns` times each.

    `copies(turn, tile, slot)` gives `(source, target)` pairs; the last one is of the integers,
    which visible tiles do without.
    """
    seen, visited = counts[0, 0] * turns, counts[0, 1] * turns

    def transfers(i, integers):
        """The copies of step i: of the integers, or of everything else."""
        slot = lax.rem(i, 2)
        pairs = list(enumerate(copies(lax.rem(i, turns), order[0, lax.div(i, turns)], slot)))
        kept = pairs[-1:] if integers else pairs[:-1]
        return [pltpu.make_async_copy(*pair, semaphores.at[k, slot]) for k, pair in kept]

    def start(i):
        for copy in transfers(i, False):
            copy.start()

        @pl.when(i >= seen)
        def _():
            for copy in transfers(i, True):
                copy.start()

    def step(i, mixed):
        pl.when(i + 1 < visited)(lambda: start(i + 1))
        for integers in (False, True)[: 1 + mixed]:
            for copy in transfers(i, integers):
                copy.wait()
        compute(lax.rem(i, 2), mixed)

    pl.when(visited > 0)(lambda: start(jnp.int32(0)))
    lax.fori_loop(0, seen, lambda i, _: step(i, False), None)
    lax.fori_loop(seen, visited, lambda i, _: step(i, True), None)


def _copies_of_keys(
    shape: Shape,
    key: _Ref,
    value: _Ref,
    key_ints: _Ref,
    key_buffer: _Ref,
    value_buffer: _Ref,
    ints_buffer: _Ref,
) -> _Copies:
    """For a program of queries: the keys and values of its key head."""
    batch = pl.program_id(0)
    key_head = lax.div(pl.program_id(1), shape.parts // shape.key_heads)
    mask_row = batch if key_ints.shape[0] > 1 else 0

    def copies(_, tile, slot):
        rows = pl.ds(pl.multiple_of(tile * shape.keys, LANES), shape.keys)
        return [
            (key.at[batch, key_head, rows], key_buffer.at[slot]),
            (value.at[batch, key_head, rows], value_buffer.at[slot]),
            (key_ints.at[mask_row, tile], ints_buffer.at[slot]),
        ]

    return copies


def _buffers_of_keys(shape: Shape) -> list[Any]:
    keys = pltpu.VMEM((2, shape.keys, shape.width), shape.dtype)
    ints = pltpu.VMEM((2, shape.integers, shape.keys), jnp.int32)
    return [keys, keys, ints, pltpu.SemaphoreType.DMA((3, 2))]


# --- masks ---------------------------------------------------------------------------------------


def _turn(columns: _Ref, ints: jax.Array, counts: _Ref) -> None:
    """Integers of the program's own tile `[integers, tokens]` to columns, where they are needed."""

    @pl.when(counts[0, 1] > counts[0, 0])
    def _():
        rest = jnp.zeros((LANES - ints.shape[0], ints.shape[1]), jnp.int32)
        columns[...] = jnp.transpose(jnp.concatenate([ints, rest], axis=0))


def _of_rows(shape: Shape, query_columns: _Ref, key_ints: jax.Array) -> jax.Array:
    """What hides keys from queries, 0 or -inf: `[rows, keys]`, of all heads."""
    query, key = _sides(shape, query_columns, key_ints)
    hidden = jnp.where(tile_mask.visible(shape.program, query, key), 0.0, -jnp.inf)
    return jnp.concatenate([hidden] * shape.part, axis=0)


def _of_columns(shape: Shape, key_columns: _Ref, query_ints: jax.Array) -> jax.Array:
    """The same transposed: `[keys, rows]`."""
    key, query = _sides(shape, key_columns, query_ints)
    hidden = jnp.where(tile_mask.visible(shape.program, query, key), 0.0, -jnp.inf)
    return jnp.concatenate([hidden] * shape.part, axis=1)


def _sides(shape: Shape, columns: _Ref, rows: jax.Array) -> tuple[list, list]:
    """Each integer as a column and as a row, as wide as the result."""
    size = (columns.shape[0], rows.shape[1])
    each = range(shape.program.integers)
    return (
        [jnp.broadcast_to(columns[:, a : a + 1], size) for a in each],
        [jnp.broadcast_to(rows[a : a + 1], size) for a in each],
    )


# --- arrays --------------------------------------------------------------------------------------


def _rows(ref: _Ref) -> jax.Array:
    """`[part, queries, width]` of a Ref as one matrix."""
    x = ref[...]
    return x.reshape(-1, x.shape[-1])


def _dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a b`, or `a b^T`, summed in float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _plan_specs(shape: Shape, others: int) -> list[pl.BlockSpec]:
    """One row of a plan, `[mask_rows,tiles,1,others]` and `[mask_rows,tiles,1,2]`: what scalar
    memory holds is linear in the length."""
    row = lambda size: _of_mask(shape, (None, None, 1, size), memory_space=pltpu.SMEM)
    return [row(others), row(2)]


def _ints_spec(shape: Shape, tokens: int) -> pl.BlockSpec:
    return _of_mask(shape, (None, None, shape.integers, tokens))


def _of_mask(shape: Shape, block: tuple[int | None, ...], **how: Any) -> pl.BlockSpec:
    """Of the program's own tile."""
    index = lambda b, h, i: (b if shape.mask_rows > 1 else 0, i, 0, 0)
    return pl.BlockSpec(block, index, **how)


def _query_spec(shape: Shape) -> pl.BlockSpec:
    block = (None, None, shape.part, shape.queries, shape.width)
    return pl.BlockSpec(block, lambda b, h, i: (b, h, 0, i, 0))


def _row_spec(shape: Shape) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, 1, shape.rows), lambda b, h, i: (b, h, i, 0, 0))


def _like_query(shape: Shape) -> jax.ShapeDtypeStruct:
    size = (shape.batch, shape.parts, shape.part, shape.query_length, shape.width)
    return jax.ShapeDtypeStruct(size, shape.dtype)


def _row_per_tile(shape: Shape) -> jax.ShapeDtypeStruct:
    size = (shape.batch, shape.parts, shape.query_tiles, 1, shape.rows)
    return jax.ShapeDtypeStruct(size, jnp.float32)
