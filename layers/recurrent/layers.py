"""ParaGRU and ParaLSTM: an input projection in blocks, and a diagonal recurrence."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.padding import cleared
from hackle.layers.parameter import Initializer, normal, parameter
from hackle.layers.recurrent.cells import GRU, LSTM, Arrays, Cell
from hackle.layers.recurrent.dispatch import METHODS, gru, lstm

INITS = ("paper", "code")


class _Recurrent(nnx.Module):
    """What the two layers share; `x [B, T, Din] -> u [B, T, 3, D]` in H dense blocks."""

    cell: Cell

    def __init__(
        self,
        in_width: int,
        width: int,
        *,
        heads: int = 1,
        method: str | None = None,
        init: str = "paper",
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        if in_width < 1 or width < 1:
            raise ValueError(
                f"{name}: in_width={in_width} and width={width}; expected both to be at least 1"
            )
        if heads < 1 or in_width % heads or width % heads:
            raise ValueError(
                f"{name}: heads={heads} must divide in_width={in_width} and width={width}"
            )
        if method is not None and method not in METHODS:
            raise ValueError(f"{name}: method {method!r} is not one of {METHODS} or None")
        if init not in INITS:
            raise ValueError(f"{name}: init {init!r} is not one of {INITS}")
        fan_in, fan_out = in_width // heads, width // heads
        if init == "paper":
            bound, spread = math.sqrt(3 / fan_in), 1 / math.sqrt(width)
        else:
            # The authors' code counts the whole width as the fan-out of a GRU.
            out = width if isinstance(self.cell, GRU) else fan_out
            bound, spread = math.sqrt(6 / (fan_in + out)), 2 / math.sqrt(5 * width)
        self.weight = parameter(
            rngs,
            (heads, fan_in, 3, fan_out),
            ("heads", "embed", "gates", "head_width"),
            _uniform(bound),
        )
        self.bias = parameter(
            rngs,
            (3, width),
            ("gates", "state"),
            _minus_linspace if init == "code" else nnx.initializers.zeros,
        )
        self.state_weight = parameter(rngs, (3, width), ("gates", "state"), normal(spread))
        if isinstance(self.cell, LSTM):
            self.peephole = parameter(rngs, (2, width), ("gates", "state"), normal(spread))
        self.in_width = in_width
        self.width = width
        self.heads = heads
        self.method = method

    def _checked(self, x: jax.Array, *axes: str) -> jax.Array:
        """`x`; raises ValueError unless it is floating-point `[*axes, Din]`."""
        x = jnp.asarray(x)
        fits = x.ndim == len(axes) + 1 and x.shape[-1] == self.in_width
        if not fits or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{type(self).__name__}: x must be floating-point "
                f"[{', '.join(axes)}, {self.in_width}], got {x.dtype} {x.shape}"
            )
        return x

    def _project(self, x: jax.Array) -> jax.Array:
        """Pre-activations `[..., 3, D]` of inputs `[..., Din]`."""
        blocks = x.reshape(*x.shape[:-1], self.heads, self.in_width // self.heads)
        u = jnp.einsum("...hi,higj->...ghj", blocks, self.weight[...].astype(x.dtype))
        return u.reshape(*x.shape[:-1], 3, self.width) + self.bias[...].astype(x.dtype)

    def _inputs(self, x: jax.Array, lengths: jax.Array | None) -> jax.Array:
        """Pre-activations `[B, T, 3, D]` of `x [B, T, Din]`, of which `lengths` count."""
        x = self._checked(x, "batch", "time")
        return self._project(cleared(type(self).__name__, x, lengths)[0])

    def _weights(self) -> Arrays:
        peephole = (self.peephole[...],) if isinstance(self.cell, LSTM) else ()
        return self.state_weight[...], *peephole

    def initial_state(self, batch: int) -> jax.Array | Arrays:
        """Zeros, float32 `[B, D]`, as many as the state has arrays.

        Raises:
          ValueError: `batch` is not positive.
        """
        if batch < 1:
            raise ValueError(f"{type(self).__name__}: batch={batch}; expected at least 1")
        zeros = tuple(jnp.zeros((batch, self.width)) for _ in range(self.cell.states))
        return zeros if self.cell.states > 1 else zeros[0]

    def step(
        self, x: jax.Array, state: jax.Array | Arrays | None = None
    ) -> tuple[jax.Array, jax.Array | Arrays]:
        """One step, for decoding.

        Args:
          x: floating-point `[B, Din]`.
          state: as this and the layer itself return it; None is `initial_state`.

        Returns:
          `(y [B, D] in x's dtype, the next state, float32)`.

        Raises:
          ValueError: shapes or dtypes do not fit.
        """
        x = self._checked(x, "batch")
        u = self._project(x).astype(jnp.promote_types(x.dtype, jnp.float32))
        rows = tuple(row for w in self._weights() for row in w.astype(u.dtype))
        state = self.initial_state(len(x)) if state is None else state
        old = state if isinstance(state, tuple | list) else (state,)
        shapes, expected = [jnp.shape(s) for s in old], [(len(x), self.width)] * self.cell.states
        if shapes != expected:
            raise ValueError(
                f"{type(self).__name__}: state has shapes {shapes}, expected {expected}"
            )
        kinds = [str(jnp.result_type(s)) for s in old]
        if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            raise ValueError(f"{type(self).__name__}: state must be floating-point, got {kinds}")
        new = self.cell.step(tuple(old), tuple(u[:, k] for k in range(3)), rows)
        return new[-1].astype(x.dtype), new if len(new) > 1 else new[0]


class ParaGRU(_Recurrent):
    """The diagonal GRU of ParaRNN (arXiv 2510.21450): `x [B, T, Din] -> y [B, T, D]`.

    `u = B x + b` with B in `heads` dense blocks, then `recurrent.gru`.

    Args:
      in_width, width: Din and D.
      heads: blocks of the input projection; must divide both widths. A dense one has 1.
      method: of the recurrence; see `recurrent.gru`.
      init: "paper": B uniform in +-sqrt(3 / fan-in), state weights N(0, 1 / D), biases 0. "code",
        as the authors' code: B uniform in +-sqrt(6 / (fan-in + fan-out)), state weights
        N(0, 4 / (5 D)), and the bias of the first gate falling from 0 to -1 over the channels.

    Raises:
      ValueError: a width is not positive, `heads` does not divide both, or an unknown `method` or
        `init`.
    """

    cell = GRU()

    def __call__(
        self,
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        reset: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """All times of rows.

        Args:
          x: floating-point `[B, T, Din]`.
          state: `[B, D]`, the final state of what came before; None is zero.
          reset: bool `[B, T]`: true zeroes the state before that step, e.g. where a packed document
            begins.
          lengths: int `[B]`, 0 to T: steps of each row that count. What follows them may be
            anything, y is 0 there, and the final state is that of the last one that counts.

        Returns:
          `(y [B, T, D] in x's dtype, final state [B, D] float32)`.

        Raises:
          ValueError, NotImplementedError: as `recurrent.gru`, which this calls.
        """
        (a,) = self._weights()
        u = self._inputs(x, lengths)
        return gru(u, a, state, reset=reset, lengths=lengths, method=self.method)


class ParaLSTM(_Recurrent):
    """The diagonal LSTM of ParaRNN, with coupled gates and peepholes; arguments as `ParaGRU`.

    Its state is `(c, h)`, each `[B, D]` float32.
    """

    cell = LSTM()

    def __call__(
        self,
        x: jax.Array,
        state: tuple[jax.Array, jax.Array] | None = None,
        *,
        reset: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """`(y [B, T, D] in x's dtype, final state (c, h))`; arguments as in `ParaGRU`, but that
        `state` is `(c, h)`."""
        a, peephole = self._weights()
        u = self._inputs(x, lengths)
        return lstm(u, a, peephole, state, reset=reset, lengths=lengths, method=self.method)


def _uniform(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _minus_linspace(key: jax.Array, shape, dtype) -> jax.Array:
    """Row 0 from 0 to -1, the others 0."""
    return jnp.zeros(shape, dtype).at[0].set(-jnp.linspace(0, 1, shape[1], dtype=dtype))
