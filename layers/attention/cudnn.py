"""NVIDIA's fused attention through `jax.nn.dot_product_attention`: causal, key padding, prefixes.

A ParScale prefix needs no mask array: `length` query rows of zeros are put before the tokens, so
that keys `[prefix, tokens]` and queries line up and plain causal attention lets every token see
the whole prefix. The extra rows cost prefix / (prefix + L) of the work (2.3 % at 48 + 2048) and
are cut off again; their gradient is zero.
"""

import dataclasses

import jax
import jax.numpy as jnp

from hackle.layers.attention.masks import All, Causal, Mask, Padding, Prefix


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What cuDNN has to be told to honour a mask."""

    prefix: int = 0
    causal: bool = False
    lengths: jax.Array | None = None


def _plan(mask: Mask | None, prefix: int = 0) -> _Plan | str:
    """The plan for `mask`, or the reason why there is none."""
    plan = _Plan(prefix=prefix)
    if mask is None:
        return plan
    for part in mask.parts if isinstance(mask, All) else (mask,):
        match part:
            case Causal():
                plan = dataclasses.replace(plan, causal=True)
            case Padding(lengths) if plan.lengths is None:
                plan = dataclasses.replace(plan, lengths=lengths + prefix)
            case Prefix(length, rest) if part is mask and prefix == 0:
                return _plan(rest, prefix=length)
            case _:
                return f"cuDNN cannot honour {type(part).__name__} without an L x S array"
    return plan


def unsupported(query: jax.Array, key: jax.Array, mask: Mask | None) -> str | None:
    """Why cuDNN cannot do this, or None if it can."""
    devices = jax.devices()
    if devices[0].platform != "gpu" or "rocm" in str(devices[0].client.platform_version).lower():
        return f"cuDNN needs an NVIDIA GPU, and the default device is {devices[0].device_kind}"
    capability = float(devices[0].compute_capability)
    if capability < 8.0:
        return f"cuDNN attention needs compute capability 8.0, this GPU has {capability}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention needs bfloat16 or float16, got {query.dtype}"
    width, widest = query.shape[-1], 256 if capability >= 9.0 else 128
    if width % 8 or width > widest:
        return f"cuDNN attention needs head width a multiple of 8 up to {widest}, got {width}"
    plan = _plan(mask)
    return plan if isinstance(plan, str) else None


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask | None, scale: float
) -> jax.Array:
    """`[B,L,H,E], [B,S,K,E] -> [B,L,H,E]`. Gives no log-sum-exp: cuDNN's has no gradient here."""
    plan = _plan(mask)
    assert isinstance(plan, _Plan)
    rows = plan.prefix if plan.causal else 0
    lengths = plan.lengths
    if lengths is not None:  # one for all rows, maybe
        lengths = jnp.broadcast_to(lengths.astype(jnp.int32), query.shape[:1])
    out = jax.nn.dot_product_attention(
        jnp.pad(query, ((0, 0), (rows, 0), (0, 0), (0, 0))),
        key,
        value,
        scale=scale,
        is_causal=plan.causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, rows:]
