"""ParaRNN language model (arXiv 2510.21450, figure 9): a nonlinear recurrence where others attend.

    mixer(x) = output(norm(cell(silu(conv(input(x)))), gate(x)))
    block(x) = y + mlp(norm(y)),  y = skip * x + mixer(norm(x))
    model    = embedding -> depth x block -> norm -> head

The paper does not say what stands between convolution and cell, nor how the norm is gated: SiLU
and the gated norm of Mamba-2 are our choice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hackle.layers.cache import RecurrentCache
from hackle.layers.convolution import CausalConv
from hackle.layers.decoder import constrain_residual
from hackle.layers.language_model import BranchIds, LanguageModel, check_rows
from hackle.layers.linear import Linear
from hackle.layers.mlp import GatedMLP
from hackle.layers.norm import GatedRMSNorm, RMSNorm
from hackle.layers.parameter import parameter
from hackle.layers.recurrent import ParaGRU, ParaLSTM

CELLS = {"gru": ParaGRU, "lstm": ParaLSTM}


@dataclasses.dataclass(frozen=True)
class ParaRNNConfig:
    """What the model is; the last three fields say how it starts and runs.

    Attributes:
      cell: "gru" or "lstm".
      heads: blocks of the cell's block-diagonal input projection.
      taps: inputs that the convolution sees.
      embedding_std: standard deviation of the embedding's first entries; two configs that differ
        in it alone are equal, and saved files do not hold it.
      remat: what the backward pass recomputes, one of `layers.REMAT_POLICIES`.
      recurrence: method of the recurrence, as in `layers.recurrent`; None chooses.
    """

    cell: str
    vocab_size: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    taps: int = 4
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    embedding_std: float = dataclasses.field(default=0.02, compare=False)
    remat: str = "none"
    recurrence: str | None = None

    def parameter_count(self, embedding: bool = True) -> int:
        """Exact number of parameters; `embedding=False` leaves out the table and the head."""
        d = self.width
        # State weights and biases of three gates, and the LSTM's two peepholes.
        cell = 3 * d * d // self.heads + (6 if self.cell == "gru" else 8) * d
        norms_and_skip = 4 * d
        mixer = 3 * d * d + self.taps * d + cell
        count = self.depth * (mixer + 3 * d * self.mlp_width + norms_and_skip) + d
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return count + (tables if embedding else 0)

    @classmethod
    def tiny(cls, cell: str = "gru", **changes) -> "ParaRNNConfig":
        """Small enough to learn something on a laptop within minutes."""
        sizes = dict(vocab_size=4096, width=128, mlp_width=384, depth=4, heads=4)
        return cls(**{"cell": cell, **sizes, "embedding_std": 0.08, **changes})

    @classmethod
    def _published(
        cls, cell: str, width: int, depth: int, heads: int, **changes
    ) -> "ParaRNNConfig":
        """The paper's vocabulary; its width is that which gives its parameter counts."""
        mlp_width = 256 * -(-int(8 * width / 3) // 256)
        sizes = dict(width=width, mlp_width=mlp_width, depth=depth, heads=heads)
        return cls(**{"cell": cell, "vocab_size": 50432, **sizes, **changes})

    @classmethod
    def pararnn_400m(cls, cell: str = "gru", **changes) -> "ParaRNNConfig":
        return cls._published(cell, 1024, 24, 4, **changes)

    @classmethod
    def pararnn_1b(cls, cell: str = "gru", **changes) -> "ParaRNNConfig":
        return cls._published(cell, 2048, 24, 4, **changes)

    @classmethod
    def pararnn_2_9b(cls, cell: str = "gru", **changes) -> "ParaRNNConfig":
        return cls._published(cell, 2560, 32, 2, **changes)

    @classmethod
    def pararnn_7b(cls, cell: str = "gru", **changes) -> "ParaRNNConfig":
        return cls._published(cell, 4096, 32, 4, **changes)


class RecurrentMixer(nnx.Module):
    """Mixes tokens by a recurrence: what attention is to a transformer, `[B, L, D]` to the same.

    `cell` is `ParaGRU` or `ParaLSTM`; `method` is passed to it.
    """

    def __init__(
        self,
        cell: type[ParaGRU] | type[ParaLSTM],
        width: int,
        *,
        heads: int,
        taps: int,
        norm_eps: float,
        method: str | None,
        rngs: nnx.Rngs,
    ):
        self.input = Linear((width,), (width,), ("embed", "state"), rngs=rngs)
        self.gate = Linear((width,), (width,), ("embed", "state"), rngs=rngs)
        self.conv = CausalConv(width, taps, rngs=rngs)
        self.cell = cell(width, width, heads=heads, method=method, rngs=rngs)
        self.norm = GatedRMSNorm(width, norm_eps, rngs=rngs)
        self.output = Linear((width,), (width,), ("state", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, reset: jax.Array | None = None) -> jax.Array:
        """`reset` bool `[B, L]`: True starts anew."""
        branch, _ = self.conv(self.input(x), reset=reset)
        y, _ = self.cell(jax.nn.silu(branch), reset=reset)
        return self.output(self.norm(y, self.gate(x)))

    def extend(self, x: jax.Array, lengths: jax.Array, memory: tuple) -> tuple[jax.Array, tuple]:
        """As `__call__`, after what `memory` holds: the cell's state and the convolution's tail.

        `lengths` int `[B]`: how many tokens of each row are read.
        """
        state, tail = memory
        branch, tail = self.conv(self.input(x), tail, lengths=lengths)
        branch = jax.nn.silu(branch)
        if x.shape[1] == 1:
            y, after = self.cell.step(branch[:, 0], state)
            y, read = y[:, None], lengths[:, None] > 0
            state = jax.tree.map(lambda new, old: jnp.where(read, new, old), after, state)
        else:
            y, state = self.cell(branch, state, lengths=lengths)
        return self.output(self.norm(y, self.gate(x))), (state, tail)


class ParaRNNBlock(nnx.Module):
    """`y = skip * x + mixer(norm(x))`, then `y + mlp(norm(y))`; `skip` is one number a channel.

    Keyword arguments beyond the two here are those of `RecurrentMixer`.
    """

    def __init__(
        self, cell, width: int, mlp_width: int, *, norm_eps: float, rngs: nnx.Rngs, **mixer
    ):
        self.mixer_norm = RMSNorm(width, norm_eps, rngs=rngs)
        self.mixer = RecurrentMixer(cell, width, norm_eps=norm_eps, rngs=rngs, **mixer)
        self.skip_scale = parameter(rngs, (width,), ("embed",), nnx.initializers.ones)
        self.mlp_norm = RMSNorm(width, norm_eps, rngs=rngs)
        self.mlp = GatedMLP(width, mlp_width, rngs=rngs)

    def __call__(self, x: jax.Array, reset: jax.Array | None = None) -> jax.Array:
        """`[B, L, D]` to the same; see `RecurrentMixer`."""
        return self._join(x, self.mixer(self.mixer_norm(x), reset))

    def extend(self, x: jax.Array, lengths: jax.Array, memory: tuple) -> tuple[jax.Array, tuple]:
        """As `__call__`, for tokens that follow those in the cache; see `RecurrentMixer`."""
        mixed, memory = self.mixer.extend(self.mixer_norm(x), lengths, memory)
        return self._join(x, mixed), memory

    def _join(self, x: jax.Array, mixed: jax.Array) -> jax.Array:
        x = constrain_residual(self.skip_scale[...].astype(x.dtype) * x + mixed)
        return constrain_residual(x + self.mlp(self.mlp_norm(x)))


class ParaRNNLM(LanguageModel):
    """Causal language model `tokens [B, L] -> logits [B, L, V]`, of constant memory per token.

    Parameters are float32 until cast.

    Raises:
      ValueError: unknown cell, a width that the heads do not divide, or a size is not positive.
    """

    def __init__(self, config: ParaRNNConfig, *, rngs: nnx.Rngs):
        if config.cell not in CELLS:
            raise ValueError(f"cell={config.cell!r} is not one of {', '.join(CELLS)}")
        super().__init__(
            lambda rngs: ParaRNNBlock(
                CELLS[config.cell],
                config.width,
                config.mlp_width,
                heads=config.heads,
                taps=config.taps,
                norm_eps=config.norm_eps,
                method=config.recurrence,
                rngs=rngs,
            ),
            vocab_size=config.vocab_size,
            width=config.width,
            depth=config.depth,
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
            embedding_std=config.embedding_std,
            remat=config.remat,
            rngs=rngs,
        )
        self.config = config

    def features(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branches: BranchIds | None = None,
    ) -> jax.Array:
        """What the head reads: `[B, L, D]` after the final norm.

        Args:
          tokens: int `[B, L]`.
          positions: int `[B, L]`, taken for the sake of one signature and not used: a recurrence
            knows the order of tokens by itself.
          segment_ids: int `[B, L]`, documents packed in one row; where the id changes, the
            recurrence starts anew. None is one document a row.
          branches: must be None.

        Raises:
          ValueError: an array does not have the shape that it should, or there are branches.
        """
        check_rows(tokens, positions=positions, segment_ids=segment_ids)
        if branches is not None:
            raise ValueError(
                "branches: a recurrence reads one token after the other and has no branches; "
                "expected None"
            )
        reset = None
        if segment_ids is not None:
            reset = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        x = constrain_residual(self.embedding(tokens))
        x, _ = self.blocks.scan(lambda block, x, _: (block(x, reset), None), x, remat=self.remat)
        return self.final_norm(x)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> RecurrentCache:
        """An empty cache for `batch` rows, of the same size for any `length`.

        `dtype` None is that of the parameters; states are float32.
        """
        if batch < 1 or length < 1:
            raise ValueError(f"cache needs batch and length >= 1, got {batch} and {length}")
        depth, taps, width = self.config.depth, self.config.taps, self.config.width
        state = self.blocks.block.mixer.cell.initial_state(batch)
        return RecurrentCache(
            states=jax.tree.map(lambda x: jnp.tile(x, (depth, 1, 1)), state),
            tails=jnp.zeros(
                (depth, batch, taps - 1, width), dtype or self.embedding.weight[...].dtype
            ),
        )

    def extend(
        self,
        tokens: jax.Array,
        cache: RecurrentCache,
        *,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, RecurrentCache]:
        """Reads tokens `[B, n]` after those in the cache: features `[B, n, D]`, and the new cache.

        Args:
          positions: int `[B, n]`, -1 for padding, which changes nothing and whose features mean
            nothing. Other positions are not used. None is no padding.

        Raises:
          ValueError: shapes do not fit.
        """
        check_rows(tokens, positions=positions)
        if tokens.shape[0] != cache.batch:
            raise ValueError(f"cache holds {cache.batch} rows, got tokens of {tokens.shape[0]}")
        if positions is None:
            positions = jnp.zeros(tokens.shape, jnp.int32)
        # A recurrence cannot wait: tokens go first, padding to the end, and back afterwards.
        lengths = jnp.sum(positions >= 0, axis=1)
        order = jnp.argsort(positions < 0, axis=1, stable=True)
        tokens = jnp.take_along_axis(tokens, order, axis=1)

        def body(block, x, memory):
            return block.extend(x, lengths, memory)

        x, memory = self.blocks.scan(body, self.embedding(tokens), (cache.states, cache.tails))
        x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        return self.final_norm(x), RecurrentCache(*memory)
