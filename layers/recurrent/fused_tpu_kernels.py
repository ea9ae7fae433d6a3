"""The two TPU kernels of `fused_tpu.py`: a program is a tile of lines and channels, step by step.

The last grid axis is time, and between its steps the state waits in the tile of the final state.
A step is a chain of special functions, as long for one register as for several, so a program
advances several side by side.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hackle.layers.recurrent.cells import (
    Arrays,
    Block,
    Cell,
    apply,
    block_of,
    compose,
    identity,
    transposed,
)
from hackle.layers.recurrent.fused_tpu_tiles import (
    LANES,
    SUBLANES,
    Tiles,
    cut,
    put_row,
    row_of,
    where,
)

# Registers of a state that one program advances at once. Backward, weights and their sums take six
# or ten more for each, and fewer are needed: the chain is one product a step.
FORWARD, _BACKWARD = 4, 2
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


def forward(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    entries: Arrays,
    reset: jax.Array | None,
    *,
    segments: int = 1,
    time: int | None = None,
    products: bool = False,
    interpret: Any = None,
) -> tuple[Arrays, Arrays, Block]:
    """The recurrence, or that of each segment of time from a state of its own.

    Args:
      u, weights, reset: as in `scan.solve`.
      entries: float32 states before each segment, `[B,S,D]` each; `[B,D]` where there is one.
      segments: S, equal parts of T; if several, each of a multiple of `tile_rows(u.dtype)`.
      time: steps that count, at most T, which is the default.
      products: whether to multiply the Jacobians of a segment's steps.
      interpret: passed to the kernel, for tests without a TPU. Steps are not unrolled then: a CPU
        takes too long to compile them.

    Returns:
      States `[B,T,D]` in u's dtype, those after each segment as `entries`, and
      d(after) / d(before) of each segment, a block of such arrays, or ().
    """
    batch, whole, _, width = u.shape
    length, time = whole // segments, whole if time is None else time
    cell, n = fast(cell), cell.states
    tiles = Tiles.of(batch, segments, length, width, u.dtype, 3 + n, FORWARD)
    u, lines = jnp.swapaxes(u, 1, 2), entries[0].shape[:-1]
    if segments > 1:
        u = u.reshape(batch, 3, segments, length, width)
        reset = None if reset is None else reset.reshape(batch, segments, length)
    resets = () if reset is None else (tiles.reset_words(reset),)
    # Rows after the end must not move the final state.
    ragged = time % tiles.rows if segments == 1 else time < whole
    count = n + n * n * products  # arrays that one step hands to the next

    def body(*arguments):
        refs = list(arguments)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        u_ref, weights_ref = take(2)
        entry_refs, words_refs = take(n), take(len(resets))
        states_refs, carry_refs = take(n), take(count)
        gate_buffers, out_buffers = take(3), take(n)

        @pl.when(pl.program_id(3) == 0)
        def _():
            start = tuple(ref[...] for ref in entry_refs)
            start = (*start, *jax.tree.leaves(identity(start))) if products else start
            for ref, x in zip(carry_refs, start, strict=True):
                ref[...] = x

        weights = tiles.weights(weights_ref)
        first, starts = pl.program_id(3) * tiles.time, tiles.starts(length)

        def block(i, carry):
            rows = tiles.block(i)
            for k, buffer in enumerate(gate_buffers):
                tiles.spread(tiles.gate(u_ref, k, rows), buffer)
            words = [tiles.words(ref, i) for ref in words_refs]

            def step(j, carry):
                before = carry
                for word in words:
                    before = cut(word, j, before)
                gates = tuple(row_of(buffer, j) for buffer in gate_buffers)
                if products:
                    state, jacobian = cell.linearize(before[:n], gates, weights)
                    product = compose(jacobian, block_of(before[n:], n))
                    after = (*state, *jax.tree.leaves(product))
                else:
                    after = cell.step(before, gates, weights)
                if ragged:
                    after = where(starts + (first + i * tiles.rows + j) < time, after, carry)
                for buffer, x in zip(out_buffers, after[:n], strict=True):
                    put_row(buffer, j, x)
                return after

            carry = lax.fori_loop(0, tiles.rows, step, carry, unroll=not interpret)
            for buffer, ref in zip(out_buffers, states_refs, strict=True):
                tiles.gather(buffer, ref.at[:, rows])
            return carry

        carry = tuple(tiles.fold(ref[...]) for ref in carry_refs)
        carry = lax.fori_loop(0, tiles.blocks(first, length), block, carry)
        for ref, x in zip(carry_refs, carry, strict=True):
            ref[...] = tiles.unfold(x)

    order = lambda k: k
    row, series = tiles.row_spec, tiles.time_spec(order)
    out = pl.pallas_call(
        body,
        out_shape=[
            *[jax.ShapeDtypeStruct((*lines, length, width), u.dtype)] * n,
            *[jax.ShapeDtypeStruct((*lines, width), jnp.float32)] * count,
        ],
        grid=tiles.grid,
        in_specs=[
            tiles.gates_spec(order),
            tiles.weights_spec(cell),
            *[row] * n,
            *[tiles.words_spec(order) for _ in resets],
        ],
        out_specs=[series] * n + [row] * count,
        scratch_shapes=[tiles.buffer()] * 3 + [tiles.out_buffer()] * n,
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name=f"{cell.name}_forward",
    )(u, weights, *entries, *resets)
    states = tuple(x.reshape(batch, whole, width) for x in out[:n])
    return states, tuple(out[n : 2 * n]), block_of(out[2 * n :], n) if products else ()


def backward(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    states: Arrays,
    cotangents: tuple[jax.Array | None, ...],
    final_cotangents: Arrays,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """Gradients `(du [B,T,3,D], dweights [R,D], dinitial [B,D]s)`; see `scan.adjoint`.

    One pass in reverse time: gates are made again from u and the states, and the sums over time
    of `dweights` stay in a tile of their own, one for each program.
    """
    batch, time, _, width = u.shape
    cell, n = fast(cell), cell.states
    given = [x.astype(u.dtype) for x in cotangents if x is not None]
    arrays = 6 + n + len(given)
    tiles = Tiles.of(batch, 1, time, width, u.dtype, arrays, _BACKWARD)
    resets = () if reset is None else (tiles.reset_words(reset),)
    count = tiles.grid[3]

    def body(*arguments):
        refs = list(arguments)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        u_ref, weights_ref = take(2)
        initial_refs, end_refs, states_refs, border_refs = take(n), take(n), take(n), take(n)
        given_refs, words_refs = take(len(given)), take(len(resets))
        du_ref, dweights_ref = take(2)
        carry_refs = take(n)
        gate_buffers, states_buffers, given_buffers = take(3), take(n), take(len(given))
        du_buffers = take(3)
        tile = count - 1 - pl.program_id(3)
        first = tile * tiles.time

        @pl.when(pl.program_id(3) == 0)
        def _():
            dweights_ref[...] = jnp.zeros_like(dweights_ref)
            for ref, end in zip(carry_refs, end_refs, strict=True):
                ref[...] = end[...]

        weights = tiles.weights(weights_ref)
        blocks = tiles.blocks(first, time)

        def block(done, carry):
            i = blocks - 1 - done
            rows = tiles.block(i)
            for k, buffer in enumerate(gate_buffers):
                tiles.spread(tiles.gate(u_ref, k, rows), buffer)
            for ref, buffer in zip(given_refs, given_buffers, strict=True):
                tiles.spread(ref.at[:, rows], buffer)
            of_states = (states_refs, border_refs, initial_refs, states_buffers)
            for ref, border, start, buffer in zip(*of_states, strict=True):
                tiles.spread(ref.at[:, rows], buffer, offset=1)
                earlier = ref.at[:, tiles.block(jnp.maximum(i - 1, 0))]
                tiles.spread_before(i, tile, earlier, border, start, buffer)
            words = [tiles.words(ref, i) for ref in words_refs]

            def step(done, loop):
                carry, after, sums = loop
                j = tiles.rows - 1 - done
                stored = tuple(row_of(buffer, j + SUBLANES - 1) for buffer in states_buffers)
                before = stored
                for word in words:
                    before = cut(word, j, before)
                gates = tuple(row_of(buffer, j) for buffer in gate_buffers)
                received = (row_of(buffer, j) for buffer in given_buffers)
                total = tuple(
                    c if x is None else c + next(received)
                    for c, x in zip(carry, cotangents, strict=True)
                )
                jacobian, local = cell.local_gradients(before, gates, weights)
                sent = apply(transposed(jacobian), total)
                for word in words:
                    sent = cut(word, j, sent)
                du = apply(transposed(local), total)
                grads = cell.weight_gradients(before, after, gates, weights, du)
                if time % tiles.rows:  # rows after the end give nothing and pass the carry on
                    inside = first + i * tiles.rows + j < time
                    sent = where(inside, sent, carry)
                    grads = where(inside, grads, tuple(jnp.zeros_like(x) for x in grads))
                for buffer, x in zip(du_buffers, du, strict=True):
                    put_row(buffer, j, x)
                return sent, stored, tuple(x + g for x, g in zip(sums, grads, strict=True))

            last = tuple(row_of(buffer, tiles.rows + SUBLANES - 1) for buffer in states_buffers)
            sums = tuple(jnp.zeros_like(x) for x in weights)
            carry, _, sums = lax.fori_loop(
                0, tiles.rows, step, (carry, last, sums), unroll=not interpret
            )
            for k, buffer in enumerate(du_buffers):
                tiles.gather(buffer, tiles.gate(du_ref, k, rows))
            for k, x in enumerate(sums):
                dweights_ref[k] += x
            return carry

        carry = tuple(tiles.fold(ref[...]) for ref in carry_refs)
        carry = lax.fori_loop(0, blocks, block, carry)
        for ref, x in zip(carry_refs, carry, strict=True):
            ref[...] = tiles.unfold(x)

    order = lambda k: count - 1 - k
    row, gates, series = tiles.row_spec, tiles.gates_spec(order), tiles.time_spec(order)
    sums = (cell.weights, *tiles.state)
    du, dweights, *dinitial = pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((batch, 3, time, width), u.dtype),
            jax.ShapeDtypeStruct((*tiles.grid[1:3], *sums), jnp.float32),
            *[jax.ShapeDtypeStruct((batch, width), jnp.float32)] * n,
        ],
        grid=tiles.grid,
        in_specs=[
            gates,
            tiles.weights_spec(cell),
            *[row] * (2 * n),
            *[series] * n,
            *[tiles.border_spec(order)] * n,
            *[series] * len(given),
            *[tiles.words_spec(order) for _ in resets],
        ],
        out_specs=[
            gates,
            pl.BlockSpec((None, None, *sums), lambda g, i, j, k: (i, j, 0, 0, 0)),
            *[row] * n,
        ],
        scratch_shapes=[
            *[tiles.buffer()] * 3,
            *[tiles.buffer(extra=1)] * n,
            *[tiles.buffer()] * len(given),
            *[tiles.out_buffer()] * 3,
        ],
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name=f"{cell.name}_backward",
    )(
        jnp.swapaxes(u, 1, 2),
        weights,
        *initial,
        *final_cotangents,
        *states,
        *states,
        *given,
        *resets,
    )
    parts = dweights.reshape(*tiles.grid[1:3], -1, tiles.columns, tiles.lines, LANES)
    dweights = parts.transpose(0, 4, 2, 1, 3, 5).reshape(
        parts.shape[0] * tiles.lines, cell.weights, -1
    )
    # Rows beyond the batch hold anything: they are cut off before the sum.
    dweights = jnp.sum(dweights[:batch, :, :width], axis=0)
    return jnp.swapaxes(du, 1, 2), dweights, tuple(dinitial)


def _sigmoid(x: jax.Array) -> jax.Array:
    """By tanh, which the chip has, with half its error; a division takes a dozen instructions."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def fast(cell: Cell) -> Cell:
    """`cell` with the sigmoid that the chip does fast."""
    return type(cell)(sigmoid=_sigmoid)
