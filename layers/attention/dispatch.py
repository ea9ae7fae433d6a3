"""The public attention functions: check the arguments, choose an implementation, run it."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hackle.layers import in_place
from hackle.layers.attention import (
    cudnn,
    over_devices,
    pallas_gpu,
    pallas_tpu,
    reference,
    tile_mask,
    xla,
)
from hackle.layers.attention.masks import Mask

_log = logging.getLogger("hackle")

_IMPLEMENTATIONS = {
    "reference": reference,
    "xla": xla,
    "cudnn": cudnn,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu": pallas_tpu,
}
# What `None` tries, fastest first. XLA supports everything, so the choice always ends.
_PREFERENCE = ("cudnn", "pallas_gpu", "pallas_tpu", "xla")
_WITH_LSE = ("reference", "xla", "pallas_gpu", "pallas_tpu")
_KERNELS = ("pallas_gpu", "pallas_tpu")
_FEWEST = 128  # queries that fill a tile of a kernel; padding costs more where there are fewer


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with grouped queries: `softmax(scale * q k^T + mask) v`.

    Args:
      query: `[B, L, H, E]`.
      key: `[B, S, K, E]`, H divisible by K; query head h reads key head `h // (H / K)`.
      value: `[B, S, K, E]`. All three are of one dtype.
      mask: which keys each query sees; None hides nothing. Its arrays have B rows, or one.
      scale: factor on the scores; None is `E ** -0.5`.
      implementation: "reference", "xla", "cudnn", "pallas_gpu" or "pallas_tpu" runs exactly that
        or raises. None picks the fastest that supports these arguments on the default device, and
        logs the choice once.

    Returns:
      `[B, L, H, E]` in the dtype of `query`. Softmax is computed in float32 or wider. A query
      that sees no key gets 0.

    Raises:
      ValueError: shapes, dtypes or the mask do not fit, or the implementation's name is unknown.
      NotImplementedError: the named implementation cannot honour the arguments on this device.
    """
    scale = _check(query, key, value, mask, scale)
    name = _choose(implementation, _PREFERENCE, query, key, mask)
    out = _run(name, query, key, value, mask, scale)
    return out[0] if name in _WITH_LSE else out


def attention_with_lse(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `attention`, and the log-sum-exp of the scores, `[B, L, H]` float32 (-inf: saw no key).

    Differentiable in both results. "cudnn" is refused: its log-sum-exp comes in the dtype of the
    query and without a gradient. Arguments and other errors as in `attention`.
    """
    scale = _check(query, key, value, mask, scale)
    if implementation in _IMPLEMENTATIONS and implementation not in _WITH_LSE:
        raise NotImplementedError(
            f"implementation {implementation!r} gives no differentiable float32 log-sum-exp; "
            f"use one of {_WITH_LSE}"
        )
    preference = [name for name in _PREFERENCE if name in _WITH_LSE]
    name = _choose(implementation, preference, query, key, mask)
    return _run(name, query, key, value, mask, scale)


def merge_attention(
    parts: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint sets of keys into attention over their union, exactly.

    Args:
      parts: pairs `(out [B,L,H,E], lse float32 [B,L,H])` as `attention_with_lse` returns them.

    Returns:
      `(out, lse)` of the union: `lse = log sum_i exp(lse_i)`, `out = sum_i exp(lse_i - lse) out_i`,
      summed in float32 or wider; `out` in the dtype of the first part.

    Raises:
      ValueError: there are no parts, or one whose two shapes do not fit.
    """
    if not parts:
        raise ValueError("merge_attention needs at least one part, got none")
    for out, lse in parts:
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"part has output {out.shape} but log-sum-exp {lse.shape}")
    lses = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    top = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1)
    wide = lses.dtype
    out = sum(
        (w / safe)[..., None] * part.astype(wide)
        for w, (part, _) in zip(weights, parts, strict=True)
    )
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    return out.astype(parts[0][0].dtype), lse


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, scale: float | None
) -> float:
    """Raises ValueError on shapes or dtypes that do not fit; returns the scale."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(
                f"attention: {name} must be [batch, length, heads, head_width], "
                f"got shape {array.shape}"
            )
    if key.shape != value.shape:
        raise ValueError(f"attention: key {key.shape} and value {value.shape} differ in shape")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"attention: query {query.shape} and key {key.shape} differ in batch or head width"
        )
    if 0 in key.shape:
        raise ValueError(f"attention: key {key.shape} has nothing to attend to")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"attention: query {query.dtype}, key {key.dtype} and value {value.dtype} "
            "differ in dtype"
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(f"attention: query must be floating-point, got {query.dtype}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"attention: {query.shape[2]} query heads are not a multiple of "
            f"{key.shape[2]} key heads"
        )
    if mask is not None:
        if not isinstance(mask, Mask):
            raise ValueError(
                f"attention: mask must be one of hackle.layers.masks, such as masks.Causal(), "
                f"or several with & between them; got {_named(mask)}"
            )
        mask.check(query.shape[1], key.shape[1])
        mask.check_batch(query.shape[0])
    return query.shape[-1] ** -0.5 if scale is None else scale


def _named(thing: Any) -> str:
    if hasattr(thing, "shape"):
        return f"an array {thing.dtype} {thing.shape}"
    return f"the class {thing.__name__}" if isinstance(thing, type) else repr(thing)


def check_implementation(name: str | None) -> None:
    """Raises ValueError unless `name` is None or that of an implementation.

    Whether it can run is known only with its arguments.
    """
    if name is not None and name not in _IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {name!r}; "
            f"expected one of {sorted(_IMPLEMENTATIONS)} or None"
        )


def _choose(
    implementation: str | None,
    preference: Sequence[str],
    query: jax.Array,
    key: jax.Array,
    mask: Mask | None,
) -> str:
    if implementation is None:
        reasons: list[str] = []
        barred = False
        for name in preference:
            unsuited = _unsuited(name, query)
            reason = _unsupported(name, query, key, mask) or unsuited
            if reason is None:
                _say_once(name, "; ".join(reasons), barred)
                return name
            reasons.append(reason)
            barred |= in_place.FLAG in reason and unsuited is None
        raise AssertionError("XLA supports everything")
    check_implementation(implementation)
    reason = _unsupported(implementation, query, key, mask)
    if reason is not None:
        raise NotImplementedError(f"attention implementation {implementation!r}: {reason}")
    return implementation


def _run(name, query, key, value, mask, scale):
    attend = _IMPLEMENTATIONS[name].attend
    if name in _KERNELS:
        return over_devices.run(attend, query, key, value, mask, scale)
    return attend(query, key, value, mask, scale)


def _unsupported(name: str, query: jax.Array, key: jax.Array, mask: Mask | None) -> str | None:
    """Why an implementation cannot run, or None if it can."""
    if name in _KERNELS:
        reason = over_devices.unsupported(query, key) or tile_mask.unsupported(mask)
        if reason is not None:
            return reason
    return _IMPLEMENTATIONS[name].unsupported(query, key, mask)


def _unsuited(name: str, query: jax.Array) -> str | None:
    """Why None does not stand for an implementation that could run."""
    if name in _KERNELS and query.shape[1] < _FEWEST:
        return f"{query.shape[1]} queries do not fill a tile of {name}"
    return None


@functools.cache
def _say_once(name: str, reasons: str, barred: bool) -> None:
    # A flag alone bars a faster kernel: that is worth a warning.
    level = logging.WARNING if barred else logging.INFO
    _log.log(level, "attention: chose %r%s", name, f" ({reasons})" if reasons else "")
