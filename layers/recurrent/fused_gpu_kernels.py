"""The two kernels of `fused_gpu.py`: one program is a segment of time of a tile of channels.

A program is one warpgroup with one or two channels a lane. Tiles of `rows` time steps of u (and,
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
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.recurrent.cells import Arrays, Cell, apply, block_of, compose, transposed
from hackle.layers.recurrent.fused_gpu_cells import fast
from hackle.layers.recurrent.shooting import TOLERANCE

LANES = 128  # of a warpgroup
KEEP = 32  # numbers kept for a tile's mask of resets, of which `rows` count: a copy has 128 bytes


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      width: D, a multiple of `LANES`.
      segments, length: parts of time, and their steps, a multiple of `rows`.
      rows, stages: time steps of a tile in shared memory, and how many are there or on their way.
      tile: channels of a program.
      reserved: bytes of shared memory that are kept unused, so that fewer programs run at once.
      dtype: of u and of the states.
      reset: whether there is a mask of resets.
    """

    batch: int
    time: int
    width: int
    segments: int
    length: int
    rows: int
    stages: int
    tile: int
    reserved: int
    dtype: Any
    reset: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.segments, self.batch, self.width // self.tile

    @property
    def tiles(self) -> int:
        """Of time, in a segment."""
        return self.length // self.rows

    @property
    def unrolled(self) -> int:
        """Time steps of a tile that are one piece of code: a whole tile of 16 is 6 % faster than
        half of it, but the several kernels of segments would take long to compile."""
        return self.rows if self.segments == 1 else self.rows // 2

    @property
    def ragged(self) -> bool:
        """Whether the last segment is longer than what is left of time."""
        return self.time != self.segments * self.length


# Where these kernels run, an index is no argument of it any more.
_load: Callable[..., jax.Array] = plgpu.load


