"""One-layer models that answer at every token: ParaRNN's on its synthetic tasks (arXiv 2510.21450),
and the zoo's transformer beside them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers import Embedding, Linear, RMSNorm, project_to_vocabulary
from hackle.zoo.dense.modeling import DenseConfig, DenseLM
from hackle.zoo.errors import UserError
from hackle.zoo.pararnn.modeling import CELLS, ParaRNNBlock, RecurrentMixer
from hackle.zoo.tasks.setups import Setup

MODELS = (*CELLS, "transformer")
WIDTH = 64
HEADS = 4
TAPS = 4


class TokenClassifier(nnx.Module):
    """embedding -> norm -> mixer -> norm -> head: `tokens [B, T] -> logits [B, T, C]`.

    The mixer is that of the ParaRNN language model, or its cell alone; with an MLP, the model's
    whole block stands for norm and mixer. With the two norms the parameter counts are those of
    the paper's table, which it has for a cell alone.

    Args:
      cell: "gru" or "lstm".
      vocab_size, classes: V, C.
      cell_only, mlp_width, add_positions: as in `Setup`.
      method: of the recurrence, as `hackle.layers.recurrent.gru` takes it.
    """

    def __init__(
        self,
        cell: str,
        vocab_size: int,
        classes: int,
        *,
        cell_only: bool,
        mlp_width: int,
        add_positions: bool,
        method: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.embedding = Embedding(vocab_size, WIDTH, init_std=1.0, rngs=rngs)
        kind: Any = CELLS[cell]
        around: Any = dict(heads=HEADS, taps=TAPS, norm_eps=1e-6, method=method, rngs=rngs)
        self.block = ParaRNNBlock(kind, WIDTH, mlp_width, **around) if mlp_width else None
        if not mlp_width:
            self.norm = RMSNorm(WIDTH, rngs=rngs)
            self.mixer = (
                kind(WIDTH, WIDTH, heads=HEADS, method=method, rngs=rngs)
                if cell_only
                else RecurrentMixer(kind, WIDTH, **around)
            )
        self.final_norm = RMSNorm(WIDTH, rngs=rngs)
        self.head = Linear((WIDTH,), (classes,), ("embed", "vocab"), rngs=rngs)
        self.cell_only = cell_only
        self.add_positions = add_positions

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits float32 `[B, T, C]` of int tokens `[B, T]`."""
        x = self.embedding(tokens)
        if self.add_positions:
            x = x + sinusoids(tokens.shape[1], WIDTH)
        if self.block is not None:
            x = self.block(x)
        else:
            x = self.mixer(self.norm(x))
            x = x[0] if self.cell_only else x  # a cell gives its last state besides
        return project_to_vocabulary(self.final_norm(x), self.head.weight[...])


def sinusoids(length: int, width: int) -> jax.Array:
    """Positional encoding float32 `[T, D]` of arXiv 1706.03762: D / 2 sines, as many cosines."""
    angles = jnp.arange(length)[:, None] / 10000.0 ** (jnp.arange(0, width, 2) / width)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def make_model(
    name: str, setup: Setup, *, method: str | None = None, rngs: nnx.Rngs
) -> TokenClassifier | DenseLM:
    """The model called `name`, one of `MODELS`, for a task.

    The transformer is a `DenseLM` of one layer, with rotary positions and an MLP that brings it
    to the paper's 31.8k parameters on parity; `method` does not concern it.

    Raises:
      UserError: no such name.
    """
    task = setup.task
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; expected one of {', '.join(MODELS)}")
    if name in CELLS:
        return TokenClassifier(
            name,
            task.vocab_size,
            task.classes,
            cell_only=setup.cell_only,
            mlp_width=setup.mlp_width,
            add_positions=setup.add_positions,
            method=method,
            rngs=rngs,
        )
    config = DenseConfig(
        # One table size for what is read and what is answered: a class more costs nothing.
        vocab_size=max(task.vocab_size, task.classes),
        width=WIDTH,
        mlp_width=77,
        depth=1,
        heads=HEADS,
        kv_heads=HEADS,
        head_width=WIDTH // HEADS,
        max_length=task.length,
        tie_embeddings=False,
        embedding_std=1.0,
    )
    return DenseLM(config, rngs=rngs)
