"""A whole causal decoder from plain arguments: what the language models of the zoo share.

embedding -> split -> depth x block -> norm -> join -> head. A dense model splits and joins
nothing; ParScale splits into streams and joins them.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hackle.layers import masks
from hackle.layers.cache import KeyValueCache, key_value_cache
from hackle.layers.decoder import DecoderBlock, constrain_residual
from hackle.layers.language_model import (
    BranchIds,
    LanguageModel,
    check_branches,
    check_rows,
)
from hackle.layers.rotary import Llama3Scaling


class CausalDecoder(LanguageModel):
    """Pre-norm decoder with rotary positions, grouped queries and gated MLPs.

    Args:
      vocab_size, width, mlp_width, depth, heads, kv_heads, head_width: V, D, F, N, H, K, E.
      rope_theta, norm_eps: constants of rotary positions and RMSNorm.
      tie_embeddings: the head is the embedding table.
      qkv_bias: query, key and value projections have a bias.
      qk_norm: every head of query and key is normed before it is rotated.
      rope_scaling: what is done to the rotary frequencies; None leaves them.
      streams, prefix_length: blocks for P streams, each with a learned prefix; see
        `layers.SelfAttention`. A subclass says how to `split` and `join`.
      embedding_std: standard deviation of the table's first entries.
      remat: what the backward pass recomputes, one of `layers.REMAT_POLICIES`.
      attention: implementation passed to `layers.attention`.

    Raises:
      ValueError: a size is not positive, sizes do not fit each other, or `remat` or `attention` is
        unknown.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        mlp_width: int,
        depth: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        rope_theta: float,
        norm_eps: float,
        tie_embeddings: bool,
        qkv_bias: bool,
        qk_norm: bool = False,
        rope_scaling: Llama3Scaling | None = None,
        streams: int = 1,
        prefix_length: int = 0,
        embedding_std: float = 0.02,
        remat: str = "none",
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads={heads} is not a positive multiple of kv_heads={kv_heads}")
        if head_width < 2 or head_width % 2:
            raise ValueError(f"head_width={head_width} must be even, for rotary positions")
        super().__init__(
            lambda rngs: DecoderBlock(
                width,
                mlp_width,
                norm_eps=norm_eps,
                heads=heads,
                kv_heads=kv_heads,
                head_width=head_width,
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                bias=qkv_bias,
                qk_norm=qk_norm,
                streams=streams,
                prefix_length=prefix_length,
                implementation=attention,
                rngs=rngs,
            ),
            vocab_size=vocab_size,
            width=width,
            depth=depth,
            norm_eps=norm_eps,
            tie_embeddings=tie_embeddings,
            embedding_std=embedding_std,
            remat=remat,
            rngs=rngs,
        )
        self.kv_heads = kv_heads
        self.head_width = head_width
        self.streams = streams

    def split(self, x: jax.Array) -> jax.Array:
        """What happens to the embedded tokens `[B, L, D]` before the blocks."""
        return x

    def join(self, x: jax.Array) -> jax.Array:
        """What turns the output of the blocks, normed, into `[B, L, D]`."""
        return x

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branches: BranchIds | None = None,
    ) -> jax.Array:
        """What the head reads: `[B, L, D]` after the final norm and the join.

        Args:
          tokens: int `[B, L]`.
          positions: int `[B, L]`. None counts from 0 in each segment, or takes the branches'.
          segment_ids: int `[B, L]`, documents packed in one row; tokens of different ids do not
            see each other, and id 0 is padding. No two documents of a row have one id. None is
            one document a row.
          branches: Multiverse's branch structure; sibling paths do not see each other.

        Raises:
          ValueError: an array does not have the shape that it should.
        """
        check_rows(tokens, positions=positions, segment_ids=segment_ids)
        mask: masks.Mask = masks.Causal()
        if segment_ids is not None:
            mask = mask & masks.Segments(segment_ids, segment_ids)
        if branches is not None:
            check_branches(tokens, branches)
            mask = mask & masks.Branches(
                branches.block, branches.path, branches.block, branches.path
            )
            positions = branches.position if positions is None else positions
        if positions is None:
            positions = segment_positions(tokens.shape, segment_ids)
        x = constrain_residual(self.split(self.embedding(tokens)))
        x, _ = self.blocks.scan(
            lambda block, x, _: (block(x, positions, mask), None), x, remat=self.remat
        )
        return self.join(self.final_norm(x))

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None, *, branch_depth: int = 0
    ) -> KeyValueCache:
        """An empty cache for `batch` rows of up to `length` tokens.

        It holds the prefixes of the streams already. `dtype` None is that of the parameters.
        `branch_depth` is that of the branches of its tokens; 0 where they have none.
        """
        prefix = self.blocks.block.attention.prefix
        return key_value_cache(
            self.blocks.depth,
            (self.streams,) if self.streams > 1 else (),
            batch,
            length,
            self.kv_heads,
            self.head_width,
            dtype or self.embedding.weight[...].dtype,
            prefix=None if prefix is None else (prefix.key[...], prefix.value[...]),
            branch_depth=branch_depth,
        )

    def extend(
        self,
        tokens: jax.Array,
        cache: KeyValueCache,
        *,
        positions: jax.Array | None = None,
        branches: BranchIds | None = None,
    ) -> tuple[jax.Array, KeyValueCache]:
        """Appends tokens `[B, n]` to the cache: features `[B, n, D]` and the grown cache.

        A token sees what stands at its own position or before, in the cache and among the new
        ones, but for sibling paths. So tokens of several paths may come in one call, in any order.

        Args:
          positions: int `[B, n]`, -1 for padding (never seen by others, its features mean
            nothing). None takes the branches', or goes on from the last position of each row.
          branches: of the new tokens, in the strict layout of `layers.multiverse`; needs a cache
            with their depth. None: they are in no path.

        Raises:
          ValueError: shapes do not fit, the cache has no branches or of another depth, or (outside
            jit) it is too small.
        """
        check_rows(tokens, positions=positions)
        if branches is not None:
            check_branches(tokens, branches)
            positions = branches.position if positions is None else positions
        if positions is None:
            positions = cache.next_position[:, None] + jnp.arange(tokens.shape[1])
        cache = cache.admit(positions, branches)
        mask = cache.mask(positions, branches)

        def body(block, carry, layer):
            x, cache = carry
            return block.extend(x, positions, mask, cache, layer), None

        layers = jnp.arange(self.blocks.depth)
        x = self.split(self.embedding(tokens))
        (x, cache), _ = self.blocks.scan(body, (x, cache), layers)
        return self.join(self.final_norm(x)), cache.advance(tokens.shape[1])


def segment_positions(shape: tuple[int, ...], segment_ids: jax.Array | None) -> jax.Array:
    """Positions int32 `[B, L]` that count from 0 in every run of equal segment ids."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segment_ids is None:
        return index
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
