"""The two kernels of `fused_gpu.py`: one program is a segment of time of a tile of channels.

A program is one warpgroup with one or two channels a lane. Tiles of `ROWS` time steps of u (and,
backwards, of states and cotangents) arrive through shared memory several tiles ahead, the state
stays in registers, and results go straight to global memory. Lanes never exchange anything; they
wait for each other only once a tile, before its place in shared memory is filled again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.recurrent.cells import Cell, apply, compose, transposed

LANES = 128  # of a warpgroup
ROWS = 8  # time steps of a tile in shared memory
KEEP = 32  # numbers kept for a tile's mask of resets, of which ROWS count: a copy has 128 bytes
# Shared memory for the tiles of a program, so that three programs fit on a multiprocessor.
_TILE_BYTES = 72 * 1024


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      width: D, a multiple of `LANES`.
      segments, length: parts of time, and their steps, a multiple of `ROWS`.
      tile: channels of a program.
      dtype: of u and of the states.
      reset: whether there is a mask of resets.
    """

    batch: int
    time: int
    width: int
    segments: int
    length: int
    tile: int
    dtype: Any
    reset: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.segments, self.batch, self.width // self.tile

    @property
    def rows(self) -> int:
        """Tiles of time in a segment."""
        return self.length // ROWS

    @property
    def ragged(self) -> bool:
        """Whether the last segment is longer than what is left of time."""
        return self.time != self.segments * self.length


# Forms of the nonlinearities from the approximate 2^x and 1/sqrt(x) of the hardware, each right to
# about 2e-7. Its tanh is too coarse (2e-5 in the states), and an exact division too slow.


def _sigmoid(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -1.4426950408889634))
    return root * root


def _tanh(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -2.8853900817779268))
    return 2.0 * (root * root) - 1.0


def _fast(cell: Cell) -> Cell:
    return type(cell)(sigmoid=_sigmoid, tanh=_tanh)


