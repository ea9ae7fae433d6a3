"""How the TPU kernels cut their arrays into tiles, and how rows of a tile become registers.

A vector register holds 8 sublanes of 128 lanes, and a tile in memory 8 times of 128 channels. A
step wants its 8 sublanes independent: lines, or where there are fewer than 8, groups of channels
too. Lines are batch rows, or the segments of time of one batch row. So a few rows of time at once
are stored in a buffer as they come and loaded with a stride (`spread`, `row_of`), and the results
the same way back (`put_row`, `gather`); turning them within registers takes four times as many
instructions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hackle.layers.recurrent.cells import Arrays, Cell

LANES = 128
SUBLANES = 8
_VMEM = 8 * 2**20  # bytes of a program's tiles, two of each; the smallest default limit is 16 MiB


def tile_rows(dtype: Any) -> int:
    """Steps that a tile of memory holds."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


class Tiles(NamedTuple):
    """How the arrays are cut: a tile is `lines`, `time` steps, `columns` times 128 channels.

    A state of a tile is an array `[columns * lines, 128]`, whatever the two are: that fills the
    sublanes of registers. The grid is groups of lines, tiles of lines, of channels and of time;
    there is one group, of all batch rows, or, if `segmented`, one for each batch row.
    """

    lines: int
    columns: int
    time: int
    rows: int  # steps between two turns
    segmented: bool
    grid: tuple[int, int, int, int]

    @classmethod
    def of(
        cls, batch: int, segments: int, length: int, width: int, dtype: Any, arrays: int, most: int
    ) -> "Tiles":
        """For `arrays` arrays of the size of the states, whose rows fill about `most` registers."""
        itemsize = jnp.dtype(dtype).itemsize
        groups, count = (batch, segments) if segments > 1 else (1, batch)
        columns, lines = pl.cdiv(width, LANES), count
        if count > SUBLANES:  # whole registers of lines, several where channels are too few
            lines = SUBLANES * min(pl.cdiv(count, SUBLANES), max(1, most // columns))
        columns = min(most * SUBLANES // lines, columns)
        rows = tile_rows(dtype)
        fit = _VMEM // (2 * arrays * lines * columns * LANES * itemsize * rows)
        time = rows * max(1, min(fit, pl.cdiv(length, rows)))
        counts = (pl.cdiv(count, lines), pl.cdiv(width, columns * LANES), pl.cdiv(length, time))
        return cls(lines, columns, time, rows, segments > 1, (groups, *counts))

    @property
    def state(self) -> tuple[int, int]:
        return self.columns * self.lines, LANES

    @property
    def registers(self) -> int:
        return pl.cdiv(self.columns * self.lines, SUBLANES)

    def fold(self, x: jax.Array) -> jax.Array:
        """`[lines, columns * 128] -> [columns * lines, 128]`."""
        return jnp.concatenate([x[:, lanes] for lanes in self.lanes()], axis=0)

    def unfold(self, x: jax.Array) -> jax.Array:
        parts = [x[c * self.lines : (c + 1) * self.lines] for c in range(self.columns)]
        return jnp.concatenate(parts, axis=1)

    def lanes(self) -> list[slice]:
        return [slice(c * LANES, (c + 1) * LANES) for c in range(self.columns)]

    def block(self, i):
        """The rows of block i of a tile."""
        return pl.ds(pl.multiple_of(i * self.rows, self.rows), self.rows)

    def blocks(self, first, length: int):
        """Blocks with rows before `length`, in a tile whose first row is `first`."""
        full = self.time // self.rows
        if length % self.time == 0:
            return full
        return jnp.minimum(full, pl.cdiv(length - first, self.rows))

    def gate(self, ref, k: int, rows):
        """Gate k of some rows of a tile, `[lines, rows, channels]`."""
        return ref.at[k, :, rows] if self.segmented else ref.at[:, k, rows]

    def starts(self, length: int) -> jax.Array | int:
        """The time of a tile's first row, less its time within a line: that of each number of a
        state where lines are segments of `length` steps."""
        if not self.segmented:
            return 0
        line = lax.broadcasted_iota(jnp.int32, (self.lines, LANES), 0)
        line = (line + pl.program_id(1) * self.lines) * length
        return jnp.concatenate([line] * self.columns, axis=0)

    def buffer(self, extra: int = 0):
        """Of `spread`: eights of rows, columns, lines, 8 rows of time."""
        eights = self.rows // SUBLANES + extra
        return pltpu.VMEM((eights, self.state[0] * SUBLANES, LANES), jnp.float32)

    def out_buffer(self):
        """Of `put_row`: registers, rows of time, 8 sublanes."""
        return pltpu.VMEM((self.registers, self.rows * SUBLANES, LANES), jnp.float32)

    def _spec(self, shape: tuple[int, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        """Blocks of a group, at `index` of the tiles of lines, channels and time."""
        if self.segmented:
            return pl.BlockSpec((None, *shape), lambda g, i, j, k: (g, *index(i, j, k)))
        return pl.BlockSpec(shape, lambda g, i, j, k: index(i, j, k))

    @property
    def row_spec(self) -> pl.BlockSpec:
        return self._spec((self.lines, self.columns * LANES), lambda i, j, k: (i, j))

    def weights_spec(self, cell: Cell) -> pl.BlockSpec:
        return pl.BlockSpec((cell.weights, self.columns * LANES), lambda g, i, j, k: (0, j))

    def time_spec(self, order) -> pl.BlockSpec:
        shape = (self.lines, self.time, self.columns * LANES)
        return self._spec(shape, lambda i, j, k: (i, order(k), j))

    def gates_spec(self, order) -> pl.BlockSpec:
        tile = (self.time, self.columns * LANES)
        if self.segmented:
            return self._spec((3, self.lines, *tile), lambda i, j, k: (0, i, order(k), j))
        return self._spec((self.lines, 3, *tile), lambda i, j, k: (i, 0, order(k), j))

    def border_spec(self, order) -> pl.BlockSpec:
        """The last rows of the tile before."""
        shape, blocks = (self.lines, self.rows, self.columns * LANES), self.time // self.rows
        return self._spec(shape, lambda i, j, k: (i, jnp.maximum(order(k) * blocks - 1, 0), j))

    def words_spec(self, order) -> pl.BlockSpec:
        shape = (self.time // self.rows, self.lines, LANES)
        return self._spec(shape, lambda i, j, k: (order(k), i, 0))

    def spread(self, block, buffer, offset: int = 0) -> None:
        """Copies `[lines, rows, channels]` to where `row_of` finds it, `offset` times 8 rows on."""
        size = self.lines * SUBLANES
        for c, lanes in enumerate(self.lanes()):
            x = block[:, :, lanes].astype(jnp.float32)
            for i in range(self.rows // SUBLANES):
                part = x[:, i * SUBLANES : (i + 1) * SUBLANES].reshape(size, LANES)
                buffer[offset + i, c * size : (c + 1) * size] = part

    def spread_before(self, i, tile, earlier, border, start, buffer) -> None:
        """Puts the state before block i of a tile at row 7 of the buffer.

        It is the last of the rows `earlier` in the tile, of those at the `border` to the tile
        before, or `start`.
        """
        size = self.lines * SUBLANES
        for c, lanes in enumerate(self.lanes()):
            x = jnp.where(i > 0, earlier[:, :, lanes], border[:, :, lanes]).astype(jnp.float32)
            x = jnp.where((i > 0) | (tile > 0), x[:, -SUBLANES:], start[:, lanes][:, None])
            buffer[0, c * size : (c + 1) * size] = x.reshape(size, LANES)

    def gather(self, buffer, block) -> None:
        """Copies what `put_row` left to `[lines, rows, channels]`."""
        for r in range(self.state[0]):
            x = buffer.at[r // SUBLANES][pl.ds(r % SUBLANES, self.rows, stride=SUBLANES)]
            block[r % self.lines, :, self.lanes()[r // self.lines]] = x.astype(block.dtype)

    def weights(self, ref) -> Arrays:
        """Rows of the weights as states: the same for every line."""
        shape = (self.lines, ref.shape[1])
        return tuple(
            self.fold(jnp.broadcast_to(ref[k : k + 1], shape)) for k in range(ref.shape[0])
        )

    def reset_words(self, reset: jax.Array) -> jax.Array:
        """`[..., lines, T] bool -> [..., T / rows, lines, 128] int32`: bit j is the reset at row j.

        Words fill the lanes, so that the kernel need not: 4 / rows of the bytes of 128 channels.
        """
        *leading, time = reset.shape
        reset = jnp.pad(reset, ((0, 0),) * len(leading) + ((0, -time % self.rows),))
        bits = reset.reshape(*leading, -1, self.rows).astype(jnp.int32) << jnp.arange(self.rows)
        words = jnp.swapaxes(jnp.sum(bits, axis=-1), -1, -2)
        return jnp.broadcast_to(words[..., None], (*words.shape, LANES))

    def words(self, ref, i) -> jax.Array:
        """The words of block i as a state: the same for every column."""
        return jnp.concatenate([ref[i]] * self.columns, axis=0)


def row_of(buffer, j) -> jax.Array:
    """Row j as a state."""
    count = buffer.shape[1] // SUBLANES
    # `//` would go by the sign, whose lowering asks the default device for its kind.
    eight, row = lax.div(j, SUBLANES), lax.rem(j, SUBLANES)
    return buffer.at[eight][pl.ds(row, count, stride=SUBLANES)]


def put_row(buffer, j, x: jax.Array) -> None:
    """Row j, a state, to where `gather` finds it."""
    for i in range(buffer.shape[0]):
        part = x[i * SUBLANES : (i + 1) * SUBLANES]
        buffer[i, pl.ds(j * SUBLANES, part.shape[0])] = part


def cut(words: jax.Array, j, state: Arrays) -> Arrays:
    """Zero where bit j is set."""
    bit = (words & (1 << j)) != 0
    return tuple(jnp.where(bit, 0.0, x) for x in state)


def where(condition, state: Arrays, otherwise: Arrays) -> Arrays:
    return tuple(jnp.where(condition, x, y) for x, y in zip(state, otherwise, strict=True))
