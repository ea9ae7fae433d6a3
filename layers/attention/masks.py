"""Which keys a query may see, described by integers per token and composed with `&`.

A mask never holds an L x S array. `visible(query_index, key_index)` answers for a tile, and every
implementation of `attention` asks only for the tiles that it works on. Masks are pytrees whose
arrays all have the batch as leading axis.
"""

import dataclasses

import jax
import jax.numpy as jnp


class Mask:
    """Base of all masks."""

    def check(self, queries: int, keys: int) -> None:
        """Raises ValueError when the mask does not describe `queries` x `keys` by integers."""

    def visible(self, query_index: jax.Array, key_index: jax.Array) -> jax.Array:
        """Bool `[B or 1, l, s]` for the queries `query_index [l]` and keys `key_index [s]`."""
        raise NotImplementedError

    def dense(self, queries: int, keys: int) -> jax.Array:
        """The whole bool array `[B or 1, queries, keys]`; for tests and the reference only."""
        self.check(queries, keys)
        return self.visible(jnp.arange(queries), jnp.arange(keys))

    def check_batch(self, batch: int) -> None:
        """Raises ValueError unless all arrays have `batch` rows, or one for all of them."""
        for path, ids in jax.tree_util.tree_leaves_with_path(self):
            # A mask of a user's own that is no pytree is itself a leaf.
            if not isinstance(ids, Mask) and ids.shape[0] not in (1, batch):
                name = f"masks.{type(self).__name__}{jax.tree_util.keystr(path)}"
                raise ValueError(f"{name} has {ids.shape[0]} rows, but the batch has {batch}")

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        return All((*_parts(self), *_parts(other)))


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, All) else (mask,)


def _register(cls):
    static = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]
    data = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)


def _describes(name: str, ids: jax.Array, axes: str, tokens: int | None = None) -> None:
    """Raises ValueError unless `ids` are integers with these axes, the last one of `tokens`."""
    if not hasattr(ids, "ndim"):
        raise ValueError(f"{name} must be an array of integers [{axes}], got {ids!r}")
    if ids.ndim != len(axes.split(", ")) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [{axes}], got {ids.dtype} {ids.shape}")
    if tokens is not None and ids.shape[-1] != tokens:
        raise ValueError(f"{name} describes {ids.shape[-1]} tokens, but the array has {tokens}")


@_register
@dataclasses.dataclass(frozen=True)
class All(Mask):
    """Visible where every part says so; what `&` builds."""

    parts: tuple[Mask, ...]

    def check(self, queries, keys):
        for part in self.parts:
            part.check(queries, keys)

    def visible(self, query_index, key_index):
        result = self.parts[0].visible(query_index, key_index)
        for part in self.parts[1:]:
            result = result & part.visible(query_index, key_index)
        return result


@_register
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Query i sees keys 0..i. Needs as many queries as keys: use `Positions` otherwise."""

    def check(self, queries, keys):
        if queries != keys:
            raise ValueError(
                f"masks.Causal needs as many queries as keys, got {queries} and {keys}; "
                "say where they are with masks.Positions"
            )

    def visible(self, query_index, key_index):
        return (query_index[:, None] >= key_index[None, :])[None]


@_register
@dataclasses.dataclass(frozen=True)
class Padding(Mask):
    """Keys at and after `lengths` (int `[B]`) are hidden."""

    lengths: jax.Array

    def check(self, queries, keys):
        _describes("masks.Padding.lengths", self.lengths, "B")

    def visible(self, query_index, key_index):
        seen = key_index[None, None, :] < self.lengths[:, None, None]
        return jnp.broadcast_to(seen, (seen.shape[0], query_index.shape[0], key_index.shape[0]))


@_register
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """A query sees keys of its own segment; ids are int `[B, L]` and `[B, S]`."""

    query_ids: jax.Array
    key_ids: jax.Array

    def check(self, queries, keys):
        _describes("masks.Segments.query_ids", self.query_ids, "B, L", queries)
        _describes("masks.Segments.key_ids", self.key_ids, "B, S", keys)

    def visible(self, query_index, key_index):
        query = jnp.take(self.query_ids, query_index, axis=-1, mode="clip")
        key = jnp.take(self.key_ids, key_index, axis=-1, mode="clip")
        return query[:, :, None] == key[:, None, :]


@_register
@dataclasses.dataclass(frozen=True)
class Positions(Mask):
    """A query sees keys at its own position or before; int `[B, L]` and `[B, S]`."""

    query_positions: jax.Array
    key_positions: jax.Array

    def check(self, queries, keys):
        _describes("masks.Positions.query_positions", self.query_positions, "B, L", queries)
        _describes("masks.Positions.key_positions", self.key_positions, "B, S", keys)

    def visible(self, query_index, key_index):
        query = jnp.take(self.query_positions, query_index, axis=-1, mode="clip")
        key = jnp.take(self.key_positions, key_index, axis=-1, mode="clip")
        return query[:, :, None] >= key[:, None, :]


@_register
@dataclasses.dataclass(frozen=True)
class Branches(Mask):
    """Sibling paths of one block do not see each other (Multiverse, arXiv 2506.09991).

    Block and path ids are int32 `[B, depth, L]` for queries and `[B, depth, S]` for keys. Block
    id 0 means "in no path at this depth". A key is hidden where, at some depth, it shares the
    block of the query and not its path.
    """

    query_block: jax.Array
    query_path: jax.Array
    key_block: jax.Array
    key_path: jax.Array

    def check(self, queries, keys):
        sides = (("query", "B, depth, L", queries), ("key", "B, depth, S", keys))
        for side, axes, tokens in sides:
            for ids in (f"{side}_block", f"{side}_path"):
                _describes(f"masks.Branches.{ids}", getattr(self, ids), axes, tokens)
        shapes = [getattr(self, f.name).shape for f in dataclasses.fields(self)]
        if len({shape[1] for shape in shapes}) > 1:
            raise ValueError(f"masks.Branches: depths differ; the ids have shapes {shapes}")

    def visible(self, query_index, key_index):
        def query(ids):
            return jnp.take(ids, query_index, axis=-1, mode="clip")[..., :, None]

        def key(ids):
            return jnp.take(ids, key_index, axis=-1, mode="clip")[..., None, :]

        same_block = (query(self.query_block) == key(self.key_block)) & (
            query(self.query_block) != 0
        )
        sibling = same_block & (query(self.query_path) != key(self.key_path))  # [B, depth, l, s]
        return ~jnp.any(sibling, axis=1)


@_register
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """The first `length` keys are visible to every query; `rest` describes the other keys.

    This is how ParScale's learned keys stand before those of the tokens. `rest=None` hides
    nothing.
    """

    length: int = dataclasses.field(metadata={"static": True})
    rest: Mask | None = None

    def check(self, queries, keys):
        if not 0 <= self.length <= keys:
            raise ValueError(f"masks.Prefix of {self.length} keys, but there are {keys} keys")
        if self.rest is not None:
            self.rest.check(queries, keys - self.length)

    def visible(self, query_index, key_index):
        in_prefix = jnp.broadcast_to(
            key_index < self.length, (1, query_index.shape[0], key_index.shape[0])
        )
        if self.rest is None:
            return jnp.ones_like(in_prefix)
        return in_prefix | self.rest.visible(query_index, key_index - self.length)
