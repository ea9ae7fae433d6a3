"""The two cells as a Hopper does them fast, by the special functions of its hardware.

For float32, 2^x and 1/sqrt(x) make nonlinearities that are right to about 2e-7; an exact division
is too slow. For bfloat16, whose numbers are right to 4e-3, there is the hardware's tanh, right to
5e-4 of a gate's value and to 2e-5 in the states. A warp has a scheduler almost to itself, so that
a step takes as long as the chain from one state to the next: what does not wait for it comes first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hackle.layers.recurrent.cells import GRU, LSTM, Arrays, Cell


def fast(cell: Cell, dtype: Any) -> Cell:
    """`cell` with the nonlinearities that do for arrays of `dtype`."""
    if dtype == jnp.bfloat16:
        coarse = _CoarseGRU if isinstance(cell, GRU) else _CoarseLSTM
        return coarse(sigmoid=_coarse_sigmoid, tanh=jnp.tanh)  # by `approx_math`
    return type(cell)(sigmoid=_sigmoid, tanh=_tanh)


def _sigmoid(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -1.4426950408889634))
    return root * root


def _tanh(x: jax.Array) -> jax.Array:
    root = lax.rsqrt(1.0 + jnp.exp2(x * -2.8853900817779268))
    return 2.0 * (root * root) - 1.0


def _coarse_sigmoid(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


class _CoarseGRU(GRU):
    """`GRU.step` with `sig(x) = 1/2 + tanh(x / 2) / 2` put in, and one product behind each tanh."""

    def step(self, state: Arrays, u: Arrays, weights: Arrays) -> Arrays:
        (h,) = state
        a_z, a_r, a_c = weights
        r = jnp.tanh((0.5 * a_r) * h + 0.5 * u[1])
        z = 0.5 + 0.5 * jnp.tanh((0.5 * a_z) * h + 0.5 * u[0])
        kept = h - z * h
        half = (0.5 * a_c) * h
        c = jnp.tanh(half * r + (half + u[2]))
        return (z * c + kept,)


class _CoarseLSTM(LSTM):
    """`LSTM.step`, likewise."""

    def step(self, state: Arrays, u: Arrays, weights: Arrays) -> Arrays:
        c, h = state
        a_f, a_o, a_z, p_f, p_o = weights
        candidate = jnp.tanh(a_z * h + u[2])
        f = jnp.tanh((0.5 * a_f) * h + ((0.5 * p_f) * c + 0.5 * u[0]))
        half_o = (0.5 * a_o) * h + 0.5 * u[1]
        c = f * (0.5 * c - 0.5 * candidate) + (0.5 * c + 0.5 * candidate)
        half = 0.5 * jnp.tanh(c)
        o = jnp.tanh((0.5 * p_o) * c + half_o)
        return c, o * half + half
