"""Depth as a scan over one block with stacked parameters.

Compile time does not grow with depth, and every parameter of the block gains a leading axis
named `layers`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

_CHECKPOINT: dict[str, Callable] = {
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False
    ),
    "full": lambda f: jax.checkpoint(f, prevent_cse=False),
}
REMAT_POLICIES = tuple(_CHECKPOINT)


class Stack(nnx.Module):
    """`depth` blocks made by `make(rngs)`, each from a key of its own, kept as one block.

    `self.block` has the structure of one block; its parameters are `[depth, ...]`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
        if depth < 1:
            raise ValueError(f"Stack needs depth >= 1, got {depth}")
        graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
        keys = jax.random.split(rngs.params(), depth)
        state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(keys)

        def name_leading_axis(v: nnx.Variable) -> nnx.Variable:
            v = v.copy()
            v.set_metadata("axes", ("layers", *v.get_metadata("axes")))
            return v

        state = jax.tree.map(
            name_leading_axis, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
        self.block: Any = nnx.merge(graph, state)
        self.depth = depth

    def scan(
        self,
        body: Callable[[Any, Any, Any], tuple[Any, Any]],
        carry: Any,
        xs: Any = None,
        *,
        remat: str = "none",
    ) -> tuple[Any, Any]:
        """`lax.scan` of `body(block, carry, x) -> (carry, y)` over the depth.

        Args:
          body: sees the block with the parameters of one layer.
          carry: as in `lax.scan`.
          xs: pytree with leading axis `depth`, or None.
          remat: what the backward pass recomputes: "none" keeps all activations, "dots" keeps
            only the results of matrix products, "full" keeps only the carry.

        Raises:
          ValueError: unknown `remat`.
        """
        if remat not in _CHECKPOINT:
            raise ValueError(f"unknown remat policy {remat!r}; expected one of {REMAT_POLICIES}")
        graph, state = nnx.split(self.block)

        def step(carry, layer):
            state, x = layer
            return body(nnx.merge(graph, state), carry, x)

        return jax.lax.scan(_CHECKPOINT[remat](step), carry, (state, xs))
