"""The recurrence on TPUs (Pallas, Mosaic): states and gates never leave the chip.

A program is a tile of batch rows and channels and steps through time; the last grid axis is time,
and between its steps the state waits in the tile of the final state. Bytes per (batch, time,
channel), s = bytes a number: forward GRU 4s, LSTM 5s; backward 8s and 9s.

Nothing else moves in HBM. The kernels read u as `[B,3,T,D]`, since three gates as second-last axis
would fill three rows of a tile of eight. A projection whose einsum gives `[B,T,3,D]` writes that
order by itself: to XLA, exchanging axes is a choice of layout. Only a u that already exists in
another layout is copied. Any time and any number of channels are read as they are: what a tile
reads beyond the array is masked, and what it writes there is dropped.

A vector register holds 8 sublanes of 128 lanes, and a tile in memory 8 times of 128 channels. A
step wants its 8 sublanes independent: batch rows, or where there are fewer than 8, groups of
channels too. So a few rows of time at once are stored in a buffer as they come and loaded with a
stride (`_spread`, `_row`), and the results the same way back (`_put`, `_gather`); turning them
within registers takes four times as many instructions. A step is a chain of special functions, as
long for one register as for several, so a program advances several side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hackle.layers.recurrent import newton
from hackle.layers.recurrent.cells import Arrays, Block, Cell, apply, transposed

_LANES = 128
_SUBLANES = 8
# Registers of a state that one program advances at once. Backward, weights and their sums take six
# or ten more for each, and fewer are needed: the chain is one product a step.
_FORWARD, _BACKWARD = 4, 2
_VMEM = 8 * 2**20  # bytes of a program's tiles, two of each; the smallest default limit is 16 MiB
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def unsupported(u: jax.Array) -> str | None:
    """Why the kernels cannot run on the default device, or None if they can."""
    device = jax.devices()[0]
    if device.platform != "tpu":
        return f"the fused TPU kernel needs a TPU, the default device is {device}"
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused TPU kernel stores float32 or bfloat16, got {u.dtype}"
    return None


def solve(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    *,
    interpret=None,
) -> tuple[Arrays, Arrays]:
    """States `[B,T,D]` in u's dtype and final states `[B,D]` float32; see `scan.solve`.

    Args:
      interpret: passed to the kernel, for tests without a TPU. Steps are not unrolled then: a CPU
        takes too long to compile them.
    """
    batch, time, _, width = u.shape
    cell, n = _fast(cell), cell.states
    tiles = _tiles(u, 3 + n, _FORWARD)
    resets = () if reset is None else (_reset_words(reset, tiles),)

    def body(*arguments):
        refs = list(arguments)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        u_ref, weights_ref = take(2)
        initial_refs, words_refs = take(n), take(len(resets))
        states_refs, final_refs = take(n), take(n)
        gate_buffers, out_buffers = take(3), take(n)

        @pl.when(pl.program_id(2) == 0)
        def _():
            for final, start in zip(final_refs, initial_refs, strict=True):
                final[...] = start[...]

        weights = _weights(weights_ref, tiles)
        first = pl.program_id(2) * tiles.time

        def block(i, state):
            rows = tiles.block(i)
            for k, buffer in enumerate(gate_buffers):
                _spread(u_ref.at[:, k, rows], buffer, tiles)
            words = [_words(ref, i, tiles) for ref in words_refs]

            def step(j, state):
                before = state
                for word in words:
                    before = _cut(word, j, before)
                gates = tuple(_row(buffer, j) for buffer in gate_buffers)
                after = cell.step(before, gates, weights)
                if time % tiles.rows:  # rows after the end must not move the final state
                    after = _where(first + i * tiles.rows + j < time, after, state)
                for buffer, x in zip(out_buffers, after, strict=True):
                    _put(buffer, j, x)
                return after

            state = lax.fori_loop(0, tiles.rows, step, state, unroll=not interpret)
            for buffer, ref in zip(out_buffers, states_refs, strict=True):
                _gather(buffer, ref.at[:, rows], tiles)
            return state

        state = tuple(tiles.fold(ref[...]) for ref in final_refs)
        state = lax.fori_loop(0, tiles.blocks(first, time), block, state)
        for ref, x in zip(final_refs, state, strict=True):
            ref[...] = tiles.unfold(x)

    order = lambda k: k
    row, states = tiles.row_spec, tiles.time_spec(order)
    out = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((batch, time, width), u.dtype)] * n
        + [jax.ShapeDtypeStruct((batch, width), jnp.float32)] * n,
        grid=tiles.grid,
        in_specs=[
            tiles.gates_spec(order),
            tiles.weights_spec(cell),
            *[row] * n,
            *[tiles.words_spec(order) for _ in resets],
        ],
        out_specs=[states] * n + [row] * n,
        scratch_shapes=[tiles.buffer()] * 3 + [tiles.out_buffer()] * n,
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name=f"{cell.name}_forward",
    )(jnp.swapaxes(u, 1, 2), weights, *initial, *resets)
    return tuple(out[:n]), tuple(out[n:])


def march(
    cell: Cell, u: jax.Array, weights: jax.Array, initial: Arrays, reset: jax.Array | None
) -> tuple[Arrays, Arrays, Block]:
    """As `scan.march`; the Jacobians are multiplied outside the kernel."""
    states, final = solve(cell, u, weights, initial, reset)
    return states, final, newton.product(cell, u, weights, initial, reset, states)


def adjoint(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    states: Arrays,
    cotangents: tuple[jax.Array | None, ...],
    final_cotangents: Arrays,
    *,
    interpret=None,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """Gradients `(du [B,T,3,D], dweights [R,D], dinitial [B,D]s)`; see `scan.adjoint`.

    One pass in reverse time: gates are made again from u and the states, and the sums over time
    of `dweights` stay in a tile of their own, one for each program.
    """
    batch, time, _, width = u.shape
    cell, n = _fast(cell), cell.states
    given = [x.astype(u.dtype) for x in cotangents if x is not None]
    tiles = _tiles(u, 6 + n + len(given), _BACKWARD)
    resets = () if reset is None else (_reset_words(reset, tiles),)
    count = tiles.grid[2]

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
        tile = count - 1 - pl.program_id(2)
        first = tile * tiles.time

        @pl.when(pl.program_id(2) == 0)
        def _():
            dweights_ref[...] = jnp.zeros_like(dweights_ref)
            for ref, end in zip(carry_refs, end_refs, strict=True):
                ref[...] = end[...]

        weights = _weights(weights_ref, tiles)
        blocks = tiles.blocks(first, time)

        def block(done, carry):
            i = blocks - 1 - done
            rows = tiles.block(i)
            for k, buffer in enumerate(gate_buffers):
                _spread(u_ref.at[:, k, rows], buffer, tiles)
            for ref, buffer in zip(given_refs, given_buffers, strict=True):
                _spread(ref.at[:, rows], buffer, tiles)
            of_states = (states_refs, border_refs, initial_refs, states_buffers)
            for ref, border, start, buffer in zip(*of_states, strict=True):
                _spread(ref.at[:, rows], buffer, tiles, offset=1)
                earlier = ref.at[:, tiles.block(jnp.maximum(i - 1, 0))]
                _spread_before(i, tile, earlier, border, start, buffer, tiles)
            words = [_words(ref, i, tiles) for ref in words_refs]

            def step(done, loop):
                carry, after, sums = loop
                j = tiles.rows - 1 - done
                stored = tuple(_row(buffer, j + _SUBLANES - 1) for buffer in states_buffers)
                before = stored
                for word in words:
                    before = _cut(word, j, before)
                gates = tuple(_row(buffer, j) for buffer in gate_buffers)
                received = (_row(buffer, j) for buffer in given_buffers)
                total = tuple(
                    c if x is None else c + next(received)
                    for c, x in zip(carry, cotangents, strict=True)
                )
                jacobian, local = cell.local_gradients(before, gates, weights)
                sent = apply(transposed(jacobian), total)
                for word in words:
                    sent = _cut(word, j, sent)
                du = apply(transposed(local), total)
                grads = cell.weight_gradients(before, after, gates, weights, du)
                if time % tiles.rows:  # rows after the end give nothing and pass the carry on
                    inside = first + i * tiles.rows + j < time
                    sent = _where(inside, sent, carry)
                    grads = _where(inside, grads, tuple(jnp.zeros_like(x) for x in grads))
                for buffer, x in zip(du_buffers, du, strict=True):
                    _put(buffer, j, x)
                return sent, stored, tuple(x + g for x, g in zip(sums, grads, strict=True))

            last = tuple(_row(buffer, tiles.rows + _SUBLANES - 1) for buffer in states_buffers)
            sums = tuple(jnp.zeros_like(x) for x in weights)
            carry, _, sums = lax.fori_loop(
                0, tiles.rows, step, (carry, last, sums), unroll=not interpret
            )
            for k, buffer in enumerate(du_buffers):
                _gather(buffer, du_ref.at[:, k, rows], tiles)
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
            jax.ShapeDtypeStruct((*tiles.grid[:2], *sums), jnp.float32),
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
            pl.BlockSpec((None, None, *sums), lambda i, j, k: (i, j, 0, 0, 0)),
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
    parts = dweights.reshape(*tiles.grid[:2], -1, tiles.columns, tiles.batch, _LANES)
    dweights = parts.transpose(0, 4, 2, 1, 3, 5).reshape(
        parts.shape[0] * tiles.batch, cell.weights, -1
    )
    # Rows beyond the batch hold anything: they are cut off before the sum.
    dweights = jnp.sum(dweights[:batch, :, :width], axis=0)
    return jnp.swapaxes(du, 1, 2), dweights, tuple(dinitial)


def _sigmoid(x: jax.Array) -> jax.Array:
    """By tanh, which the chip has, with half its error; a division takes a dozen instructions."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def _fast(cell: Cell) -> Cell:
    return type(cell)(sigmoid=_sigmoid)