class _Lanes:
    """Reads and fills vectors of one number a channel, in registers."""

    def __init__(self, shape: Shape):
        self._layout = plgpu.Layout.WG_STRIDED((shape.tile,), vec_size=shape.tile // LANES)
        self._tile = shape.tile

    def once(self, ref) -> jax.Array:
        """From global memory."""
        return plgpu.load(ref, (), layout=self._layout, optimized=False)

    def row(self, ref, *index: int) -> jax.Array:
        """From a tile in shared memory, as float32."""
        return plgpu.load(ref.at[index], (), layout=self._layout).astype(jnp.float32)

    def full(self, value: float) -> jax.Array:
        return plgpu.layout_cast(jnp.full((self._tile,), value, jnp.float32), self._layout)

    def everywhere(self, scalar: jax.Array) -> jax.Array:
        return lax.broadcast(scalar, (self._tile,))

    def where(self, scalar: jax.Array, a: Any, b: Any) -> Any:
        """Trees of vectors, chosen by one truth value."""
        pick = self.everywhere(scalar)
        return jax.tree.map(lambda x, y: jnp.where(pick, x, y), a, b)

    def zeros(self, like: Any) -> Any:
        return jax.tree.map(lambda _: self.full(0.0), like)

    def identity(self, n: int):
        return tuple(tuple(self.full(float(i == k)) for k in range(n)) for i in range(n))


def forward(
    cell: Cell, shape: Shape, *, burn_in: int, entries: bool, products: bool, interpret: Any
) -> Callable[..., tuple[jax.Array, ...]]:
    """The forward kernel.

    Args:
      burn_in: steps, a multiple of `ROWS`, that a segment runs before its own, from zero, to find
        its entry state; the first segment's is the initial state.
      entries: whether entry states are given instead.
      products: whether to give the product of the Jacobians of each segment.

    Returns:
      A function of `(u, weights [R,D], initial [N,B,D][, keep [B,T/ROWS,KEEP]][, entry [S,B,D]
      x N])` that gives `states [B,T,D] x N`, ends `[S,B,D] x N`, and with `products` also the
      entry states used, x N, and the products, x N x N. All but u and states are float32.
    """
    cell, n = _fast(cell), cell.states
    itemsize = jnp.dtype(shape.dtype).itemsize
    stages = max(2, min(6, _TILE_BYTES // (ROWS * shape.tile * 3 * itemsize)))

    def body(*refs):
        refs, lanes = list(refs), _Lanes(shape)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        (u_ref, weights_ref, initial_ref), keep_refs = take(3), take(int(shape.reset))
        given_refs, states_refs, end_refs = take(n if entries else 0), take(n), take(n)
        entry_refs, product_refs = take(n if products else 0), take(n * n if products else 0)
        s, b, d = (lax.axis_index(name) for name in ("segment", "batch", "tile"))
        mine = pl.ds(d * shape.tile, shape.tile)
        weights = tuple(lanes.once(weights_ref.at[i, mine]) for i in range(cell.weights))
        initial = tuple(lanes.once(initial_ref.at[k, b, mine]) for k in range(n))

        def march(first, rows: int, carry, outs):
            """Steps through `rows` tiles of time from tile `first` on."""

            def tile(index, u_tile, *rest):
                *keep_tiles, carry = rest
                for i in range(ROWS):
                    time = (first + index[0]) * ROWS + i
                    row = tuple(lanes.row(u_tile, i, k) for k in range(3))
                    held = carry
                    for keep in keep_tiles:
                        carry = lanes.where(keep[0, i] > 0.5, carry, lanes.zeros(carry))
                    state, *product = carry
                    if product:
                        after, jacobian = cell.linearize(state, row, weights)
                        carry = (after, compose(jacobian, product[0]))
                    else:
                        carry = (cell.step(state, row, weights),)
                    if shape.ragged:  # what follows the end must not move the final state
                        carry = lanes.where(time < shape.time, carry, held)
                    _write(
                        shape,
                        time,
                        [
                            (out.at[b, time, mine], x)
                            for out, x in zip(outs, carry[0], strict=False)
                        ],
                    )
                plgpu.commit_smem()
                return carry

            in_specs = [
                plgpu.BlockSpec((ROWS, 3, shape.tile), lambda i: (first + i, 0, d)),
                *(plgpu.BlockSpec((1, KEEP), lambda i: (first + i, 0)) for _ in keep_refs),
            ]
            return plgpu.emit_pipeline(
                tile,
                grid=(rows,),
                in_specs=in_specs,
                max_concurrent_steps=stages,
                init_carry=carry,
            )(u_ref.at[b], *(k.at[b] for k in keep_refs))

        first = s * shape.rows
        state = initial
        if entries:
            state = tuple(lanes.once(e.at[s, b, mine]) for e in given_refs)
        elif burn_in:
            zero = lanes.zeros(initial)
            before = jnp.maximum(first - burn_in // ROWS, 0)
            (burned,) = march(before, burn_in // ROWS, (zero,), [])
            state = lanes.where(s == 0, initial, burned)
        carry = (state, lanes.identity(n)) if products else (state,)
        for ref, x in zip(entry_refs, state, strict=False):
            ref[s, b, mine] = x
        carry = march(first, shape.rows, carry, states_refs)
        for ref, x in zip([*end_refs, *product_refs], jax.tree.leaves(carry), strict=True):
            ref[s, b, mine] = x

    states = jax.ShapeDtypeStruct((shape.batch, shape.time, shape.width), shape.dtype)
    border = jax.ShapeDtypeStruct((shape.segments, shape.batch, shape.width), jnp.float32)
    out_type = [states] * n + [border] * (n + (n + n * n if products else 0))
    return _kernel(body, out_type, shape, interpret)


def backward(
    cell: Cell, shape: Shape, given: tuple[bool, ...], *, write: bool, interpret: Any
) -> Callable[..., tuple[jax.Array, ...]]:
    """The backward kernel: reverse time, gates recomputed from u and the states.

    Args:
      given: which states have a cotangent.
      write: whether to give gradients, or only what a segment does to what enters it.

    Returns:
      A function of `(u, weights, initial[, keep], states x N, states again x N, cotangents,
      entry [S,B,D] x N)`: entries are the cotangents that later segments send to a segment's last
      state. It gives `(du [B,T,3,D], dweights [S,B,R,D], sent [S,B,D] x N)` if `write`, else
      `(sent x N, products x N x N)`; `sent` goes to the state before the segment.
    """
    cell, n = _fast(cell), cell.states
    itemsize = jnp.dtype(shape.dtype).itemsize
    arrays = 3 + n + sum(given)
    stages = max(2, min(6, _TILE_BYTES // (ROWS * shape.tile * arrays * itemsize)))

    def body(*refs):
        refs, lanes = list(refs), _Lanes(shape)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        (u_ref, weights_ref, initial_ref), keep_refs = take(3), take(int(shape.reset))
        states_refs, border_refs, given_refs = take(n), take(n), take(sum(given))
        entry_refs = take(n)
        du_refs, dweights_refs = take(int(write)), take(int(write))
        sent_refs, product_refs = take(n), take(0 if write else n * n)
        s, b, d = (lax.axis_index(name) for name in ("segment", "batch", "tile"))
        mine = pl.ds(d * shape.tile, shape.tile)
        weights = tuple(lanes.once(weights_ref.at[i, mine]) for i in range(cell.weights))
        initial = tuple(lanes.once(initial_ref.at[k, b, mine]) for k in range(n))
        arriving = tuple(lanes.once(e.at[s, b, mine]) for e in entry_refs)
        sums = lanes.zeros(weights)
        last = (s + 1) * shape.rows - 1

        def tile(index, u_tile, *rest):
            *tiles, (arriving, extra) = rest
            take = lambda k: [tiles.pop(0) for _ in range(k)]
            keep_tiles, state_tiles, border_tiles = take(int(shape.reset)), take(n), take(n)
            given_tiles = tiles
            first = (last - index[0]) * ROWS
            for i in reversed(range(ROWS)):
                row = tuple(lanes.row(u_tile, i, k) for k in range(3))
                if i:
                    before = tuple(lanes.row(x, i - 1) for x in state_tiles)
                else:
                    before = tuple(lanes.row(x, 0) for x in border_tiles)
                    before = lanes.where(first == 0, initial, before)
                keep = keep_tiles[0][0, i] > 0.5 if keep_tiles else None
                if keep is not None:
                    before = lanes.where(keep, before, lanes.zeros(before))
                jacobian, local = cell.local_gradients(before, row, weights)
                if keep is not None:
                    jacobian = lanes.where(keep, jacobian, lanes.zeros(jacobian))
                at = iter(given_tiles)
                total = tuple(
                    x + lanes.row(next(at), i) if has else x
                    for x, has in zip(arriving, given, strict=True)
                )
                sent = apply(transposed(jacobian), total)
                if write:
                    du = apply(transposed(local), total)
                    after = cell.step(before, row, weights)
                    grads = cell.weight_gradients(before, after, row, weights, du)
                    new = tuple(x + g for x, g in zip(extra, grads, strict=True))
                    rows = [(du_refs[0].at[b, first + i, k, mine], du[k]) for k in range(3)]
                    _write(shape, first + i, rows)
                else:
                    # Earlier times come later: the product of the segment grows to the right.
                    new = compose(extra, jacobian)
                if shape.ragged:  # steps after the end hand on what they were given
                    here = first + i < shape.time
                    sent, new = lanes.where(here, (sent, new), (arriving, extra))
                arriving, extra = sent, new
            plgpu.commit_smem()
            return arriving, extra

        at = lambda i: (last - i, d)
        # The state before a tile's first step: the last row of the tile before it.
        above = lambda i: (jnp.maximum((last - i) * ROWS - 1, 0), d)
        in_specs = [
            plgpu.BlockSpec((ROWS, 3, shape.tile), lambda i: (last - i, 0, d)),
            *(plgpu.BlockSpec((1, KEEP), lambda i: (last - i, 0)) for _ in keep_refs),
            *(plgpu.BlockSpec((ROWS, shape.tile), at) for _ in states_refs),
            *(plgpu.BlockSpec((1, shape.tile), above) for _ in border_refs),
            *(plgpu.BlockSpec((ROWS, shape.tile), at) for _ in given_refs),
        ]
        ins = (u_ref, *keep_refs, *states_refs, *border_refs, *given_refs)
        arriving, extra = plgpu.emit_pipeline(
            tile,
            grid=(shape.rows,),
            in_specs=in_specs,
            max_concurrent_steps=stages,
            init_carry=(arriving, sums if write else lanes.identity(n)),
        )(*(ref.at[b] for ref in ins))
        for ref, x in zip(sent_refs, arriving, strict=True):
            ref[s, b, mine] = x
        if write:
            for k, x in enumerate(extra):
                dweights_refs[0][s, b, k, mine] = x
        else:
            for ref, x in zip(product_refs, jax.tree.leaves(extra), strict=True):
                ref[s, b, mine] = x

    border = jax.ShapeDtypeStruct((shape.segments, shape.batch, shape.width), jnp.float32)
    if write:
        du = jax.ShapeDtypeStruct((shape.batch, shape.time, 3, shape.width), shape.dtype)
        sums = jax.ShapeDtypeStruct(
            (shape.segments, shape.batch, cell.weights, shape.width), jnp.float32
        )
        out_type = [du, sums, *[border] * n]
    else:
        out_type = [border] * (n + n * n)
    return _kernel(body, out_type, shape, interpret)


def _write(shape: Shape, time: jax.Array, rows: list[tuple[Any, jax.Array]]) -> None:
    """Stores vectors of one time step, unless it is past the end."""

    def store() -> None:
        for ref, x in rows:
            ref[...] = x.astype(shape.dtype)

    if shape.ragged:
        pl.when(time < shape.time)(store)
    else:
        store()


def _kernel(body, out_type, shape: Shape, interpret):
    options = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=shape.grid,
        grid_names=("segment", "batch", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )
