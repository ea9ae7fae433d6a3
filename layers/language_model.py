"""What language models share, whatever their blocks are: table, depth, last norm, head."""

from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hackle.layers.embedding import Embedding, project_to_vocabulary
from hackle.layers.linear import Linear
from hackle.layers.norm import RMSNorm
from hackle.layers.stack import REMAT_POLICIES, Stack


class BranchIds(Protocol):
    """Branch structure of token rows: int32 `[B, depth, L]` twice, and positions `[B, L]`."""

    block: jax.Array
    path: jax.Array
    position: jax.Array


class LanguageModel(nnx.Module):
    """embedding -> depth x block -> norm -> head; a subclass runs the blocks.

    Args:
      block: makes one block, `block(rngs)`.
      vocab_size, width, depth: V, D, N.
      norm_eps: of the last RMSNorm.
      tie_embeddings: the head is the embedding table.
      embedding_std: standard deviation of the table's first entries.
      remat: what the backward pass recomputes, one of `layers.REMAT_POLICIES`.

    Raises:
      ValueError: unknown `remat`, or a size is not positive.
    """

    config: Any  # of the subclass

    def __init__(
        self,
        block: Callable[[nnx.Rngs], nnx.Module],
        *,
        vocab_size: int,
        width: int,
        depth: int,
        norm_eps: float,
        tie_embeddings: bool,
        embedding_std: float = 0.02,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r} is not one of {REMAT_POLICIES}")
        self.embedding = Embedding(vocab_size, width, init_std=embedding_std, rngs=rngs)
        self.blocks = Stack(block, depth, rngs=rngs)
        self.final_norm = RMSNorm(width, norm_eps, rngs=rngs)
        self.head = (
            None
            if tie_embeddings
            else Linear((width,), (vocab_size,), ("embed", "vocab"), rngs=rngs)
        )
        self.remat = remat

    @classmethod
    def with_state(cls, config: Any, state: nnx.State) -> Self:
        """The model of `config` with these arrays, which are shared and not copied."""
        make: Any = cls  # a subclass takes its config
        graph = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))[0]
        return nnx.merge(graph, state)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branches: BranchIds | None = None,
    ) -> jax.Array:
        """Logits float32 `[B, L, V]` of the next token; arguments as in `features`."""
        return self.logits(
            self.features(tokens, positions=positions, segment_ids=segment_ids, branches=branches)
        )

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branches: BranchIds | None = None,
    ) -> jax.Array:
        """What the head reads: `[B, L, D]` of int tokens `[B, L]`."""
        raise NotImplementedError

    def logits(self, features: jax.Array) -> jax.Array:
        """Logits, float32 (or wider) `[..., V]`, of features `[..., D]`."""
        if self.head is None:
            return self.embedding.attend(features)
        return project_to_vocabulary(features, self.head.weight[...])

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> Any:
        """An empty cache for `batch` rows of up to `length` tokens."""
        raise NotImplementedError

    def extend(
        self, tokens: jax.Array, cache: Any, *, positions: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Features `[B, n, D]` of tokens that follow those in the cache, and the new cache.

        Positions of -1 mark padding.
        """
        raise NotImplementedError


def check_rows(tokens: jax.Array, **others: jax.Array | None) -> None:
    """Raises ValueError unless `tokens` are integers `[B, L]` and the others have their shape."""
    if not hasattr(tokens, "shape"):
        raise ValueError(f"tokens must be an array of integers [B, L], got {type(tokens).__name__}")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, L], got {tokens.dtype} {tokens.shape}")
    for name, array in others.items():
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} has shape {array.shape}, but tokens have {tokens.shape}")


def check_branches(tokens: jax.Array, branches: BranchIds) -> None:
    """Raises ValueError unless `branches` describe the rows of `tokens [B, L]`."""
    rows, length = tokens.shape
    ids = {"block": branches.block.shape, "path": branches.path.shape}
    for name, shape in ids.items():
        if len(shape) != 3 or (shape[0], shape[2]) != (rows, length) or shape != ids["block"]:
            raise ValueError(
                f"branches.{name} has shape {shape}; expected [B, depth, L] for tokens of {rows} x "
                f"{length}, and as many depths in both"
            )
    check_rows(tokens, **{"branches.position": branches.position})
