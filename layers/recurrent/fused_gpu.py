"""The recurrence on Hopper GPUs (Pallas, Mosaic GPU): states and gates never leave the chip.

A program is one batch row, one tile of channels (a warpgroup, a lane or two per channel) and one
segment of time; it steps through its rows, which arrive through shared memory, with the state in
registers. Bytes per (batch, time, channel), s = bytes a number: forward GRU 4s, LSTM 5s; backward
8s and 9s. A step is a chain of four special functions, about as long whatever the batch, so:

- where B x D fills the chip, time is one segment;
- where it does not, time is cut into segments that run at once (multiple shooting, arXiv
  2510.21450 and `shooting.py`). Forward: a segment finds its entry state by running the
  `_BURN_IN` steps before it from zero, and is then exact given that state. Entries are checked
  against the ends before them, and corrected by Newton on the entries until all agree within
  `_TOLERANCE`; a contracting cell needs no correction. Backward: linear, so one pass gives every
  segment's end and Jacobian product, and a second one the gradients; nothing is iterated.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hackle.layers.recurrent.cells import Arrays, Cell, apply, compose, transposed

_LANES = 128  # of a warpgroup
_ROWS = 8  # time steps of a tile in shared memory
_BURN_IN = 64  # steps, a multiple of _ROWS
_FULL = 32 * 1024  # channels times batch that fill the chip
_SHORTEST = 64  # steps of a segment worth a program
_TOLERANCE = 1e-6  # of states at segment borders, whose size is at most 1


def unsupported(u: jax.Array) -> str | None:
    """Why the kernels cannot run on the default device, or None if they can."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"the fused GPU kernel needs an NVIDIA GPU, the default device is {device}"
    if float(device.compute_capability) != 9.0:
        return (
            "the fused GPU kernel needs compute capability 9.0 (Hopper), "
            f"{device.device_kind} has {device.compute_capability}"
        )
    if u.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused GPU kernel stores float32 or bfloat16, got {u.dtype}"
    return None


# Forms with the hardware's approximate 2^x and 1/sqrt(x), each exact to about 1e-7; the hardware's
# tanh and division are respectively too coarse and too slow.


def _sigmoid(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -1.4426950408889634))
    return root * root


def _tanh(x: jax.Array) -> jax.Array:
    return 2.0 * _sigmoid(2.0 * x) - 1.0


def _fast(cell: Cell) -> Cell:
    return type(cell)(sigmoid=_sigmoid, tanh=_tanh)


