"""A static key-value cache: fixed slots, filled in order, with explicit positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from hackle.layers.attention.masks import Branches, Mask, Positions
from hackle.layers.language_model import BranchIds

# Position of a slot that nobody may see yet: behind every query.
HIDDEN = np.iinfo(np.int32).max
# Position of a slot that everybody sees: before every query, padding (-1) included.
ALWAYS = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of all layers, `[N, *lead, B, S, K, E]`; ParScale's lead is the P streams.

    Slots `0 .. prefix_length - 1` hold a learned prefix, visible to every query; tokens follow in
    the order of their arrival. A token is visible to queries at its own position or later,
    whatever its slot, so rows of unequal length need no bookkeeping beyond their positions. Nor
    do the paths of a text that branches: they share a row, and a path joins its siblings by
    ending, for nothing else is hidden from what comes behind.

    Attributes:
      key, value: `[N, *lead, B, S, K, E]`.
      positions: int32 `[B, S]`, the position of each slot's token.
      length: int32 scalar, slots used by tokens; the prefix is not counted.
      block, path: int32 `[B, depth, S]`, as in `masks.Branches`; None without branches.
      prefix_length: static.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    length: jax.Array
    block: jax.Array | None = None
    path: jax.Array | None = None
    prefix_length: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def batch(self) -> int:
        return self.positions.shape[0]

    @property
    def capacity(self) -> int:
        """How many tokens fit, the prefix not counted."""
        return self.positions.shape[1] - self.prefix_length

    @property
    def next_position(self) -> jax.Array:
        """The one after the last token of each row, int32 `[B]`; 0 where there is none."""
        taken = jnp.where(self.positions == HIDDEN, -1, self.positions)
        return jnp.max(taken, axis=1, initial=-1) + 1

    def admit(self, positions: jax.Array, branches: BranchIds | None = None) -> "KeyValueCache":
        """Makes n new tokens at `positions` int32 `[B, n]` visible; -1 marks padding.

        Their keys and values are then stored layer by layer with `write`, and `advance(n)` ends
        the step.

        Args:
          branches: block and path of the tokens, int32 `[B, depth, n]`; None: they are in none.

        Raises:
          ValueError: the batch or the depth differs, or (outside jit) the slots do not suffice.
        """
        batch, count = positions.shape
        if batch != self.batch:
            raise ValueError(f"cache holds {self.batch} rows, got positions for {batch}")
        used = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if used + count > self.capacity:
            raise ValueError(
                f"{count} tokens do not fit: {used} of {self.capacity} slots of the cache are used"
            )
        positions = jnp.where(positions < 0, HIDDEN, positions).astype(jnp.int32)
        zero, slot = jnp.zeros_like(self.length), self.prefix_length + self.length
        block, path = self._paths(positions, branches)
        if self.block is not None and self.path is not None:
            block = jax.lax.dynamic_update_slice(self.block, block, (zero, zero, slot))
            path = jax.lax.dynamic_update_slice(self.path, path, (zero, zero, slot))
        positions = jax.lax.dynamic_update_slice(self.positions, positions, (zero, slot))
        return dataclasses.replace(self, positions=positions, block=block, path=path)

    def write(self, layer: jax.Array, key: jax.Array, value: jax.Array) -> "KeyValueCache":
        """Stores `[*lead, B, n, K, E]` of the admitted tokens in layer number `layer`."""
        slot = self.prefix_length + self.length
        start = [jnp.zeros_like(slot)] * self.key.ndim
        start[0], start[-3] = layer.astype(slot.dtype), slot

        def put(store, new):
            return jax.lax.dynamic_update_slice(store, new[None].astype(store.dtype), start)

        return dataclasses.replace(self, key=put(self.key, key), value=put(self.value, value))

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All slots of one layer: keys and values `[*lead, B, S, K, E]`."""

        def get(store):
            return jax.lax.dynamic_index_in_dim(store, layer, keepdims=False)

        return get(self.key), get(self.value)

    def mask(self, positions: jax.Array, branches: BranchIds | None = None) -> Mask:
        """What queries at `positions` `[B, n]`, and in these paths, see of the slots."""
        mask: Mask = Positions(positions, self.positions)
        block, path = self._paths(positions, branches)
        if self.block is not None and self.path is not None:
            mask = mask & Branches(block, path, self.block, self.path)
        return mask

    def _paths(self, positions, branches):
        """Block and path `[B, depth, n]` of new tokens, or None twice without branches."""
        if self.block is None:
            if branches is not None:
                raise ValueError("the cache holds no branches; make it with a branch_depth")
            return None, None
        batch, depth, _ = self.block.shape
        if branches is None:
            block = path = jnp.zeros((batch, depth, positions.shape[1]), jnp.int32)
            return block, path
        if branches.block.shape[1] != depth:
            raise ValueError(
                f"the cache holds branches of depth {depth}, got {branches.block.shape[1]}"
            )
        return branches.block.astype(jnp.int32), branches.path.astype(jnp.int32)

    def advance(self, count: int) -> "KeyValueCache":
        """Counts `count` tokens as stored."""
        return dataclasses.replace(self, length=self.length + count)

    def forget(self, count: jax.Array) -> "KeyValueCache":
        """Frees the last `count` slots, an int32 scalar: padding behind the tokens of a step."""
        length = self.length - count
        slots = jnp.arange(self.positions.shape[1])
        positions = jnp.where(slots < self.prefix_length + length, self.positions, HIDDEN)
        return dataclasses.replace(self, length=length, positions=positions)


def key_value_cache(
    layers: int,
    lead: tuple[int, ...],
    batch: int,
    length: int,
    kv_heads: int,
    head_width: int,
    dtype: DTypeLike,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    branch_depth: int = 0,
) -> KeyValueCache:
    """An empty cache for `length` tokens a row.

    Args:
      lead: sizes between layer and batch; `(P,)` for ParScale, `()` otherwise.
      prefix: learned keys and values `[N, *lead, K, T, E]`, written to the first T slots of
        every row.
      branch_depth: depth of the branches of the tokens; 0 is a cache without branches.

    Raises:
      ValueError: `batch` or `length` is not positive, or `branch_depth` is negative.
    """
    if batch < 1 or length < 1 or branch_depth < 0:
        raise ValueError(
            f"cache needs batch and length >= 1 and branch_depth >= 0, got {batch}, {length} and "
            f"{branch_depth}"
        )
    count = 0 if prefix is None else prefix[0].shape[-2]
    shape = (layers, *lead, batch, count + length, kv_heads, head_width)
    stores = [jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)]
    if prefix is not None:
        for i, learned in enumerate(prefix):
            learned = jnp.swapaxes(learned, -3, -2)[..., None, :, :, :]  # [N, *lead, 1, T, K, E]
            stores[i] = stores[i].at[..., :count, :, :].set(learned.astype(dtype))
    slots = jnp.arange(count + length)
    positions = jnp.where(slots < count, ALWAYS, HIDDEN).astype(jnp.int32)

    def paths() -> jax.Array | None:
        shape = (batch, branch_depth, count + length)
        return jnp.zeros(shape, jnp.int32) if branch_depth else None

    return KeyValueCache(
        key=stores[0],
        value=stores[1],
        positions=jnp.tile(positions, (batch, 1)),
        length=jnp.zeros((), jnp.int32),
        block=paths(),
        path=paths(),
        prefix_length=count,
    )
