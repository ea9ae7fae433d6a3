"""A recurrence over a mesh: rows and channels lie apart for free, time by multiple shooting.

Each device runs its part of time by a method for one device. Forwards, it guesses its entry state
from the last rows of its left neighbour, and `shooting.shoot` corrects the entries until they
agree with the ends before them: one pass where the recurrence forgets within those rows, two or
three else. Backwards, all is linear: one run from zero says what each part adds to the cotangent
that leaves it, a recurrence over parts gives what arrives at each, and a second run the gradients.
Only border states and a few rows of u travel, whatever T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from hackle.layers.recurrent import affine, shooting
from hackle.layers.recurrent.cells import Arrays, Block, Cell
from hackle.layers.recurrent.methods import Method
from hackle.layers.recurrent.newton import Progress
from hackle.layers.sharding import mesh_axes

# Rows of the left neighbour, run from zero, whose end is the first guess of the entry state.
_BURN_IN = 64


class Placement(NamedTuple):
    """The mesh axes that the dimensions of `u [B, T, 3, D]` lie over, each perhaps none."""

    batch: tuple[str, ...]
    time: tuple[str, ...]
    state: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.batch + self.time + self.state

    # Partition specs.

    @property
    def u(self) -> P:
        return P(self.batch, self.time, None, self.state)

    @property
    def states(self) -> P:
        return P(self.batch, self.time, self.state)

    @property
    def border(self) -> P:
        return P(self.batch, self.state)

    @property
    def weights(self) -> P:
        return P(None, self.state)

    @property
    def reset(self) -> P:
        return P(self.batch, self.time)


def placement(u: jax.Array) -> Placement | None:
    """Where `u [B, T, 3, D]` lies by the rules that hold here; None if on one device.

    Raises:
      ValueError: a dimension does not divide, or the rules do not fit the mesh.
    """
    found = Placement(*mesh_axes("batch", "length", "state"))
    if not found.all:
        return None
    sizes = jax.sharding.get_abstract_mesh().shape
    for name, axes, size in zip(
        ("batch", "time", "width"), found, (u.shape[0], u.shape[1], u.shape[3]), strict=True
    ):
        parts = 1
        for axis in axes:
            parts *= sizes[axis]
        if size % parts:
            raise ValueError(f"a recurrence of {name} {size} does not divide over {parts} devices")
    return found


class Borders(NamedTuple):
    """What `adjoint` needs of the parts of time besides the states; empty if there is one part.

    Attributes:
      entries: states before each part, float32 whatever is stored, arrays `[parts, B, D]`.
      products: d(end) / d(entry) of each part, a block of arrays `[parts, B, D]`.
    """

    entries: Arrays = ()
    products: Block = ()


def solve(
    method: Method,
    at: Placement,
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
) -> tuple[Arrays, Arrays, Borders, Progress]:
    """As `method.solve`, on arrays that lie over the mesh as `at` says.

    Returns:
      `(states, final, borders, progress)`: converged if every part did in the last pass, and every
      entry is the end before it.
    """

    def run(u, weights, initial, reset):
        if not at.time:
            states, final, progress = method.solve(cell, u, weights, initial, reset)
            return states, final, Borders(), _of_all(progress, at)
        index, count = lax.axis_index(at.time), lax.axis_size(at.time)
        rows = min(_BURN_IN, u.shape[1])
        tail, tail_reset = jax.tree.map(lambda x: _from_left(x[:, -rows:], at.time), (u, reset))
        zero = tuple(jnp.zeros_like(x) for x in initial)
        _, guess, _ = method.solve(cell, tail, weights, zero, tail_reset)
        guess = tuple(jnp.where(index == 0, x, g) for x, g in zip(initial, guess, strict=True))

        def march(entries: Arrays) -> shooting.Pass:
            mine = tuple(e[index] for e in entries)
            states, ends, products, progress = method.march(cell, u, weights, mine, reset)
            ends, products = lax.all_gather((ends, products), at.time)
            # A part that is run step by step is one pass.
            progress = progress._replace(iterations=jnp.maximum(1, progress.iterations))
            return shooting.Pass(states, ends, entries, products, progress)

        first = march(lax.all_gather(guess, at.time))
        passed = shooting.shoot(first, march, initial, over=at.all)
        final = tuple(x[count - 1] for x in passed.ends)
        borders = Borders(passed.entries, passed.products)
        return passed.states, final, borders, _of_all(passed.progress, at)

    parts = P(None, at.batch, at.state)
    return jax.shard_map(
        run,
        in_specs=(at.u, at.weights, at.border, None if reset is None else at.reset),
        out_specs=(at.states, at.border, parts, P()),
        check_vma=False,
    )(u, weights, initial, reset)


def _of_all(progress: Progress, at: Placement) -> Progress:
    """Of all devices: the most iterations, and whether every one converged."""
    failed = lax.pmax(jnp.int32(~progress.converged), at.all)
    return Progress(lax.pmax(progress.iterations, at.all), failed == 0)


def adjoint(
    method: Method,
    at: Placement,
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    states: Arrays,
    borders: Borders,
    cotangents: tuple[jax.Array | None, ...],
    final_cotangents: Arrays,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """As `method.adjoint`, on arrays that lie over the mesh; `borders` are those of `solve`."""

    def run(u, weights, initial, reset, states, borders, cotangents, final):
        def local(entry: Arrays, arriving: Arrays):
            return method.adjoint(cell, u, weights, entry, reset, states, cotangents, arriving)

        if not at.time:
            du, dweights, dinitial = local(initial, final)
            return du, _sum(dweights, at.batch), dinitial
        index = lax.axis_index(at.time)
        entry = tuple(x[index] for x in borders.entries)
        zero = tuple(jnp.zeros_like(x) for x in final)
        sent = lax.all_gather(local(entry, zero)[2], at.time)
        ahead = tuple(jnp.concatenate([x[1:], f[None]]) for x, f in zip(sent, final, strict=True))
        arriving = affine.solve_transposed(borders.products, ahead, 0)
        du, dweights, sent = local(entry, tuple(x[index] for x in arriving))
        first = tuple(_sum(jnp.where(index == 0, x, 0), at.time) for x in sent)
        return du, _sum(dweights, at.batch + at.time), first

    parts = P(None, at.batch, at.state)
    given = tuple(None if g is None else at.states for g in cotangents)
    masks = None if reset is None else at.reset
    return jax.shard_map(
        run,
        in_specs=(
            at.u, at.weights, at.border, masks, at.states, parts, given, at.border
        ),
        out_specs=(at.u, at.weights, at.border),
        check_vma=False,
    )(u, weights, initial, reset, states, borders, cotangents, final_cotangents)  # fmt: skip


def _from_left(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """What the device before this one in time has; zeros on the first."""
    count = lax.axis_size(axes)
    return lax.ppermute(x, axes, [(i, i + 1) for i in range(count - 1)])


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes) if axes else x
