"""Model FLOPs and what share of the chip's peak they are (MFU)."""

from typing import Any

import jax

from hackle.pjit_configs import chip_of


def forward_flops_per_token(config: Any, length: int) -> dict[str, float]:
    """FLOPs of the forward pass for one token of a row of `length` tokens, by part of the model.

    A matrix product of `[1, m] x [m, n]` is 2mn. Counted: projections, MLPs, attention scores and
    sums, aggregator, head. Not counted: embedding look-up, norms, rotary, softmax, convolutions,
    recurrences (without their projections), and what is recomputed in the backward pass (model
    FLOPs, not hardware FLOPs).

    The causal mask is counted: token i sees i+1 tokens, `(length + 1) / 2` on average, not
    `length`. Borders between packed documents are not, so with packing this is an upper bound.
    ParScale: everything in the blocks happens once for each of P streams, and each query also
    sees T prefix rows; the aggregator and the head are counted once.

    Args:
      config: `DenseConfig`, `ParScaleConfig` or `ParaRNNConfig`, or anything with the fields of
        one.

    Returns:
      "trunk", "attention", "aggregator" and "head".
    """
    d = config.width
    streams = getattr(config, "streams", 1)
    if hasattr(config, "cell"):
        # In, gate and out, and three gates whose matrices have a block per head.
        projections = 3 * d * d + 3 * d * d // config.heads
        attention = 0.0
    else:
        prefix = getattr(config, "prefix_length", 0) if streams > 1 else 0
        e, seen = config.head_width, (length + 1) / 2 + prefix
        projections = d * e * (2 * config.heads + 2 * config.kv_heads)
        attention = 2 * config.heads * e * seen
    block = projections + 3 * d * config.mlp_width
    return {
        "trunk": 2.0 * streams * config.depth * block,
        "attention": 2.0 * streams * config.depth * attention,
        "aggregator": 2.0 * (streams * d * d + 2 * d * streams) if streams > 1 else 0.0,
        "head": 2.0 * d * config.vocab_size,
    }


def train_flops_per_token(config: Any, length: int, *, frozen_trunk: bool = False) -> float:
    """FLOPs of forward and backward for one token: three times the forward pass.

    That is the familiar `6 N` for the N weights in matrix products, plus attention. With a frozen
    trunk the backward pass needs the gradients of activations but not of the trunk's weights:
    those products count twice, not three times.
    """
    parts = forward_flops_per_token(config, length)
    if frozen_trunk:
        # Attention has no weights of its own: prefixes and activations both get gradients.
        return 2 * (parts["trunk"] + parts["head"]) + 3 * (parts["attention"] + parts["aggregator"])
    return 3 * sum(parts.values())


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Dense bfloat16 FLOP/s of all `devices` together; None when one of them is not known."""
    peaks = []
    for device in devices:
        chip = chip_of(device.device_kind)
        if chip is None or chip.peak_flops is None:
            return None
        peaks.append(chip.peak_flops)
    return sum(peaks)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs per second over the peak; None where the peak is not known."""
    return None if not peak else tokens_per_second * flops_per_token / peak
