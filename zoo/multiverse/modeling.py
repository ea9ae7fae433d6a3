"""Multiverse language model (arXiv 2506.09991): paths of one text side by side, then joined.

A dense decoder whose vocabulary has the tags that open and close paths. With block_d and path_d of
`hackle.layers.multiverse.branch_structure`, token t sees token s where

    s <= t  and, at no depth d,  block_d(t) = block_d(s) != 0  and  path_d(t) != path_d(s)

and siblings start at one rotary position. Without branches it is the dense model.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from hackle.layers.causal_decoder import CausalDecoder
from hackle.layers.multiverse import Tag, Tags, embed_tags
from hackle.layers.rotary import Llama3Scaling


@dataclasses.dataclass(frozen=True)
class MultiverseConfig:
    """What the model is; the last three fields say how it starts and runs.

    Attributes:
      max_length: the rotary range the model is meant for, in tokens of the longest path.
      qkv_bias, qk_norm, rope_scaling: what distinguishes the trunks; see `zoo/dense`.
      tags: the token ids of the tags.
      embedding_std: standard deviation of the embedding's first entries; two configs that differ
        in it alone are equal, and published files do not hold it.
      remat: what the backward pass recomputes, one of `layers.REMAT_POLICIES`.
      attention: implementation passed to `layers.attention`; None chooses.

    A mapping of the fields of `rope_scaling` or `tags`, as JSON files hold them, becomes one.

    Raises:
      ValueError: `tags` or `rope_scaling` are not what they should be.
    """

    vocab_size: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    max_length: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_scaling: Llama3Scaling | None = None
    tags: Tags = dataclasses.field(default_factory=Tags)
    embedding_std: float = dataclasses.field(default=0.02, compare=False)
    remat: str = "none"
    attention: str | None = None

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", Llama3Scaling(**self.rope_scaling))
        if isinstance(self.tags, Mapping):
            object.__setattr__(self, "tags", _tags(self.tags))
        if not isinstance(self.tags, Tags):
            raise ValueError(f"tags={self.tags!r}; expected layers.multiverse.Tags")

    def parameter_count(self, embedding: bool = True) -> int:
        """Exact number of parameters; `embedding=False` leaves out the table and the head."""
        d, e = self.width, self.head_width
        heads = self.heads + 2 * self.kv_heads
        attention = d * e * (heads + self.heads)
        attention += (e * heads if self.qkv_bias else 0) + (2 * e if self.qk_norm else 0)
        count = self.depth * (attention + 3 * d * self.mlp_width + 2 * d) + d
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return count + (tables if embedding else 0)

    @classmethod
    def tiny(cls, **changes) -> "MultiverseConfig":
        """Small enough to learn the generated problems; 128 characters, and then the tags."""
        sizes = dict(vocab_size=192, width=128, mlp_width=384, depth=4, heads=4, kv_heads=2)
        rest = dict(head_width=32, max_length=2048, tags=Tags.numbered(128), embedding_std=0.08)
        return cls(**{**sizes, **rest, **changes})

    @classmethod
    def multiverse_32b(cls, **changes) -> "MultiverseConfig":
        """Qwen2.5-32B-Instruct with the tags, its padded table shrunk from 152,064 rows."""
        sizes = dict(vocab_size=151680, width=5120, mlp_width=27648, depth=64, heads=40, kv_heads=8)
        rest = dict(head_width=128, max_length=32768, rope_theta=1e6, tie_embeddings=False)
        return cls(**{**sizes, **rest, **changes})


class MultiverseLM(CausalDecoder):
    """Causal language model `tokens [B, L] -> logits [B, L, V]`; see `CausalDecoder`.

    `branches` of a call is what `branch_structure(tokens, model.config.tags)` gives. Parameters
    are float32 until cast.

    Raises:
      ValueError: the vocabulary has no row for a tag.
    """

    def __init__(self, config: MultiverseConfig, *, rngs: nnx.Rngs):
        if (reason := config.tags.beyond(config.vocab_size)) is not None:
            raise ValueError(f"{reason}, but vocab_size={config.vocab_size}")
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            mlp_width=config.mlp_width,
            depth=config.depth,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            rope_theta=config.rope_theta,
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            rope_scaling=config.rope_scaling,
            embedding_std=config.embedding_std,
            remat=config.remat,
            attention=config.attention,
            rngs=rngs,
        )
        self.config = config


class Tokenizer(Protocol):
    """What `add_tags` needs to know of a tokenizer; `hackle.zoo.data.Tokenizer` is one.

    `vocab_size` is one more than the largest id, `encode` takes every text for a plain one.
    """

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def as_multiverse(
    trunk: CausalDecoder,
    tags: Tags = Tags(),  # noqa: B008 - frozen
) -> MultiverseLM:
    """A dense model whose table has trained rows for the tags, as the Multiverse model that it is.

    The arrays are shared and not copied. Published Multiverse weights are stored as a dense model.

    Raises:
      ValueError: the trunk has no row for a tag, or is not one decoder.
    """
    return MultiverseLM.with_state(_config(trunk, tags), nnx.state(trunk))


def add_tags(
    trunk: CausalDecoder,
    tokenizer: Tokenizer,
    tags: Tags = Tags(),  # noqa: B008 - frozen
    *,
    multiple: int = 64,
) -> MultiverseLM:
    """A Multiverse model to be fine-tuned from a dense one, whose tokenizer has no tags so far.

    As the published code does it: the table gets as many rows as tokenizer and tags need, rounded
    up to a `multiple`, so that a padded table may shrink (Qwen2.5: 152,064 to 151,680 rows); the
    row of a tag is the mean of the rows of its word, and so is that of a head that is not tied.
    Rows that are new and of no token are the mean of all. The other arrays are shared.

    Args:
      trunk: with the vocabulary of `tokenizer`.
      tokenizer: may have the tags already; what else has their ids is refused.
      tags: `Tags()` fits Qwen2.5's tokenizer; `Tags.numbered(tokenizer.vocab_size)` fits any that
        has no tags.

    Raises:
      ValueError: an id of a tag is another token's, the trunk has fewer rows than the tokenizer
        had tokens, has tags already, or is not one decoder.
    """
    if isinstance(trunk, MultiverseLM):
        raise ValueError("the model has tags already, and adding them would forget their rows")
    config, known, ids = _config(trunk, tags), tokenizer.vocab_size, tags.tokens()
    for text, token in ids.items():
        if token < known and tokenizer.decode([token]) != text:
            raise ValueError(
                f"tag {text} has token id {token}, which is {tokenizer.decode([token])!r} in the "
                f"tokenizer; its free ids start at {known}"
            )
    last = max(set(range(known)) - set(ids.values()), default=-1)
    if last >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has a token of id {last}, but the trunk vocab_size={config.vocab_size}"
        )
    rows = multiple * -(-max(known, 1 + max(ids.values())) // multiple)

    def fit(table: jax.Array) -> jax.Array:
        return embed_tags(_resized(table, rows), tags, tokenizer.encode)

    flat = dict(nnx.to_flat_state(nnx.state(trunk)))
    table = flat["embedding", "weight"]
    flat["embedding", "weight"] = table.replace(fit(table[...]))
    if trunk.head is not None:
        table = flat["head", "weight"]
        flat["head", "weight"] = table.replace(fit(table[...].T).T)
    config = dataclasses.replace(config, vocab_size=rows)
    return MultiverseLM.with_state(config, nnx.from_flat_state(flat))


def _resized(table: jax.Array, rows: int) -> jax.Array:
    """`[V, D] -> [rows, D]`: cut, or with the mean of all rows as the new ones."""
    missing = rows - table.shape[0]
    if missing <= 0:
        return table[:rows]
    mean = jnp.mean(table, axis=0, keepdims=True, dtype=jnp.promote_types(table.dtype, jnp.float32))
    return jnp.concatenate([table, jnp.repeat(mean.astype(table.dtype), missing, axis=0)])


def _config(trunk: CausalDecoder, tags: Tags) -> MultiverseConfig:
    if not isinstance(trunk, CausalDecoder):
        raise ValueError(f"{type(trunk).__name__} does not attend; expected a decoder that does")
    config = trunk.config
    if trunk.streams != 1:
        raise ValueError(f"the trunk has {trunk.streams} streams; expected 1")
    fields = {field.name for field in dataclasses.fields(MultiverseConfig)}
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return MultiverseConfig(**{k: v for k, v in known.items() if k in fields} | {"tags": tags})


def _tags(roles: Mapping[str, Any]) -> Tags:
    """Tags of a JSON object: role -> list of [word, id that opens, id that closes]."""
    try:
        return Tags(**{
            role: tuple(
                Tag(str(word), operator.index(first), operator.index(last))
                for word, first, last in found
            )
            for role, found in roles.items()
        })  # fmt: skip
    except TypeError as error:
        raise ValueError(f"tags={dict(roles)}: {error}") from error
