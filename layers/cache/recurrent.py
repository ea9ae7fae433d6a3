"""What recurrent layers remember: their last state, whatever the length of the text."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """States of all layers, and the last inputs of their convolutions; constant in size.

    Attributes:
      states: pytree of float32 `[N, B, D]`, as the layers return it: one array, or (c, h).
      tails: `[N, B, taps - 1, D]`.
    """

    states: Any
    tails: jax.Array

    @property
    def batch(self) -> int:
        return self.tails.shape[1]
