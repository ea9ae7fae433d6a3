"""The smallest programs and recipes of the training tests."""

from typing import Any

import numpy as np

from hackle import pjit_configs, zoo
from hackle.zoo.train.optimizer import AdamW, schedule
from hackle.zoo.train.recipe import Recipe
from hackle.zoo.train.step import Program

VOCAB = 61
LENGTH = 16
SIZES = {"width": 16, "mlp_width": 24, "depth": 2, "heads": 2, "kv_heads": 2, "head_width": 8,
         "embedding_std": 0.02}  # fmt: skip


def program(
    model: str = "parscale-tiny-p2",
    preset: str | pjit_configs.Preset = "cpu1",
    sizes: dict | None = None,
    **changes: Any,
) -> Program:
    """A program on `preset`, by default of 8 rows of 16 tokens."""
    chosen = pjit_configs.preset(preset) if isinstance(preset, str) else preset
    settings: dict[str, Any] = {
        "preset": chosen,
        "mesh": chosen.mesh(),
        # Adam divides by the root of the second moment plus epsilon. Without a large one, rounding
        # errors of tiny gradients become steps of the size of the learning rate.
        "optimizer": AdamW(epsilon=1e-3),
        "learning_rate": schedule("constant", 1e-2, steps=100),
        "batch": 8,
        "length": LENGTH,
        "vocab_size": VOCAB,
    }
    overrides: dict[str, Any] = {**SIZES, "vocab_size": VOCAB, **(sizes or {})}
    if model.startswith("parscale"):
        overrides = {"prefix_length": 3, **overrides}
    return Program(
        lambda rngs: zoo.create(model, rngs=rngs, **overrides), **{**settings, **changes}
    )


def batch(seed: int = 0, rows: int = 8, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Two documents and some padding in each row; the border differs from row to row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    index = np.arange(length)[None]
    first = rng.integers(3, length - 5, (rows, 1))
    segments = np.where(index < first, 1, 2)
    segments = np.where(index >= length - rng.integers(0, 4, (rows, 1)), 0, segments)
    positions = np.where(segments == 1, index, index - first)
    return {
        "tokens": tokens,
        "positions": positions.astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }


def recipe(**changes: Any) -> Recipe:
    """A run of random tokens that takes seconds."""
    settings: dict[str, Any] = {
        "model": "parscale-tiny-p2",
        "overrides": {**SIZES, "prefix_length": 3, "max_length": 64},
        "corpus": "random",
        "vocab_size": VOCAB,
        "length": LENGTH,
        "batch": 8,
        "steps": 6,
        "warmup": 2,
        "eval_every": 0,
        "eval_batches": 1,
        "save_every": 2,
        "export": False,
    }
    return Recipe(**{**settings, **changes})
