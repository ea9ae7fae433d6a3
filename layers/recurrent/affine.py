"""Linear recurrences `x_t = J_t x_(t-1) + r_t`, `x_0 = r_0`, for all times at once.

Affine maps compose: `(J1, r1)` and then `(J2, r2)` is `(J2 J1, J2 r1 + r2)`, which is associative,
so a parallel prefix scan solves the recurrence in O(log T) rounds (ParaRNN, arXiv 2510.21450,
section 3). A vector is a tuple of arrays; a matrix is one of three kinds:

- `Diagonal`: no number depends on another;
- a block, N x N arrays of the vector's shape: the N numbers of a channel depend on each other;
- one array `[..., D, D]`, on a vector of one array `[..., D]`: everything depends on everything.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hackle.layers.recurrent import cells
from hackle.layers.recurrent.cells import Arrays, Block


class Diagonal(NamedTuple):
    """Its entries, in arrays like those of the vector."""

    entries: Arrays


Matrix = Diagonal | Block | jax.Array


def compose(second: Any, first: Any) -> Any:
    """The matrix of `first` and then `second`, all of one kind."""
    if isinstance(second, Diagonal):
        return Diagonal(apply(second, first.entries))
    if isinstance(second, tuple):
        return cells.compose(second, first)
    return jnp.matmul(second, first, precision="highest")


def apply(matrix: Matrix, vector: Arrays) -> Arrays:
    """The vector `matrix vector`."""
    if isinstance(matrix, Diagonal):
        return tuple(j * x for j, x in zip(matrix.entries, vector, strict=True))
    if isinstance(matrix, tuple):
        return cells.apply(matrix, vector)
    return (jnp.einsum("...ij,...j->...i", matrix, vector[0], precision="highest"),)


def transposed(matrix: Any) -> Any:
    if isinstance(matrix, Diagonal):
        return matrix
    if isinstance(matrix, tuple):
        return cells.transposed(matrix)
    return jnp.swapaxes(matrix, -1, -2)


def solve(jacobian: Matrix, rhs: Arrays, axis: int) -> Arrays:
    """`x_t = J_t x_(t-1) + r_t` along `axis`; the first Jacobian has no part in it."""

    def join(first, second):
        (j1, r1), (j2, r2) = first, second
        return compose(j2, j1), tuple(x + r for x, r in zip(apply(j2, r1), r2, strict=True))

    return lax.associative_scan(join, (jacobian, rhs), axis=axis)[1]


def solve_transposed(jacobian: Matrix, rhs: Arrays, axis: int) -> Arrays:
    """`y_t = J_(t+1)^T y_(t+1) + r_t`, last `y = r`: the adjoint of `solve`."""
    # Each time takes the Jacobian of the step after it; the last one's has no part in it.
    ahead = jax.tree.map(lambda x: jnp.roll(x, -1, axis), transposed(jacobian))
    flipped = jax.tree.map(lambda x: jnp.flip(x, axis), (ahead, rhs))
    return tuple(jnp.flip(x, axis) for x in solve(flipped[0], flipped[1], axis))


def reached(matrix: Matrix, marked: Arrays, axis: int) -> Arrays:
    """Where the recurrence carries a mark: `marked` (bool), and what may depend on what it reaches.

    A block or a dense matrix that is not all zero is taken to carry each number to every other.
    """
    if isinstance(matrix, Diagonal):
        return tuple(
            m | _coming(j != 0, m, axis) for j, m in zip(matrix.entries, marked, strict=True)
        )
    if isinstance(matrix, tuple):
        flows = functools.reduce(operator.or_, (j != 0 for row in matrix for j in row))
        coming = _coming(flows, functools.reduce(operator.or_, marked), axis)
        return tuple(m | coming for m in marked)
    coming = _coming(jnp.any(matrix != 0, axis=(-2, -1)), jnp.any(marked[0], axis=-1), axis)
    return (marked[0] | coming[..., None],)


def _coming(flows: jax.Array, marked: jax.Array, axis: int) -> jax.Array:
    """`c_t = flows_t and (m_(t-1) or c_(t-1))`, from twice as far back in each round."""
    time = marked.shape[axis]
    index = jnp.expand_dims(jnp.arange(time), [d for d in range(marked.ndim) if d != axis])

    def earlier(x: jax.Array, by: jax.Array | int) -> jax.Array:
        return jnp.where(index >= by, jnp.roll(x, by, axis), False)

    def further(k, carry):
        flows, marked = carry
        return flows & earlier(flows, 2**k), marked | (flows & earlier(marked, 2**k))

    whole = lax.fori_loop(0, (time - 1).bit_length(), further, (flows, marked))[1]
    return flows & earlier(whole, 1)


def product(matrix: Any, axis: int) -> Any:
    """The product over `axis` (one of the leading ones), the first factor rightmost."""
    whole = lax.associative_scan(lambda first, second: compose(second, first), matrix, axis=axis)
    return jax.tree.map(lambda x: lax.index_in_dim(x, -1, axis, keepdims=False), whole)


def shifted(initial: Arrays, states: Arrays, axis: int) -> Arrays:
    """The state before each step: `initial`, then all states but the last."""
    return tuple(
        jnp.concatenate([jnp.expand_dims(first, axis), lax.slice_in_dim(x, 0, -1, axis=axis)], axis)
        for first, x in zip(initial, states, strict=True)
    )
