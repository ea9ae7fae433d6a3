"""Next-token cross-entropy of packed rows, computed in pieces along the row.

All results are sums over tokens, never means, so that microbatches add up to exactly the big
batch: the caller divides once by the total weight.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Float32 logits held at once, per device: 2^27 are 512 MiB.
MAX_LOGITS = 2**27


class LossSums(NamedTuple):
    """Float32 scalars, summed over the targets that count."""

    nll: jax.Array
    """Sum of -log p(target)."""
    z: jax.Array
    """Sum of log(Z)^2, Z the normaliser of the softmax; without the coefficient."""
    correct: jax.Array
    """Number of targets that have the highest logit."""


def next_tokens(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Targets int32 `[B, L]` and their weights float32 `[B, L]`.

    The target of a position is the token after it. It counts when both lie in the same segment,
    which is not padding (id 0), and `loss_mask`, if there is one, is nonzero at the target. The
    last position of a row has no target.

    Args:
      batch: `tokens` and optionally `segment_ids` and `loss_mask`, each `[B, L]`.
    """
    tokens = batch["tokens"]
    targets = _shift(tokens)
    counts = jnp.ones(tokens.shape, bool).at[:, -1].set(False)
    if (segments := batch.get("segment_ids")) is not None:
        counts &= (segments == _shift(segments)) & (segments != 0)
    if (loss_mask := batch.get("loss_mask")) is not None:
        counts &= _shift(loss_mask) != 0
    return targets, counts.astype(jnp.float32)


def _shift(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def token_losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p(target), log(Z)^2 and whether the target is the best guess.

    Args:
      logits: `[..., V]`; widened to float32 at least.
      targets: int `[...]`, in `[0, V)`.

    Returns:
      Three arrays `[...]`.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    correct = chosen >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return log_z - chosen, jnp.square(log_z), correct


def loss_pieces(rows: int, length: int, vocab_size: int, max_logits: int = MAX_LOGITS) -> int:
    """The least divisor of `length` that keeps `rows * length / divisor * vocab_size` in bounds.

    Args:
      rows: rows of one device.
      length: tokens of a row.
    """
    for pieces in range(1, length + 1):
        if length % pieces == 0 and rows * (length // pieces) * vocab_size <= max_logits:
            return pieces
    return length


def next_token_loss(
    features: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    logits: Callable[[jax.Array], jax.Array],
    *,
    pieces: int = 1,
) -> LossSums:
    """Sums over all targets, with logits of `L / pieces` positions in memory at a time.

    The backward pass computes the logits of each piece again, so `[B, L, V]` is never held whole
    in either direction when `pieces > 1`.

    Args:
      features: `[B, L, D]`, what the head reads.
      targets: int `[B, L]`.
      weights: float32 `[B, L]`; 0 leaves a position out.
      logits: the head, `[B, l, D] -> [B, l, V]`.
      pieces: a divisor of L.

    Raises:
      ValueError: `pieces` does not divide L.
    """
    batch, length = targets.shape
    if pieces < 1 or length % pieces:
        raise ValueError(f"pieces={pieces} does not divide the row length {length}")

    def sums(features, targets, weights) -> LossSums:
        nll, z, correct = token_losses(logits(features), targets)
        return LossSums(*(jnp.sum(weights * x) for x in (nll, z, correct)))

    if pieces == 1:
        return sums(features, targets, weights)

    def split(x):
        x = x.reshape(batch, pieces, length // pieces, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    piece_sums = jax.checkpoint(sums, prevent_cse=False)

    def body(total: LossSums, piece):
        return jax.tree.map(jnp.add, total, piece_sums(*piece)), None

    zero = LossSums(*(jnp.zeros((), jnp.promote_types(weights.dtype, jnp.float32)),) * 3)
    return jax.lax.scan(body, zero, (split(features), split(targets), split(weights)))[0]
