"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from hackle.zoo.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k most likely tokens (and ties with the last of them).
      top_p: keep the fewest most likely tokens whose probability reaches p.
      min_p: keep tokens at least min_p times as likely as the most likely one.

    The filters act in this order, after the temperature. The most likely token always stays.

    Raises:
      UserError: a value out of range, or a filter without temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be >= 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} must be in (0, 1], got {value}")
        filters = [n for n in ("top_k", "top_p", "min_p") if getattr(self, n) is not None]
        if self.temperature == 0 and filters:
            raise UserError(f"{filters[0]} has no effect at temperature 0; set a temperature")


def row_keys(seed: int, rows: int) -> jax.Array:
    """Keys `[rows]`, folded from the seed: a row's samples do not depend on its neighbours."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def sample(logits: jax.Array, keys: jax.Array, step: jax.Array, how: Sampling) -> jax.Array:
    """Next tokens int32 `[B]` of float32 logits `[B, V]`.

    `keys` `[B]` are as `row_keys` makes them; `step` is int32, one for all rows or `[B]`.
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_likely(logits / how.temperature, how)
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(logits: jax.Array, how: Sampling) -> jax.Array:
    """`[B, V]` logits with those that the filters drop at -inf."""
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        kept = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if how.top_p is not None and how.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        chance = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(chance, axis=-1) - chance  # mass of the likelier tokens
        kept = jnp.min(jnp.where(before < how.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if how.min_p is not None:
        top = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < top + jnp.log(how.min_p), -jnp.inf, logits)
    return logits
