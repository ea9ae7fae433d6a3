"""Kernels over a mesh: rows of the batch and heads lie apart, and each device runs its own.

XLA divides its own operations over devices, and not a kernel.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hackle.layers.attention.masks import Mask
from hackle.layers.sharding import mesh_axes

Attend = Callable[..., tuple[jax.Array, jax.Array]]


class Placement(NamedTuple):
    """The mesh axes that dimensions lie over, each perhaps none."""

    batch: tuple[str, ...]
    length: tuple[str, ...]
    heads: tuple[str, ...]
    key_heads: tuple[str, ...]


def _placement() -> Placement:
    return Placement(*mesh_axes("batch", "length", "heads"), *mesh_axes("kv_heads"))


def unsupported(query: jax.Array, key: jax.Array) -> str | None:
    """Why a kernel cannot run on the mesh that holds here, or None if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    shape = dict(mesh.shape)
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    # Inside a shard_map over all axes each device has arrays of its own already.
    if all(size == 1 or kind == AxisType.Manual for size, kind in kinds):
        return None
    at = _placement()
    if not any(at):
        return f"nothing says how arrays lie over the mesh {shape}; a kernel runs on one device"
    if at.length:
        return f"the kernels see all tokens, and the mesh {shape} splits them over {at.length}"
    if at.heads != at.key_heads and key.shape[2] > 1:
        return f"{key.shape[2]} key heads do not lie as the query heads that read them, {at}"
    sizes = {"batch": query.shape[0], "heads": query.shape[2], "key_heads": key.shape[2]}
    for name, size in sizes.items():
        parts = math.prod(shape[axis] for axis in getattr(at, name))
        if size % parts:
            return f"{name} {size} does not divide over {parts} devices"
    return None


def run(
    attend: Attend,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """`attend`, of what each device has, on a mesh of which `unsupported` has nothing to say."""
    mesh = jax.sharding.get_abstract_mesh()
    at = Placement((), (), (), ())
    if any(kind != AxisType.Manual for kind in mesh.axis_types):
        at = _placement()
    if not any(at):
        return attend(query, key, value, mask, scale)

    def rows(x: Any) -> P:  # of a mask: rows of the batch, or one for all
        return P(at.batch) if x.shape[0] > 1 else P()

    of_query, of_key = P(at.batch, None, at.heads), P(at.batch, None, at.key_heads)
    return jax.shard_map(
        lambda query, key, value, mask: attend(query, key, value, mask, scale),
        in_specs=(of_query, of_key, of_key, jax.tree.map(rows, mask)),
        out_specs=(of_query, of_query),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(query, key, value, mask)