class _Tiles(NamedTuple):
    """How the arrays are cut: a tile is `batch` rows, `time` steps, `columns` times 128 channels.

    A state of a tile is an array `[columns * batch, 128]`, whatever the two are: that fills the
    sublanes of registers.
    """

    batch: int
    columns: int
    time: int
    rows: int  # steps between two turns
    grid: tuple[int, int, int]

    @property
    def state(self) -> tuple[int, int]:
        return self.columns * self.batch, _LANES

    @property
    def registers(self) -> int:
        return pl.cdiv(self.columns * self.batch, _SUBLANES)

    def fold(self, x: jax.Array) -> jax.Array:
        """`[batch, columns * 128] -> [columns * batch, 128]`."""
        return jnp.concatenate([x[:, lanes] for lanes in self.lanes()], axis=0)

    def unfold(self, x: jax.Array) -> jax.Array:
        parts = [x[c * self.batch : (c + 1) * self.batch] for c in range(self.columns)]
        return jnp.concatenate(parts, axis=1)

    def lanes(self) -> list[slice]:
        return [slice(c * _LANES, (c + 1) * _LANES) for c in range(self.columns)]

    def block(self, i):
        """The rows of block i of a tile."""
        return pl.ds(pl.multiple_of(i * self.rows, self.rows), self.rows)

    def blocks(self, first, time: int):
        """Blocks with rows before `time`, in a tile whose first row is `first`."""
        full = self.time // self.rows
        if time % self.time == 0:
            return full
        return jnp.minimum(full, pl.cdiv(time - first, self.rows))

    def buffer(self, extra: int = 0):
        """Of `_spread`: eights of rows, columns, batch rows, 8 rows of time."""
        eights = self.rows // _SUBLANES + extra
        return pltpu.VMEM((eights, self.state[0] * _SUBLANES, _LANES), jnp.float32)

    def out_buffer(self):
        """Of `_put`: registers, rows of time, 8 sublanes."""
        return pltpu.VMEM((self.registers, self.rows * _SUBLANES, _LANES), jnp.float32)

    @property
    def row_spec(self) -> pl.BlockSpec:
        return pl.BlockSpec((self.batch, self.columns * _LANES), lambda i, j, k: (i, j))

    def weights_spec(self, cell: Cell) -> pl.BlockSpec:
        return pl.BlockSpec((cell.weights, self.columns * _LANES), lambda i, j, k: (0, j))

    def time_spec(self, order) -> pl.BlockSpec:
        shape = (self.batch, self.time, self.columns * _LANES)
        return pl.BlockSpec(shape, lambda i, j, k: (i, order(k), j))

    def gates_spec(self, order) -> pl.BlockSpec:
        shape = (self.batch, 3, self.time, self.columns * _LANES)
        return pl.BlockSpec(shape, lambda i, j, k: (i, 0, order(k), j))

    def border_spec(self, order) -> pl.BlockSpec:
        """The last rows of the tile before."""
        shape, blocks = (self.batch, self.rows, self.columns * _LANES), self.time // self.rows
        return pl.BlockSpec(shape, lambda i, j, k: (i, jnp.maximum(order(k) * blocks - 1, 0), j))

    def words_spec(self, order) -> pl.BlockSpec:
        shape = (self.time // self.rows, self.batch, _LANES)
        return pl.BlockSpec(shape, lambda i, j, k: (order(k), i, 0))


def _tiles(u: jax.Array, arrays: int, registers: int) -> _Tiles:
    """For `u [B,T,3,D]`: tiles of `arrays` arrays of the size of the states, whose rows fill about
    `registers` registers each.
    """
    batch, time, _, width = u.shape
    itemsize = jnp.dtype(u.dtype).itemsize
    b = min(batch, _SUBLANES)
    columns = min(registers * _SUBLANES // b, pl.cdiv(width, _LANES))
    rows = _SUBLANES * 4 // itemsize  # as many as a tile of memory holds
    fit = _VMEM // (2 * arrays * b * columns * _LANES * itemsize * rows)
    t = rows * max(1, min(fit, pl.cdiv(time, rows)))
    grid = (pl.cdiv(batch, b), pl.cdiv(width, columns * _LANES), pl.cdiv(time, t))
    return _Tiles(b, columns, t, rows, grid)


def _spread(block, buffer, tiles: _Tiles, offset: int = 0) -> None:
    """Copies `[batch, rows, channels]` to where `_row` finds it, after `offset` times 8 rows."""
    size = tiles.batch * _SUBLANES
    for c, lanes in enumerate(tiles.lanes()):
        x = block[:, :, lanes].astype(jnp.float32)
        for i in range(tiles.rows // _SUBLANES):
            part = x[:, i * _SUBLANES : (i + 1) * _SUBLANES].reshape(size, _LANES)
            buffer[offset + i, c * size : (c + 1) * size] = part


def _spread_before(i, tile, earlier, border, start, buffer, tiles: _Tiles) -> None:
    """Puts the state before block i of a tile at row 7 of the buffer.

    It is the last of the rows `earlier` in the tile, of those at the `border` to the tile before,
    or `start`.
    """
    size = tiles.batch * _SUBLANES
    for c, lanes in enumerate(tiles.lanes()):
        x = jnp.where(i > 0, earlier[:, :, lanes], border[:, :, lanes]).astype(jnp.float32)
        x = jnp.where((i > 0) | (tile > 0), x[:, -_SUBLANES:], start[:, lanes][:, None])
        buffer[0, c * size : (c + 1) * size] = x.reshape(size, _LANES)


def _row(buffer, j) -> jax.Array:
    """Row j as a state."""
    count = buffer.shape[1] // _SUBLANES
    # `//` would go by the sign, whose lowering asks the default device for its kind.
    eight, row = lax.div(j, _SUBLANES), lax.rem(j, _SUBLANES)
    return buffer.at[eight][pl.ds(row, count, stride=_SUBLANES)]


def _put(buffer, j, x: jax.Array) -> None:
    """Row j, a state, to where `_gather` finds it."""
    for i in range(buffer.shape[0]):
        part = x[i * _SUBLANES : (i + 1) * _SUBLANES]
        buffer[i, pl.ds(j * _SUBLANES, part.shape[0])] = part


def _gather(buffer, block, tiles: _Tiles) -> None:
    """Copies what `_put` left to `[batch, rows, channels]`."""
    for r in range(tiles.state[0]):
        x = buffer.at[r // _SUBLANES][pl.ds(r % _SUBLANES, tiles.rows, stride=_SUBLANES)]
        block[r % tiles.batch, :, tiles.lanes()[r // tiles.batch]] = x.astype(block.dtype)


def _weights(ref, tiles: _Tiles) -> Arrays:
    """Rows of the weights as states: the same for every batch row."""
    shape = (tiles.batch, ref.shape[1])
    return tuple(tiles.fold(jnp.broadcast_to(ref[k : k + 1], shape)) for k in range(ref.shape[0]))


def _reset_words(reset: jax.Array, tiles: _Tiles) -> jax.Array:
    """`[B,T] bool -> [T / rows, B, 128] int32`: bit j of a word is the reset at row j.

    Words fill the lanes, so that the kernel need not: 4 / rows of the bytes of 128 channels.
    """
    batch, time = reset.shape
    reset = jnp.pad(reset, ((0, 0), (0, -time % tiles.rows)))
    bits = reset.reshape(batch, -1, tiles.rows).astype(jnp.int32) << jnp.arange(tiles.rows)
    words = jnp.sum(bits, axis=-1).T
    return jnp.broadcast_to(words[..., None], (*words.shape, _LANES))


def _words(ref, i, tiles: _Tiles) -> jax.Array:
    """The words of block i as a state: the same for every column."""
    return jnp.concatenate([ref[i]] * tiles.columns, axis=0)


def _cut(words: jax.Array, j, state: Arrays) -> Arrays:
    """Zero where bit j is set."""
    bit = (words & (1 << j)) != 0
    return tuple(jnp.where(bit, 0.0, x) for x in state)


def _where(condition, state: Arrays, otherwise: Arrays) -> Arrays:
    return tuple(jnp.where(condition, x, y) for x, y in zip(state, otherwise, strict=True))
