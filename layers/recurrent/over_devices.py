"""A recurrence over a mesh: rows and channels lie apart for free, time by multiple shooting.

Each device runs its part of time by a method for one device. Forwards, it guesses its entry state
from the last rows of its left neighbour, and `shooting.shoot` corrects the entries until they
agree with the ends before them: one pass where the recurrence forgets within those rows, two or
three else. Backwards, all is linear: one run from zero says what each part adds to the cotangent
that leaves it, a recurrence over parts gives what arrives at each, and a second run the gradients.
Only border states and a few rows of u travel, whatever T.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from hackle.layers.recurrent import affine, scan, shooting
from hackle.layers.recurrent.cells import Arrays, Block, Cell
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
      ValueError: a dimension does not divide.
    """
    found = Placement(mesh_axes("batch"), mesh_axes("length"), mesh_axes("state"))
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


def solve(
    method: ModuleType,
    at: Placement,
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
) -> tuple[Arrays, Arrays, Block, jax.Array]:
    """As `method.solve`, on arrays that lie over the mesh as `at` says.

    Returns:
      `(states, final, products, gap)`: the last two are d(end) / d(entry) of each part of time,
      arrays `[parts, B, D]`, and the largest difference left between an entry and its end.
    """

    def run(u, weights, initial, reset):
        if not at.time:
            states, final = method.solve(cell, u, weights, initial, reset)
            return states, final, (), jnp.zeros(())
        index, count = lax.axis_index(at.time), lax.axis_size(at.time)
        rows = min(_BURN_IN, u.shape[1])
        tail, tail_reset = jax.tree.map(lambda x: _from_left(x[:, -rows:], at.time), (u, reset))
        zero = tuple(jnp.zeros_like(x) for x in initial)
        _, guess = scan.solve(cell, tail, weights, zero, tail_reset)
        guess = tuple(jnp.where(index == 0, x, g) for x, g in zip(initial, guess, strict=True))

        def march(entries: Arrays) -> shooting.Pass:
            mine = tuple(e[index] for e in entries)
            states, ends, products = method.march(cell, u, weights, mine, reset)
            ends, products = lax.all_gather((ends, products), at.time)
            return shooting.Pass(states, ends, entries, products)

        passed, _, gap = shooting.shoot(
            march(lax.all_gather(guess, at.time)), march, initial, over=at.all
        )
        return passed.states, tuple(x[count - 1] for x in passed.ends), passed.products, gap

    parts = P(None, at.batch, at.state)
    return jax.shard_map(
        run,
        in_specs=(at.u, at.weights, at.border, None if reset is None else at.reset),
        out_specs=(at.states, at.border, parts, P()),
        check_vma=False,
    )(u, weights, initial, reset)


def adjoint(
    method: ModuleType,
    at: Placement,
    cell: Cell,
    u: jax.Array,
    weights: jax.Array,
    initial: Arrays,
    reset: jax.Array | None,
    states: Arrays,
    products: Block,
    cotangents: tuple[jax.Array | None, ...],
    final_cotangents: Arrays,
) -> tuple[jax.Array, jax.Array, Arrays]:
    """As `method.adjoint`, on arrays that lie over the mesh; `products` are those of `solve`."""

    def run(u, weights, initial, reset, states, products, cotangents, final):
        def local(entry: Arrays, arriving: Arrays):
            return method.adjoint(cell, u, weights, entry, reset, states, cotangents, arriving)

        if not at.time:
            du, dweights, dinitial = local(initial, final)
            return du, _sum(dweights, at.batch), dinitial
        index = lax.axis_index(at.time)
        left = tuple(
            _from_left(x[:, -1], at.time).astype(h.dtype)
            for x, h in zip(states, initial, strict=True)
        )
        entry = tuple(jnp.where(index == 0, h, x) for h, x in zip(initial, left, strict=True))
        zero = tuple(jnp.zeros_like(x) for x in final)
        sent = lax.all_gather(local(entry, zero)[2], at.time)
        ahead = tuple(jnp.concatenate([x[1:], f[None]]) for x, f in zip(sent, final, strict=True))
        arriving = affine.solve_transposed(products, ahead, 0)
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
    )(u, weights, initial, reset, states, products, cotangents, final_cotangents)  # fmt: skip


def _from_left(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """What the device before this one in time has; zeros on the first."""
    count = lax.axis_size(axes)
    return lax.ppermute(x, axes, [(i, i + 1) for i in range(count - 1)])


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes) if axes else x
