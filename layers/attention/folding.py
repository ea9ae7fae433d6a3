"""`vmap` of a kernel: what is mapped over becomes more rows of the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def folded(
    run: Callable[..., Any], shape: Any, arrays: Sequence[jax.Array], masks: Sequence[jax.Array]
) -> Any:
    """`run(shape, *arrays, *masks)`, and under `vmap` one such call of a larger batch.

    Args:
      run: gives arrays `[batch, ...]`; it has its gradient from elsewhere.
      shape: a NamedTuple with a field `batch`.
      arrays: `[batch, ...]`.
      masks: `[batch, ...]`, or `[1, ...]` where all rows of the batch have the same; all alike.
    """
    count, batch = len(arrays), shape.batch

    @custom_vmap
    def call(*given):
        return run(shape, *given)

    @call.def_vmap
    def more_rows(size, mapped, *given):
        several = any(mapped[count:]) or given[-1].shape[0] > 1

        def rows(x, is_mapped, is_mask):
            """`[size * batch, ...]`, or `[1, ...]` of a mask that stays the same."""
            if is_mask and not several:
                return x
            x = x if is_mapped else x[None]
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(size * batch, *x.shape[2:])

        wider = [rows(x, m, i >= count) for i, (x, m) in enumerate(zip(given, mapped, strict=True))]
        found = folded(run, shape._replace(batch=size * batch), wider[:count], wider[count:])
        split = jax.tree.map(lambda x: x.reshape(size, batch, *x.shape[1:]), found)
        return split, jax.tree.map(lambda _: True, split)

    return call(*arrays, *masks)