class _Lanes:
    """Reads and fills vectors of one number a channel, in registers."""

    def __init__(self, shape: Shape):
        self._layout = plgpu.Layout.WG_STRIDED((shape.tile,), vec_size=shape.tile // LANES)
        self._tile = shape.tile

    def once(self, ref) -> jax.Array:
        """From global memory."""
        return _load(ref, layout=self._layout, optimized=False)

    def row(self, ref, *index) -> jax.Array:
        """From a tile in shared memory, as float32."""
        return _load(ref.at[index], layout=self._layout).astype(jnp.float32)

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
    cell: Cell,
    shape: Shape,
    role: str,
    *,
    burn_in: int = 0,
    products: bool = False,
    interpret: Any = None,
) -> Callable[..., tuple[jax.Array, ...]]:
    """A forward kernel; `Before` stands for `entry, end [S,B,D]` x N, products x N x N.

    Args:
      role: "first": all segments, each from the end of the `burn_in` steps before it, run from
        zero. "again": the segments whose entry moves when Newton's method corrects it, states in
        place. "last": one program for all of time, which runs if an entry would still move. A
        first with one segment starts from the initial state.
      products: whether to give d(end) / d(entry); "again" always does.

    Returns:
      A function of `(u, weights [R,D], initial [B,D] x N[, keep [B,T/rows,KEEP]])`, and but for
      "first" `(*Before, *states Refs)`. It gives, "first": `states [B,T,D]` x N and `Before` (of
      which products if asked); "again": `Before`; "last": final `[1,B,D]` x N and, if asked, the
      product of all. All but u and states are float32.
    """
    cell, n = fast(cell, shape.dtype), cell.states
    products = products or role == "again"
    grid = (1, *shape.grid[1:]) if role == "last" else shape.grid

    def body(*refs):
        left, lanes = list(refs), _Lanes(shape)
        take = lambda k: [left.pop(0) for _ in range(k)]
        u_ref, weights_ref, *initial_refs = take(2 + n)
        keep_refs = take(int(shape.reset))
        if role != "first":
            old_entry_refs, old_end_refs, old_product_refs = take(n), take(n), take(n * n)
        states_refs = take(n)
        entry_refs = [] if role == "last" else take(n)
        end_refs, product_refs = take(n), take(n * n if products else 0)
        s, b, d = (lax.axis_index(name) for name in ("segment", "batch", "tile"))
        mine = pl.ds(d * shape.tile, shape.tile)
        weights = tuple(lanes.once(weights_ref.at[i, mine]) for i in range(cell.weights))
        initial = tuple(lanes.once(ref.at[b, mine]) for ref in initial_refs)

        def march(first, tiles: int, carry, outs):
            """Steps through `tiles` tiles of time from tile `first` on."""

            def tile(index, u_tile, *rest):
                *keep_tiles, carry = rest

                def step(i, carry):
                    time = (first + index[0]) * shape.rows + i
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
                    places = [out.at[b, time, mine] for out in outs]
                    _write(shape, time, places, carry[0])
                    return carry

                return _loop(shape, step, carry, interpret)

            in_specs = [
                plgpu.BlockSpec((shape.rows, 3, shape.tile), lambda i: (first + i, 0, d)),
                *(plgpu.BlockSpec((1, KEEP), lambda i: (first + i, 0)) for _ in keep_refs),
            ]
            return plgpu.emit_pipeline(
                tile,
                grid=(tiles,),
                in_specs=in_specs,
                max_concurrent_steps=shape.stages,
                init_carry=carry,
            )(u_ref.at[b], *(k.at[b] for k in keep_refs))

        def run(state, first, tiles: int) -> None:
            """Marches from a state that is right, and stores what is asked for."""
            carry = (state, lanes.identity(n)) if products else (state,)
            carry = march(first, tiles, carry, states_refs)
            store([*entry_refs, *end_refs, *product_refs], ([state] if entry_refs else [], carry))

        def store(places, values) -> None:
            for ref, x in zip(places, jax.tree.leaves(values), strict=True):
                ref[s, b, mine] = x

        def old(refs, j):
            return tuple(lanes.once(ref.at[j, b, mine]) for ref in refs)

        def corrected(carry, j):
            """From the entry of segment j to that of the next, by Newton's method; see
            `shooting.py`. Notes how much an entry moves on the way."""
            entry, moved, *total = carry
            was, end, product = (
                old(old_entry_refs, j),
                old(old_end_refs, j),
                block_of(old(old_product_refs, j), n),
            )
            moved = _moved(lanes, entry, was, moved)
            move = tuple(e - w for e, w in zip(entry, was, strict=True))
            new = tuple(e + m for e, m in zip(end, apply(product, move), strict=True))
            bound = lanes.full(1.0)
            for x in initial:
                bound = jnp.maximum(bound, jnp.abs(x))
            new = tuple(jnp.minimum(jnp.maximum(x, -bound), bound) for x in new)
            # Where a product overflowed, the end itself.
            new = tuple(jnp.where(x - x == 0.0, x, e) for x, e in zip(new, end, strict=True))
            return (new, moved, *(compose(product, t) for t in total))

        start = (initial, lanes.full(0.0))
        if role == "first":
            state, first = initial, s * shape.tiles
            if burn_in:
                before = jnp.maximum(first - burn_in // shape.rows, 0)
                (burned,) = march(before, burn_in // shape.rows, (lanes.zeros(initial),), [])
                state = lanes.where(s == 0, initial, burned)
            run(state, first, shape.tiles)
        elif role == "again":
            entry, _ = lax.fori_loop(0, s, lambda j, carry: corrected(carry, j), start)
            was = old(old_entry_refs, s)
            moved = jnp.max(_moved(lanes, entry, was, lanes.full(0.0))) > 0.5
            pl.when(moved)(lambda: run(entry, s * shape.tiles, shape.tiles))

            @pl.when(jnp.logical_not(moved))
            def _():
                kept = old([*old_entry_refs, *old_end_refs, *old_product_refs], s)
                store([*entry_refs, *end_refs, *product_refs], kept)
        else:
            carry = (*start, lanes.identity(n)) if products else start
            step = lambda j, carry: corrected(carry, j)
            _, moved, *total = lax.fori_loop(0, shape.segments, step, carry)
            moved = jnp.max(moved) > 0.5
            pl.when(moved)(lambda: run(initial, 0, shape.segments * shape.tiles))

            @pl.when(jnp.logical_not(moved))
            def _():
                store([*end_refs, *product_refs], (old(old_end_refs, shape.segments - 1), total))

    states = jax.ShapeDtypeStruct((shape.batch, shape.time, shape.width), shape.dtype)
    border = jax.ShapeDtypeStruct((grid[0], shape.batch, shape.width), jnp.float32)
    count = n + (0 if role == "last" else n) + (n * n if products else 0)
    out_type = [*([states] * n if role == "first" else []), *[border] * count]
    return _kernel(body, out_type, grid, shape.reserved, interpret)


def _moved(lanes: _Lanes, entry: Arrays, was: Arrays, before: jax.Array) -> jax.Array:
    """1 in the lanes where two states are further apart than the tolerance, or `before` was 1.

    Two that are not numbers agree: what is not a number spoils all that follows, as step by step.
    """
    no, yes = lanes.full(0.0), lanes.full(1.0)
    for e, w in zip(entry, was, strict=True):
        apart = jnp.where(jnp.abs(e - w) <= TOLERANCE, no, yes)
        apart = jnp.where(e == e, apart, jnp.where(w == w, apart, no))
        before = jnp.maximum(before, apart)
    return before


def backward(
    cell: Cell, shape: Shape, given: tuple[bool, ...], *, write: bool, interpret: Any
) -> Callable[..., tuple[jax.Array, ...]]:
    """The backward kernel: reverse time, gates recomputed from u and the states.

    Args:
      given: which states have a cotangent.
      write: whether to give gradients, or only what a segment does to what enters it.

    Returns:
      A function of `(u, weights, initial x N[, keep], states x N, states again x N, cotangents,
      entry [S,B,D] x N)`: entries are the cotangents that later segments send to a segment's last
      state. It gives `(du [B,T,3,D], dweights [S,B,R,D], sent [S,B,D] x N)` if `write`, else
      `(sent x N, products x N x N)`; `sent` goes to the state before the segment.
    """
    cell, n = fast(cell, shape.dtype), cell.states

    def body(*refs):
        left, lanes = list(refs), _Lanes(shape)
        take = lambda k: [left.pop(0) for _ in range(k)]
        u_ref, weights_ref, *initial_refs = take(2 + n)
        keep_refs = take(int(shape.reset))
        states_refs, border_refs, given_refs = take(n), take(n), take(sum(given))
        entry_refs = take(n)
        du_refs, dweights_refs = take(int(write)), take(int(write))
        sent_refs, product_refs = take(n), take(0 if write else n * n)
        s, b, d = (lax.axis_index(name) for name in ("segment", "batch", "tile"))
        mine = pl.ds(d * shape.tile, shape.tile)
        weights = tuple(lanes.once(weights_ref.at[i, mine]) for i in range(cell.weights))
        initial = tuple(lanes.once(ref.at[b, mine]) for ref in initial_refs)
        arriving = tuple(lanes.once(e.at[s, b, mine]) for e in entry_refs)
        sums = lanes.zeros(weights)
        last = (s + 1) * shape.tiles - 1

        def tile(index, u_tile, *rest):
            *tiles, (arriving, extra) = rest
            take = lambda k: [tiles.pop(0) for _ in range(k)]
            keep_tiles, state_tiles, border_tiles = take(int(shape.reset)), take(n), take(n)
            given_tiles = tiles
            first = (last - index[0]) * shape.rows

            def step(back, carry):
                arriving, extra = carry
                i = shape.rows - 1 - back
                row = tuple(lanes.row(u_tile, i, k) for k in range(3))
                before = tuple(lanes.row(x, jnp.maximum(i - 1, 0)) for x in state_tiles)
                above = tuple(lanes.row(x, 0) for x in border_tiles)
                before = lanes.where(i == 0, lanes.where(first == 0, initial, above), before)
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
                    places = [du_refs[0].at[b, first + i, k, mine] for k in range(3)]
                    _write(shape, first + i, places, du)
                else:
                    # Earlier times come later: the product of the segment grows to the right.
                    new = compose(extra, jacobian)
                if shape.ragged:  # steps after the end hand on what they were given
                    here = first + i < shape.time
                    sent, new = lanes.where(here, (sent, new), (arriving, extra))
                return sent, new

            return _loop(shape, step, (arriving, extra), interpret)

        at = lambda i: (last - i, d)
        # The state before a tile's first step: the last row of the tile before it.
        above = lambda i: (jnp.maximum((last - i) * shape.rows - 1, 0), d)
        in_specs = [
            plgpu.BlockSpec((shape.rows, 3, shape.tile), lambda i: (last - i, 0, d)),
            *(plgpu.BlockSpec((1, KEEP), lambda i: (last - i, 0)) for _ in keep_refs),
            *(plgpu.BlockSpec((shape.rows, shape.tile), at) for _ in states_refs),
            *(plgpu.BlockSpec((1, shape.tile), above) for _ in border_refs),
            *(plgpu.BlockSpec((shape.rows, shape.tile), at) for _ in given_refs),
        ]
        ins = (u_ref, *keep_refs, *states_refs, *border_refs, *given_refs)
        arriving, extra = plgpu.emit_pipeline(
            tile,
            grid=(shape.tiles,),
            in_specs=in_specs,
            max_concurrent_steps=shape.stages,
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
    return _kernel(body, out_type, shape.grid, shape.reserved, interpret)


def _loop(shape: Shape, step: Callable[[Any, Any], Any], carry: Any, interpret: Any) -> Any:
    """The steps of a tile, in order; then its place may be filled again."""

    def some(block, carry):
        for k in range(shape.unrolled):
            carry = step(block * shape.unrolled + k, carry)
        return carry

    carry = lax.fori_loop(0, shape.rows // shape.unrolled, some, carry)
    if interpret is None:  # there lanes are one, and `inline_mgpu` is not interpreted
        _meet()
    return carry


@plgpu.inline_mgpu()
def _meet(_) -> None:
    """Lanes wait for each other. A tile is only read, so that its place needs no fence."""
    mgpu.warpgroup_barrier()


def _write(shape: Shape, time: jax.Array, places: list[Any], values: Arrays) -> None:
    """Stores vectors of one time step, unless it is past the end."""

    def store() -> None:
        for ref, x in zip(places, values, strict=False):
            ref[...] = x.astype(shape.dtype)

    if shape.ragged:
        pl.when(time < shape.time)(store)
    else:
        store()


def _kernel(body, out_type, grid, reserved: int, interpret):
    options = {} if interpret is None else {"interpret": interpret}
    if reserved:  # comes last among the arguments of `body`, which does not look at it
        options["scratch_types"] = [plgpu.SMEM((reserved,), jnp.int8)]
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("segment", "batch", "tile"),
        # Every layout is given here; to infer them would take ten times as long as all else.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **options,
    )