def solve(
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    *,
    segments: int | None = None,
    interpret=None,
) -> tuple[Arrays, Arrays]:
    """States `[B,T,D]` in u's dtype and final states `[B,D]` float32; see `scan.solve`.

    Args:
      segments: parts of time that run at once; None chooses from the shape.
      interpret: passed to the kernel, for tests without a GPU.
    """
    batch, time, _, width = u.shape
    u, weights, initial, keep = _padded(u, weights, initial, reset)
    length = _segment_length(batch, u.shape[-1], time, segments)
    run = functools.partial(
        _forward, cell, batch, time, u.shape[-1], u.dtype, length, keep is not None, interpret
    )
    arrays = (u, weights, jnp.stack(initial), *(() if keep is None else (keep,)))
    count = -(-time // length)
    if count == 1:
        states, ends = run(None)(*arrays)
        return _cut(states, width), tuple(e[0, :, :width] for e in ends)
    first = run("burn in")(*arrays)
    again = run("given")

    def disagree(carry):
        _, ends, entries, _, tries = carry
        agree = [
            jnp.all((jnp.abs(end[:-1] - entry[1:]) <= _TOLERANCE) | jnp.isnan(entry[1:]))
            for end, entry in zip(ends, entries, strict=True)
        ]
        # After as many corrections as segments all are exact, by causality.
        return ~functools.reduce(jnp.logical_and, agree) & (tries < count)

    def correct(carry):
        _, ends, entries, products, tries = carry
        entries = _corrected(cell, entries, ends, products)
        states, ends, _, products = again(*arrays, *entries)
        return states, ends, entries, products, tries + 1

    states, ends, *_ = lax.while_loop(disagree, correct, (*first, 0))
    return _cut(states, width), tuple(e[-1, :, :width] for e in ends)


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
    segments: int | None = None,
    interpret=None,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """Gradients `(du [B,T,3,D], dweights [R,D], dinitial [B,D]s)`; see `scan.adjoint`."""
    batch, time, _, width = u.shape
    u, weights, initial, keep = _padded(u, weights, initial, reset)
    padded = u.shape[-1]

    def wide(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, padded - width),))

    states = tuple(wide(x) for x in states)
    given = tuple(wide(x.astype(u.dtype)) for x in cotangents if x is not None)
    final = tuple(wide(x.astype(jnp.float32)) for x in final_cotangents)
    length = _segment_length(batch, padded, time, segments)
    count = -(-time // length)
    run = functools.partial(
        _backward,
        cell,
        batch,
        time,
        padded,
        u.dtype,
        length,
        keep is not None,
        tuple(x is not None for x in cotangents),
        interpret,
    )
    arrays = (u, weights, jnp.stack(initial), *(() if keep is None else (keep,)), *states, *given)
    # The entry of a segment is the cotangent that the later ones send to its last state.
    entries = tuple(jnp.zeros((count, batch, padded), jnp.float32).at[-1].set(f) for f in final)
    if count > 1:
        ends, products = run(False)(*arrays, *entries)
        for s in range(count - 2, -1, -1):
            after = tuple(e[s + 1] for e in ends)
            if s + 2 < count:  # the last segment's entry was right already
                sent = tuple(x[s + 1] for x in entries)
                block = _block(cell, [p[s + 1] for p in products])
                moved = apply(transposed(block), sent)
                after = tuple(a + m for a, m in zip(after, moved, strict=True))
            entries = tuple(x.at[s].set(a) for x, a in zip(entries, after, strict=True))
    du, dweights, ends = run(True)(*arrays, *entries)
    return (
        du[..., :width],
        jnp.sum(dweights, axis=(0, 1))[:, :width],
        tuple(e[0, :, :width] for e in ends),
    )


def _padded(u, weights, initial, reset):
    """Channels to a multiple of the lanes; resets as a float mask [B, T'] that keeps the state."""
    extra = -u.shape[-1] % _LANES
    if extra:
        u = jnp.pad(u, ((0, 0), (0, 0), (0, 0), (0, extra)))
        weights = jnp.pad(weights, ((0, 0), (0, extra)))
        initial = tuple(jnp.pad(x, ((0, 0), (0, extra))) for x in initial)
    keep = None
    if reset is not None:
        # Rows of 16 bytes, as the copy engine wants them.
        keep = jnp.pad((~reset).astype(jnp.float32), ((0, 0), (0, -u.shape[1] % 4)))
    return u, weights.astype(jnp.float32), tuple(x.astype(jnp.float32) for x in initial), keep


def _cut(states: Arrays, width: int) -> Arrays:
    return tuple(x if x.shape[-1] == width else x[..., :width] for x in states)


def _segment_length(batch: int, width: int, time: int, segments: int | None) -> int:
    """Steps of a segment, a multiple of _ROWS."""
    if segments is None:
        segments = max(1, min(_FULL // (batch * width), time // _SHORTEST))
    length = -(-time // max(1, segments))
    return -(-length // _ROWS) * _ROWS


def _block(cell: Cell, flat):
    n = cell.states
    return tuple(tuple(flat[i * n + k] for k in range(n)) for i in range(n))


def _corrected(cell: Cell, entries: Arrays, ends: Arrays, products: Arrays) -> Arrays:
    """Newton on the entry states: `e_(s+1) = end_s + P_s (e_s - old e_s)`, arrays [S,B,D].

    States of both cells lie in [-1, 1], so entries are projected there.
    """
    count = entries[0].shape[0]
    new = [tuple(x[0] for x in entries)]
    for s in range(count - 1):
        moved = [x - old[s] for x, old in zip(new[s], entries, strict=True)]
        block = _block(cell, [p[s] for p in products])
        state = tuple(
            end[s] + sum(p * m for p, m in zip(row, moved, strict=True))
            for end, row in zip(ends, block, strict=True)
        )
        new.append(tuple(jnp.clip(x, -1, 1) for x in state))
    return tuple(jnp.stack(x) for x in zip(*new, strict=True))


def _tile(batch: int, width: int, segments: int) -> int:
    """Channels of a program: two a lane where there are programs enough."""
    wide = width % (2 * _LANES) == 0 and batch * width * segments >= 2 * _FULL
    return 2 * _LANES if wide else _LANES


def _kernel(body, out_type, grid, interpret):
    options = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=("segment", "batch", "tile"),
        # A thread reads and writes its own lanes alone, so no barrier is needed between them.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
    )


def _stages(tile: int, arrays: int, itemsize: int) -> int:
    """Tiles in flight: as many as leave room for two or three programs on a multiprocessor."""
    return max(2, min(6, 72 * 1024 // (_ROWS * tile * arrays * itemsize)))


def _forward(cell, batch, time, width, dtype, length, has_reset, interpret, entry):
    """The forward kernel. `entry`: None (one segment), "burn in", or "given" (more arguments).

    Returns a function of `(u, weights, initial[, keep][, *entries])` that gives
    `(states, ends)`, or `(states, ends, entries, products)` with more than one segment.
    """
    cell, n = _fast(cell), cell.states
    count = -(-time // length)
    tile = _tile(batch, width, count)
    stages = _stages(tile, 3 + n, jnp.dtype(dtype).itemsize)
    ragged = time % length != 0
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=tile // _LANES)

    def body(*refs):
        refs = list(refs)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        u_ref, weights_ref, initial_ref = take(3)
        keep_ref = take(1) if has_reset else []
        entry_refs = take(n) if entry == "given" else []
        states_refs, end_refs = take(n), take(n)
        kept_entry_refs, product_refs = (take(n), take(n * n)) if entry else ([], [])
        s, b, d = (lax.axis_index(name) for name in ("segment", "batch", "tile"))
        lanes = pl.ds(d * tile, tile)

        def vector(ref):
            return plgpu.load(ref, layout=layout, optimized=False)

        def constant(value):
            return plgpu.layout_cast(jnp.full((tile,), value, jnp.float32), layout)

        def everywhere(scalar):
            return lax.broadcast(scalar, (tile,))

        weights = tuple(vector(weights_ref.at[i, lanes]) for i in range(cell.weights))
        initial = tuple(vector(initial_ref.at[k, b, lanes]) for k in range(n))

        def march(first_row, rows, state, product, outs):
            """Steps through `rows` rows; returns the last state and the product of Jacobians."""

            def block(indices, u_block, *rest):
                *blocks, (state, product) = rest
                keep_block = blocks.pop(0) if has_reset else None
                row0 = (first_row + indices[0]) * _ROWS
                for i in range(_ROWS):
                    row = tuple(
                        plgpu.load(u_block.at[i, k], layout=layout).astype(jnp.float32)
                        for k in range(3)
                    )
                    before = state
                    if keep_block is not None:
                        kept = everywhere(keep_block[i]) > 0.5
                        state = tuple(jnp.where(kept, x, 0.0) for x in state)
                        product = tuple(jnp.where(kept, x, 0.0) for x in product)
                    if product:
                        after, jacobian = cell.linearize(state, row, weights)
                        product = _matmul(jacobian, _block(cell, product))
                    else:
                        after = cell.step(state, row, weights)
                    if ragged:  # rows after the end must not move the final state
                        inside = everywhere(row0 + i) < time
                        after = tuple(
                            jnp.where(inside, x, y) for x, y in zip(after, before, strict=True)
                        )
                    state = after
                    for out, x in zip(blocks, state, strict=False):
                        out[i] = x.astype(dtype)
                return state, product

            index = lambda i: (first_row + i, d)
            in_specs = [
                plgpu.BlockSpec((_ROWS, 3, tile), lambda i: (first_row + i, 0, d)),
                *[plgpu.BlockSpec((_ROWS,), lambda i: (first_row + i,)) for _ in keep_ref],
            ]
            out_specs = [plgpu.BlockSpec((_ROWS, tile), index) for _ in outs]
            return plgpu.emit_pipeline(
                block,
                grid=(rows,),
                in_specs=in_specs,
                out_specs=out_specs,
                max_concurrent_steps=stages,
                init_carry=(state, product),
            )(u_ref.at[b], *(k.at[b] for k in keep_ref), *(o.at[b] for o in outs))

        row0 = s * (length // _ROWS)
        state, product = initial, ()
        if entry == "burn in":
            zero = tuple(constant(0.0) for _ in range(n))
            before = jnp.maximum(row0 - _BURN_IN // _ROWS, 0)
            burned, _ = march(before, _BURN_IN // _ROWS, zero, (), [])
            state = tuple(
                jnp.where(everywhere(s) == 0, x, y) for x, y in zip(initial, burned, strict=True)
            )
        elif entry == "given":
            state = tuple(vector(e.at[s, b, lanes]) for e in entry_refs)
        if entry:
            for ref, x in zip(kept_entry_refs, state, strict=True):
                ref[s, b, lanes] = x
            product = tuple(constant(float(i == k)) for i in range(n) for k in range(n))
        state, product = march(row0, length // _ROWS, state, product, states_refs)
        for ref, x in zip([*end_refs, *product_refs], [*state, *product], strict=True):
            ref[s, b, lanes] = x

    states = jax.ShapeDtypeStruct((batch, time, width), dtype)
    border = jax.ShapeDtypeStruct((count, batch, width), jnp.float32)
    out_type = [states] * n + [border] * n
    if entry:
        out_type += [border] * (n + n * n)
    kernel = _kernel(body, out_type, (count, batch, width // tile), interpret)

    def run(*arrays):
        out = kernel(*arrays)
        parts = (tuple(out[:n]), tuple(out[n : 2 * n]))
        return (*parts, tuple(out[2 * n : 3 * n]), tuple(out[3 * n :])) if entry else parts

    return run


def _matmul(a, b) -> Arrays:
    """`a @ b` of two blocks, flat."""
    n = len(a)
    return tuple(
        functools.reduce(jnp.add, (a[i][j] * b[j][k] for j in range(n)))
        for i in range(n)
        for k in range(n)
    )


def _backward(cell, batch, time, width, dtype, length, has_reset, given, interpret, write):
    """The backward kernel: reverse time, gates recomputed.

    Returns a function of `(u, weights, initial[, keep], *states, *cotangents, *entries)`; it
    gives `(du, dweights [S,B,R,D], ends)` if `write`, else `(ends, products)` of all segments.
    """
    cell, n = _fast(cell), cell.states
    count = -(-time // length)
    tile = _tile(batch, width, count)
    stages = _stages(tile, 6 + n + sum(given), jnp.dtype(dtype).itemsize)
    layout = plgpu.Layout.WG_STRIDED((tile,), vec_size=tile // _LANES)
    rows = length // _ROWS
    ragged = time % length != 0

    def body(*refs):
        refs = list(refs)
        take = lambda k: [refs.pop(0) for _ in range(k)]
        u_ref, weights_ref, initial_ref = take(3)
        keep_ref = take(1) if has_reset else []
        states_refs, given_refs, entry_refs = take(n), take(sum(given)), take(n)
        du_refs, dweights_refs = (take(1), take(1)) if write else ([], [])
        end_refs = take(n)
        product_refs = [] if write else take(n * n)
        s, b, d = (lax.axis_index(name) for name in ("segment", "batch", "tile"))
        lanes = pl.ds(d * tile, tile)

        def vector(ref):
            return plgpu.load(ref, layout=layout, optimized=False)

        def constant(value):
            return plgpu.layout_cast(jnp.full((tile,), value, jnp.float32), layout)

        def everywhere(scalar):
            return lax.broadcast(scalar, (tile,))

        def row_of(ref, *index):
            return plgpu.load(ref.at[index], layout=layout).astype(jnp.float32)

        weights = tuple(vector(weights_ref.at[i, lanes]) for i in range(cell.weights))
        initial = tuple(vector(initial_ref.at[k, b, lanes]) for k in range(n))
        carry = tuple(vector(e.at[s, b, lanes]) for e in entry_refs)
        extra = (
            tuple(constant(0.0) for _ in range(cell.weights))
            if write
            else tuple(constant(float(i == k)) for i in range(n) for k in range(n))
        )
        last = (s + 1) * rows - 1

        def block(indices, u_block, *rest):
            *blocks, (carry, extra) = rest
            keep_block = blocks.pop(0) if has_reset else None
            state_blocks, blocks = blocks[:n], blocks[n:]
            given_blocks, outs = blocks[: sum(given)], blocks[sum(given) :]
            row0 = (last - indices[0]) * _ROWS
            for i in reversed(range(_ROWS)):
                row = tuple(row_of(u_block, i, k) for k in range(3))
                before = tuple(row_of(x, i) for x in state_blocks)
                if i == 0:
                    before = tuple(
                        jnp.where(everywhere(row0) == 0, x, y)
                        for x, y in zip(initial, before, strict=True)
                    )
                if keep_block is not None:
                    kept = everywhere(keep_block[i]) > 0.5
                    before = tuple(jnp.where(kept, x, 0.0) for x in before)
                jacobian, local = cell.local_gradients(before, row, weights)
                # Rows after the end have zero cotangents, but must hand the entry on.
                inside = everywhere(row0 + i) < time
                at = iter(given_blocks)
                total = tuple(
                    x + row_of(next(at), i) if has else x
                    for x, has in zip(carry, given, strict=True)
                )
                sent = apply(transposed(jacobian), total)
                if keep_block is not None:
                    sent = tuple(jnp.where(kept, x, 0.0) for x in sent)
                if write:
                    du = apply(transposed(local), total)
                    after = cell.step(before, row, weights)
                    grads = cell.weight_gradients(before, after, row, weights, du)
                    if ragged:
                        grads = tuple(jnp.where(inside, x, 0.0) for x in grads)
                    extra = tuple(x + g for x, g in zip(extra, grads, strict=True))
                    for k in range(3):
                        outs[0][i, k] = du[k].astype(dtype)
                else:
                    # Segments of an earlier time come later: P = (J_first ... J_last)^T, as rows.
                    product = _matmul(_block(cell, extra), jacobian)
                    if keep_block is not None:
                        product = tuple(jnp.where(kept, x, 0.0) for x in product)
                    if ragged:
                        product = tuple(
                            jnp.where(inside, x, y) for x, y in zip(product, extra, strict=True)
                        )
                    extra = product
                if ragged:
                    sent = tuple(jnp.where(inside, x, y) for x, y in zip(sent, carry, strict=True))
                carry = sent
            return carry, extra

        shifted = lambda i: ((last - i) * _ROWS - 1, d * tile)
        in_specs = [
            plgpu.BlockSpec((_ROWS, 3, tile), lambda i: (last - i, 0, d)),
            *[plgpu.BlockSpec((_ROWS,), lambda i: (last - i,)) for _ in keep_ref],
            *[plgpu.BlockSpec((pl.Element(_ROWS), pl.Element(tile)), shifted) for _ in range(n)],
            *[plgpu.BlockSpec((_ROWS, tile), lambda i: (last - i, d)) for _ in given_refs],
        ]
        out_specs = [plgpu.BlockSpec((_ROWS, 3, tile), lambda i: (last - i, 0, d)) for _ in du_refs]
        ins = [u_ref, *keep_ref, *states_refs, *given_refs, *du_refs]
        carry, extra = plgpu.emit_pipeline(
            block,
            grid=(rows,),
            in_specs=in_specs,
            out_specs=out_specs,
            max_concurrent_steps=stages,
            init_carry=(carry, extra),
        )(*(ref.at[b] for ref in ins))
        for ref, x in zip(end_refs, carry, strict=True):
            ref[s, b, lanes] = x
        if write:
            for k, x in enumerate(extra):
                dweights_refs[0][s, b, k, lanes] = x
        else:
            for ref, x in zip(product_refs, extra, strict=True):
                ref[s, b, lanes] = x

    border = jax.ShapeDtypeStruct((count, batch, width), jnp.float32)
    if write:
        sums = jax.ShapeDtypeStruct((count, batch, cell.weights, width), jnp.float32)
        out_type = [jax.ShapeDtypeStruct((batch, time, 3, width), dtype), sums] + [border] * n
    else:
        out_type = [border] * (n + n * n)
    kernel = _kernel(body, out_type, (count, batch, width // tile), interpret)

    def run(*arrays):
        out = kernel(*arrays)
        if write:
            return out[0], out[1], tuple(out[2:])
        return tuple(out[:n]), tuple(out[n:])

    return run
