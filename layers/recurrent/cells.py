"""The two cells of ParaRNN (arXiv 2510.21450): one step, its Jacobian, and its transpose.

Every function is elementwise over channels, so it runs on arrays of any shape: on `[B, D]` in a
scan, on `[B, T, D]` all times at once, and on a register tile inside a kernel. A state is a tuple
of arrays, pre-activations are three arrays, and weights are one array per row of the state matrix
(and peephole). With N arrays of state, a Jacobian is an N x N tuple of tuples: the block of one
channel, since no channel reads another's state.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, ...]
Block = tuple[Arrays, ...]


@dataclasses.dataclass(frozen=True)
class GRU:
    """`z = sig(a_z h + u_z)`, `r = sig(a_r h + u_r)`, `c = tanh(a_c (h r) + u_c)`,
    `h' = (1 - z) h + z c`. Rows of u and of the weights: z, r, c. Always `|h| <= 1`.

    A kernel may give forms of the two nonlinearities that its chip does faster.
    """

    sigmoid: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh

    states: ClassVar[int] = 1
    weights: ClassVar[int] = 3
    name: ClassVar[str] = "gru"

    def step(self, state: Arrays, u: Arrays, weights: Arrays) -> Arrays:
        (h,) = state
        a_z, a_r, a_c = weights
        z = self.sigmoid(a_z * h + u[0])
        r = self.sigmoid(a_r * h + u[1])
        c = self.tanh(a_c * (h * r) + u[2])
        return (h + z * (c - h),)

    def linearize(self, state: Arrays, u: Arrays, weights: Arrays) -> tuple[Arrays, Block]:
        """The next state and d(next state) / d(state)."""
        (h,) = state
        a_z, a_r, a_c = weights
        z = self.sigmoid(a_z * h + u[0])
        r = self.sigmoid(a_r * h + u[1])
        c = self.tanh(a_c * (h * r) + u[2])
        jacobian = (
            (1 - z)
            + (c - h) * z * (1 - z) * a_z
            + z * (1 - c * c) * a_c * (r + h * r * (1 - r) * a_r)
        )
        return (h + z * (c - h),), ((jacobian,),)

    def local_gradients(self, state: Arrays, u: Arrays, weights: Arrays) -> tuple[Block, Block]:
        """What the backward pass needs and does not depend on the cotangent.

        Returns:
          `(jacobian, du)`: `du[i][k]` is d(state i after) / d(u[k]), elementwise.
        """
        (h,) = state
        a_z, a_r, a_c = weights
        z = self.sigmoid(a_z * h + u[0])
        r = self.sigmoid(a_r * h + u[1])
        c = self.tanh(a_c * (h * r) + u[2])
        to_z = (c - h) * z * (1 - z)
        to_c = z * (1 - c * c)
        to_r = to_c * a_c * h * r * (1 - r)
        jacobian = (1 - z) + to_z * a_z + to_c * a_c * r + to_r * a_r
        # The reset gate scales what the candidate's weight sees.
        return ((jacobian,),), ((to_z, to_r, to_c),)

    def weight_gradients(
        self, state: Arrays, after: Arrays, u: Arrays, weights: Arrays, du: Arrays
    ):
        """Gradient of each weight from that of the pre-activations, per time and channel."""
        (h,) = state
        r = self.sigmoid(weights[1] * h + u[1])
        return du[0] * h, du[1] * h, du[2] * (h * r)


@dataclasses.dataclass(frozen=True)
class LSTM:
    """Coupled input and forget gates, with peepholes. State (c, h); rows of u: f, o, z; weights
    a_f, a_o, a_z, then the peepholes p_f, p_o.

    `f = sig(a_f h + u_f + p_f c)`, `c' = f c + (1 - f) tanh(a_z h + u_z)`,
    `o = sig(a_o h + u_o + p_o c')`, `h' = o tanh(c')`. Always `|c| <= 1`, `|h| < 1`.
    """

    sigmoid: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid
    tanh: Callable[[jax.Array], jax.Array] = jnp.tanh

    states: ClassVar[int] = 2
    weights: ClassVar[int] = 5
    name: ClassVar[str] = "lstm"

    def step(self, state: Arrays, u: Arrays, weights: Arrays) -> Arrays:
        c, h = state
        a_f, a_o, a_z, p_f, p_o = weights
        f = self.sigmoid(a_f * h + (p_f * c + u[0]))
        candidate = self.tanh(a_z * h + u[2])
        c = candidate + f * (c - candidate)
        o = self.sigmoid(p_o * c + (a_o * h + u[1]))
        return c, o * self.tanh(c)

    def linearize(self, state: Arrays, u: Arrays, weights: Arrays) -> tuple[Arrays, Block]:
        """The next state and d(c', h') / d(c, h)."""
        after, jacobian, _ = self._linearize(state, u, weights)
        return after, jacobian

    def local_gradients(self, state: Arrays, u: Arrays, weights: Arrays) -> tuple[Block, Block]:
        """As `GRU.local_gradients`; both results are for states (c, h)."""
        _, jacobian, du = self._linearize(state, u, weights)
        return jacobian, du

    def _linearize(self, state: Arrays, u: Arrays, weights: Arrays):
        c, h = state
        a_f, a_o, a_z, p_f, p_o = weights
        f = self.sigmoid(a_f * h + (p_f * c + u[0]))
        candidate = self.tanh(a_z * h + u[2])
        new_c = candidate + f * (c - candidate)
        o = self.sigmoid(p_o * new_c + (a_o * h + u[1]))
        t = self.tanh(new_c)
        to_f = (c - candidate) * f * (1 - f)  # d c' / d u_f
        to_z = (1 - f) * (1 - candidate * candidate)  # d c' / d u_z
        to_o = t * o * (1 - o)  # d h' / d u_o
        through = to_o * p_o + o * (1 - t * t)  # d h' / d c'
        c_c = f + to_f * p_f
        c_h = to_f * a_f + to_z * a_z
        jacobian = ((c_c, c_h), (through * c_c, to_o * a_o + through * c_h))
        zero = jnp.zeros_like(f)
        du = ((to_f, zero, to_z), (through * to_f, to_o, through * to_z))
        return (new_c, o * t), jacobian, du

    def weight_gradients(
        self, state: Arrays, after: Arrays, u: Arrays, weights: Arrays, du: Arrays
    ):
        """Gradient of each weight from that of the pre-activations, per time and channel."""
        c, h = state
        return du[0] * h, du[1] * h, du[2] * h, du[0] * c, du[1] * after[0]


Cell = GRU | LSTM


def compose(second: Block, first: Block) -> Block:
    """`second first`, channel by channel: the Jacobian of one step after the other."""
    n = len(first)
    return tuple(
        tuple(_sum(second[i][j] * first[j][k] for j in range(n)) for k in range(n))
        for i in range(n)
    )


def apply(block: Block, vector: Arrays) -> Arrays:
    """`block vector`, channel by channel; `block[i][k]` maps k to i."""
    return tuple(_sum(b * x for b, x in zip(row, vector, strict=True)) for row in block)


def transposed(block: Block) -> Block:
    """Rows and columns exchanged."""
    return tuple(zip(*block, strict=True))


def block_of(entries: Sequence[jax.Array], n: int) -> Block:
    """The n x n block with these entries, row by row."""
    return tuple(tuple(entries[i * n : (i + 1) * n]) for i in range(n))


def identity(like: Arrays) -> Block:
    """The identity on states shaped as `like`."""
    return tuple(
        tuple(jnp.full_like(x, float(i == k)) for k in range(len(like))) for i, x in enumerate(like)
    )


def _sum(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, terms)
