"""The recurrence on TPUs (Pallas, Mosaic): states and gates never leave the chip.

A program is a tile of batch rows and channels, and steps through time: the last grid axis is
time, and the state waits in the tile of the final state between its steps. Bytes per (batch, time,
channel), s = bytes a number: forward GRU 4s, LSTM 5s; backward 8s and 9s.

What moves, besides: nothing in HBM. The kernels read u as `[B,3,T,D]`, since three gates as
second-last axis would fill three rows of a tile of eight. A projection that gives `[B,T,3,D]`
writes that order by itself, because for XLA the exchange of axes is a choice of layout; only a u
that exists already in another layout is copied. Time and channels of any size are read as they
are: what a tile reads beyond the array is masked, what it writes there is dropped.

A vector register holds 8 sublanes of 128 lanes, and a tile in memory 8 times of 128 channels. A
step wants 8 rows that are independent: batch rows, or where there are fewer than 8, groups of
channels. So rows of time are taken `_rows` at a time and turned inside the registers, `_fold`,
which shuffles sublanes and overlaps with the arithmetic. A step is a chain of special functions
as long whatever the width, so several registers' width runs side by side.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hackle.layers.recurrent.cells import Arrays, Cell, apply, transposed

_LANES = 128
_SUBLANES = 8
_CHAINS = 4  # registers of one state that a program advances at once
_VMEM = 8 * 2**20  # bytes of a program's tiles, two of each; the smallest default limit is 16 MiB


def unsupported(u: jax.Array) -> str | None:
    """Why the kernels cannot run on the default device, or None if they can."""
    device = jax.devices()[0]
    if device.platform != "tpu":
        return f"the fused TPU kernel needs a TPU, the default device is {device}"
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused TPU kernel stores float32 or bfloat16, got {u.dtype}"
    return None


class _Tiles(NamedTuple):
    """How the arrays are cut: a tile is `batch` rows, `time` steps, `groups * width` channels."""

    batch: int
    groups: int
    width: int
    time: int
    rows: int  # steps between two exchanges of sublanes
    grid: tuple[int, int, int]

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def sublanes(self) -> int:
        return self.batch * self.groups

    def fold(self, x: jax.Array) -> jax.Array:
        """`[batch, rows, channels] -> [rows, sublanes, width]`: a step becomes whole registers."""
        if self.groups == 1:
            return jnp.swapaxes(x, 0, 1)
        x = x.reshape(self.batch, -1, self.groups, self.width)
        return x.transpose(1, 0, 2, 3).reshape(-1, self.sublanes, self.width)

    def unfold(self, x: jax.Array) -> jax.Array:
        """The inverse of `fold`."""
        if self.groups == 1:
            return jnp.swapaxes(x, 0, 1)
        x = x.reshape(-1, self.batch, self.groups, self.width)
        return x.transpose(1, 0, 2, 3).reshape(self.batch, -1, self.channels)


def _tiles(u: jax.Array, arrays: int, chains: int) -> _Tiles:
    """For `u [B,T,3,D]` and tiles of `arrays` arrays of the size of the states."""
    batch, time, _, width = u.shape
    itemsize = jnp.dtype(u.dtype).itemsize
    registers = pl.cdiv(width, _LANES)
    b = min(batch, _SUBLANES)
    groups = min(_SUBLANES // b, registers)
    lanes = _LANES * min(chains, pl.cdiv(registers, groups))
    rows = _SUBLANES * 4 // itemsize  # a tile of memory holds as many
    fit = _VMEM // (2 * arrays * b * groups * lanes * itemsize * rows)
    t = rows * max(1, min(fit, pl.cdiv(time, rows)))
    grid = (pl.cdiv(batch, b), pl.cdiv(width, groups * lanes), pl.cdiv(time, t))
    return _Tiles(b, groups, lanes, t, rows, grid)


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
      interpret: passed to the kernel, for tests without a TPU.
    """
    batch, time, _, width = u.shape
    n = cell.states
    tiles = _tiles(u, 3 + n, _CHAINS)
    resets = () if reset is None else (_reset_bits(reset, tiles),)

    def body(*refs):
        u_ref, weights_ref, *refs = refs
        initial_refs, refs = refs[:n], refs[n:]
        bits_ref, refs = (refs[0], refs[1:]) if resets else (None, refs)
        states_refs, final_refs = refs[:n], refs[n:]

        @pl.when(pl.program_id(2) == 0)
        def _():
            for final, start in zip(final_refs, initial_refs, strict=True):
                final[...] = start[...]

        rows_of_weights = _weights(weights_ref, tiles)
        first = pl.program_id(2) * tiles.time

        def chunk(i, state):
            rows = pl.ds(pl.multiple_of(i * tiles.rows, tiles.rows), tiles.rows)
            gates = [tiles.fold(u_ref[:, k, rows].astype(jnp.float32)) for k in range(3)]
            out = []
            for j in range(tiles.rows):
                before = state
                if bits_ref is not None:
                    cut = _bit(bits_ref[i], j, tiles)
                    before = tuple(jnp.where(cut, 0.0, x) for x in before)
                after = cell.step(before, tuple(g[j] for g in gates), rows_of_weights)
                if time % tiles.rows:  # rows after the end must not move the final state
                    inside = first + i * tiles.rows + j < time
                    after = tuple(
                        jnp.where(inside, x, y) for x, y in zip(after, state, strict=True)
                    )
                state = after
                out.append(state)
            for ref, x in zip(states_refs, zip(*out, strict=True), strict=True):
                ref[:, rows] = tiles.unfold(jnp.stack(x)).astype(ref.dtype)
            return state

        state = tuple(tiles.fold(ref[...][:, None])[0] for ref in final_refs)
        state = lax.fori_loop(0, _chunks(first, time, tiles), chunk, state)
        for ref, x in zip(final_refs, state, strict=True):
            ref[...] = tiles.unfold(x[None])[:, 0]

    b, d, t = tiles.batch, tiles.channels, tiles.time
    row = pl.BlockSpec((b, d), lambda i, j, k: (i, j))
    block = pl.BlockSpec((b, t, d), lambda i, j, k: (i, k, j))
    states = jax.ShapeDtypeStruct((batch, time, width), u.dtype)
    final = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    out = pl.pallas_call(
        body,
        out_shape=[states] * n + [final] * n,
        grid=tiles.grid,
        in_specs=[
            pl.BlockSpec((b, 3, t, d), lambda i, j, k: (i, 0, k, j)),
            pl.BlockSpec((cell.weights, d), lambda i, j, k: (0, j)),
            *[row] * n,
            *[_bits_spec(tiles, lambda k: k) for _ in resets],
        ],
        out_specs=[block] * n + [row] * n,
        compiler_params=_PARAMS,
        interpret=interpret or False,
        name=f"{cell.name}_forward",
    )(jnp.swapaxes(u, 1, 2), weights, *initial, *resets)
    return tuple(out[:n]), tuple(out[n:])


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
    n = cell.states
    given = [x.astype(u.dtype) for x in cotangents if x is not None]
    tiles = _tiles(u, 6 + n + len(given), _CHAINS)
    resets = () if reset is None else (_reset_bits(reset, tiles),)
    count = tiles.grid[2]

    def body(*refs):
        u_ref, weights_ref, *refs = refs
        initial_refs, end_refs, states_refs, border_refs = (refs[k * n : k * n + n] for k in range(4))
        given_refs, refs = refs[4 * n : 4 * n + len(given)], refs[4 * n + len(given) :]
        bits_ref, refs = (refs[0], refs[1:]) if resets else (None, refs)
        du_ref, dweights_ref, *carry_refs = refs
        tile = count - 1 - pl.program_id(2)
        first = tile * tiles.time

        @pl.when(pl.program_id(2) == 0)
        def _():
            dweights_ref[...] = jnp.zeros_like(dweights_ref)
            for ref, end in zip(carry_refs, end_refs, strict=True):
                ref[...] = end[...]

        rows_of_weights = _weights(weights_ref, tiles)

        def load(ref, rows):
            return tiles.fold(ref[:, rows].astype(jnp.float32))

        def chunk(step, carry):
            i = chunks - 1 - step
            rows = pl.ds(pl.multiple_of(i * tiles.rows, tiles.rows), tiles.rows)
            earlier = pl.multiple_of(jnp.maximum(i - 1, 0) * tiles.rows, tiles.rows)
            gates = [load(u_ref.at[:, k], rows) for k in range(3)]
            after = [load(ref, rows) for ref in states_refs]
            received = iter([load(ref, rows) for ref in given_refs])
            received = [None if x is None else next(received) for x in cotangents]
            # The state before the first row is the last of the rows before, which may lie in the
            # tile before, or be the initial state.
            start = []
            for ref, border, start_ref in zip(states_refs, border_refs, initial_refs, strict=True):
                inner = ref[:, pl.ds(earlier, tiles.rows)][:, -1:]
                x = jnp.where(i > 0, inner, border[:, -1:]).astype(jnp.float32)
                x = jnp.where((i > 0) | (tile > 0), x, start_ref[...][:, None])
                start.append(tiles.fold(x)[0])
            totals = [jnp.zeros_like(x) for x in rows_of_weights]
            du = []
            for j in reversed(range(tiles.rows)):
                before = tuple(x[j - 1] for x in after) if j else tuple(start)
                if bits_ref is not None:
                    cut = _bit(bits_ref[i], j, tiles)
                    before = tuple(jnp.where(cut, 0.0, x) for x in before)
                gate = tuple(g[j] for g in gates)
                jacobian, local = cell.local_gradients(before, gate, rows_of_weights)
                total = tuple(
                    c if r is None else c + r[j] for c, r in zip(carry, received, strict=True)
                )
                sent = apply(transposed(jacobian), total)
                row = apply(transposed(local), total)
                here = tuple(x[j] for x in after)
                grads = cell.weight_gradients(before, here, gate, rows_of_weights, row)
                if bits_ref is not None:
                    sent = tuple(jnp.where(cut, 0.0, x) for x in sent)
                if time % tiles.rows:  # rows after the end give nothing and pass the carry on
                    inside = first + i * tiles.rows + j < time
                    sent = tuple(jnp.where(inside, x, y) for x, y in zip(sent, carry, strict=True))
                    grads = tuple(jnp.where(inside, x, 0.0) for x in grads)
                totals = [x + g for x, g in zip(totals, grads, strict=True)]
                carry = sent
                du.append(row)
            for k, x in enumerate(zip(*reversed(du), strict=True)):
                du_ref[:, k, rows] = tiles.unfold(jnp.stack(x)).astype(du_ref.dtype)
            for k, x in enumerate(totals):
                dweights_ref[k] += x
            return carry

        chunks = _chunks(first, time, tiles)
        carry = tuple(tiles.fold(ref[...][:, None])[0] for ref in carry_refs)
        carry = lax.fori_loop(0, chunks, chunk, carry)
        for ref, x in zip(carry_refs, carry, strict=True):
            ref[...] = tiles.unfold(x[None])[:, 0]

    b, d, t = tiles.batch, tiles.channels, tiles.time
    row = pl.BlockSpec((b, d), lambda i, j, k: (i, j))
    block = pl.BlockSpec((b, t, d), lambda i, j, k: (i, count - 1 - k, j))
    steps = t // tiles.rows
    border = pl.BlockSpec(
        (b, tiles.rows, d), lambda i, j, k: (i, jnp.maximum((count - 1 - k) * steps - 1, 0), j)
    )
    gates = pl.BlockSpec((b, 3, t, d), lambda i, j, k: (i, 0, count - 1 - k, j))
    sums = (cell.weights, tiles.sublanes, tiles.width)
    final = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    du, dweights, *dinitial = pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((batch, 3, time, width), u.dtype),
            jax.ShapeDtypeStruct((*tiles.grid[:2], *sums), jnp.float32),
            *[final] * n,
        ],
        grid=tiles.grid,
        in_specs=[
            gates,
            pl.BlockSpec((cell.weights, d), lambda i, j, k: (0, j)),
            *[row] * (2 * n),
            *[block] * n,
            *[border] * n,
            *[block] * len(given),
            *[_bits_spec(tiles, lambda k: count - 1 - k) for _ in resets],
        ],
        out_specs=[
            gates,
            pl.BlockSpec((None, None, *sums), lambda i, j, k: (i, j, 0, 0, 0)),
            *[row] * n,
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
    # Rows beyond the batch hold anything: they are cut off before the sum.
    dweights = dweights.reshape(*tiles.grid[:2], -1, tiles.batch, tiles.groups, tiles.width)
    dweights = dweights.transpose(0, 3, 2, 1, 4, 5).reshape(-1, cell.weights, tiles.grid[1] * d)
    dweights = jnp.sum(dweights[:batch, :, :width], axis=0)
    return jnp.swapaxes(du, 1, 2), dweights, tuple(dinitial)


_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _weights(ref, tiles: _Tiles) -> Arrays:
    """The rows of the state matrix, one copy for every batch row."""
    rows = tiles.fold(jnp.broadcast_to(ref[...], (tiles.batch, *ref.shape)))
    return tuple(rows[k] for k in range(ref.shape[0]))


def _chunks(first, time: int, tiles: _Tiles):
    """Steps of the loop over a tile that begins at row `first`."""
    full = tiles.time // tiles.rows
    if time % tiles.time == 0:
        return full
    return jnp.minimum(full, pl.cdiv(time - first, tiles.rows))


def _reset_bits(reset: jax.Array, tiles: _Tiles) -> jax.Array:
    """`[B,T] bool -> [T / rows, B * groups, 128] int32`: bit j of a word is the reset at row j.

    A word for every lane costs 4 / rows of a state of 128 channels, and the kernel no shuffle.
    """
    batch, time = reset.shape
    reset = jnp.pad(reset, ((0, 0), (0, -time % tiles.rows)))
    bits = reset.reshape(batch, -1, tiles.rows).astype(jnp.int32) << jnp.arange(tiles.rows)
    words = jnp.repeat(jnp.sum(bits, axis=-1).T, tiles.groups, axis=1)
    return jnp.broadcast_to(words[..., None], (*words.shape, _LANES))


def _bits_spec(tiles: _Tiles, order) -> pl.BlockSpec:
    shape = (tiles.time // tiles.rows, tiles.sublanes, _LANES)
    return pl.BlockSpec(shape, lambda i, j, k: (order(k), i, 0))


def _bit(words: jax.Array, j: int, tiles: _Tiles) -> jax.Array:
    """Bit j of `words [sublanes, 128]` as bool `[sublanes, width]`."""
    bit = (words & (1 << j)) != 0
    return jnp.concatenate([bit] * (tiles.width // _LANES), axis=1)
