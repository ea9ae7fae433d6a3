"""One-layer models that answer at every token: ParaRNN's on its synthetic tasks (arXiv 2510.21450),
and a transformer's layer beside them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers import Embedding, Linear, RMSNorm, project_to_vocabulary
from hackle.layers.attention import masks
from hackle.layers.convolution import CausalConv
from hackle.layers.decoder import DecoderBlock
from hackle.zoo.errors import UserError
from hackle.zoo.pararnn.modeling import CELLS, ParaRNNBlock, RecurrentMixer
from hackle.zoo.tasks.setups import Setup

MODELS = (*CELLS, "transformer")
WIDTH = 64
HEADS = 4
TAPS = 4
NORM_EPS = 1e-6


class TokenClassifier(nnx.Module):
    """embedding -> layer -> norm -> head: `tokens [B, T] -> logits [B, T, C]`.

    Args:
      layer: makes what maps `[B, T, WIDTH]` to the same.
      vocab_size, classes: V, C.
      add_positions: as in `Setup`.
    """

    def __init__(
        self,
        layer: Callable[[nnx.Rngs], nnx.Module],
        vocab_size: int,
        classes: int,
        *,
        add_positions: bool,
        rngs: nnx.Rngs,
    ):
        self.embedding = Embedding(vocab_size, WIDTH, init_std=1.0, rngs=rngs)
        self.layer = layer(rngs)
        self.final_norm = RMSNorm(WIDTH, NORM_EPS, rngs=rngs)
        self.head = Linear((WIDTH,), (classes,), ("embed", "vocab"), rngs=rngs)
        self.add_positions = add_positions

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits float32 `[B, T, C]` of int tokens `[B, T]`."""
        x = self.embedding(tokens)
        if self.add_positions:
            x = x + sinusoids(tokens.shape[1], WIDTH)
        return project_to_vocabulary(self.final_norm(self.layer(x)), self.head.weight[...])


class NormedCell(nnx.Module):
    """norm -> cell, and nothing else: so the parameter counts are those of the paper's table."""

    def __init__(self, cell: str, *, method: str | None, rngs: nnx.Rngs):
        self.norm = RMSNorm(WIDTH, NORM_EPS, rngs=rngs)
        self.cell = CELLS[cell](WIDTH, WIDTH, heads=HEADS, method=method, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.cell(self.norm(x))[0]


class NormedMixer(nnx.Module):
    """norm -> mixer of the ParaRNN language model: convolution, cell, gate."""

    def __init__(self, cell: str, *, method: str | None, rngs: nnx.Rngs):
        kind: Any = CELLS[cell]
        self.norm = RMSNorm(WIDTH, NORM_EPS, rngs=rngs)
        self.mixer = RecurrentMixer(
            kind, WIDTH, heads=HEADS, taps=TAPS, norm_eps=NORM_EPS, method=method, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mixer(self.norm(x))


class TransformerLayer(nnx.Module):
    """The block of the zoo's transformers, with rotary positions; before it, where a recurrence has
    a convolution in front, `x + conv(norm(x))`, so that both see the tokens just before."""

    def __init__(self, *, convolved: bool, rngs: nnx.Rngs):
        self.norm = RMSNorm(WIDTH, NORM_EPS, rngs=rngs) if convolved else None
        self.conv = CausalConv(WIDTH, TAPS, rngs=rngs) if convolved else None
        # The MLP brings it to the 31.8k parameters of the paper's on parity.
        self.block = DecoderBlock(
            WIDTH,
            77,
            heads=HEADS,
            kv_heads=HEADS,
            head_width=WIDTH // HEADS,
            bias=True,
            norm_eps=NORM_EPS,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.norm is not None and self.conv is not None:
            x = x + self.conv(self.norm(x))[0]
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.block(x, positions, masks.Causal())


def sinusoids(length: int, width: int) -> jax.Array:
    """Positional encoding float32 `[T, D]` of arXiv 1706.03762: D / 2 sines, as many cosines."""
    angles = jnp.arange(length)[:, None] / 10000.0 ** (jnp.arange(0, width, 2) / width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def make_model(
    name: str, setup: Setup, *, method: str | None = None, rngs: nnx.Rngs
) -> TokenClassifier:
    """The model called `name`, one of `MODELS`, for a task.

    `Setup.mlp_width` and `method` do not concern the transformer, which always has its MLP.

    Raises:
      UserError: no such name.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")

    def layer(rngs: nnx.Rngs) -> nnx.Module:
        if name == "transformer":
            return TransformerLayer(convolved=not setup.cell_only, rngs=rngs)
        if setup.cell_only:
            return NormedCell(name, method=method, rngs=rngs)
        if not setup.mlp_width:
            return NormedMixer(name, method=method, rngs=rngs)
        return ParaRNNBlock(
            CELLS[name],
            WIDTH,
            setup.mlp_width,
            heads=HEADS,
            taps=TAPS,
            norm_eps=NORM_EPS,
            method=method,
            rngs=rngs,
        )

    task = setup.task
    return TokenClassifier(
        layer, task.vocab_size, task.classes, add_positions=setup.add_positions, rngs=rngs
    )
