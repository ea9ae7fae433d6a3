"""From logical axis names to shardings: the resolver that presets, trainers and loaders share.

Works on any pytree. A leaf that knows its logical axes (an `nnx.Variable` with metadata `axes`, as
`hackle.layers.parameter` makes them) is laid out by the rules; every other leaf is replicated.
The moments of an optimiser keep the Variables of their parameters, so the same call places them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hackle.pjit_configs.axes import MESH_AXES
from hackle.pjit_configs.errors import ConfigError
from hackle.pjit_configs.rules import MeshAxes

BATCH_SPEC = PartitionSpec(("data", "fsdp"), "seq")


def partition_specs(tree: Any, rules: Mapping[str, MeshAxes], sizes: Mapping[str, int]) -> Any:
    """The tree with a `PartitionSpec` in place of every array (inside its Variable, if it has one).

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s, e.g. `nnx.split(nnx.eval_shape(make))[1]`.
      rules: logical axis -> mesh axis, tuple of mesh axes, or None.
      sizes: size of each mesh axis.

    Raises:
      ConfigError: naming the parameter, when a logical axis has no rule, a rule names an unknown
        mesh axis, a mesh axis is used twice in one array, or a dimension does not divide.
    """

    def of_leaf(path, leaf):
        if not _is_variable(leaf):
            return PartitionSpec()
        axes = leaf.get_metadata("axes", None)
        if axes is None:
            return leaf.replace(PartitionSpec())
        return leaf.replace(_spec(_dotted(path), leaf.shape, axes, rules, sizes))

    return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=_is_variable)


def shardings(tree: Any, rules: Mapping[str, MeshAxes], mesh: Mesh) -> Any:
    """As `partition_specs`, with a `NamedSharding` on `mesh` in place of every array.

    The result has the tree structure of the input, so it serves as `in_shardings`,
    `out_shardings` or the second argument of `jax.device_put`.
    """
    specs = partition_specs(tree, rules, mesh.shape)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For the arrays `[B, L]` of a batch: rows over data and fsdp, tokens over seq."""
    return NamedSharding(mesh, BATCH_SPEC)


def check_batch(mesh: Mesh, batch: int, length: int) -> None:
    """Raises ConfigError when arrays `[batch, length]` cannot be laid over the mesh."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or batch % rows:
        raise ConfigError(
            f"batch of {batch} rows does not divide over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}; use a multiple of {rows}"
        )
    if length < 1 or length % mesh.shape["seq"]:
        raise ConfigError(f"row length {length} does not divide over seq={mesh.shape['seq']}")


def bytes_per_device(tree: Any, placed: Any) -> int:
    """Bytes of one device's share of `tree` (arrays or abstract arrays), laid out as `placed`.

    Args:
      placed: `shardings(tree, ...)`.
    """
    total = 0
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _spec(
    path: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    rules: Mapping[str, MeshAxes],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    if len(axes) != len(shape):
        raise ConfigError(f"{path}: shape {shape} has {len(shape)} dimensions, axes {axes} do not")
    entries: list[MeshAxes] = []
    used: dict[str, str] = {}
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis not in rules:
            raise ConfigError(f"{path}: no rule for logical axis {axis!r} (dimension {dim})")
        entry = rules[axis]
        mesh_axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for mesh_axis in mesh_axes:
            if mesh_axis not in sizes:
                known = ", ".join(MESH_AXES)
                raise ConfigError(f"{path}: rule {axis} -> {mesh_axis!r}; mesh axes are {known}")
            if mesh_axis in used:
                raise ConfigError(
                    f"{path}: mesh axis {mesh_axis!r} is used twice, by {used[mesh_axis]!r} and "
                    f"{axis!r} (axes {axes}, shape {shape})"
                )
            used[mesh_axis] = axis
        parts = math.prod(sizes[mesh_axis] for mesh_axis in mesh_axes)
        if size % parts:
            over = " x ".join(f"{mesh_axis}={sizes[mesh_axis]}" for mesh_axis in mesh_axes)
            raise ConfigError(
                f"{path}: dimension {dim} ({axis}) of size {size} does not divide over {over}"
            )
        entries.append(entry)
    return PartitionSpec(*entries)


def _is_variable(x: Any) -> bool:
    # By its methods, so that this package needs no flax.
    return hasattr(x, "get_metadata") and hasattr(x, "replace")


def _dotted(path: tuple[Any, ...]) -> str:
    names = []
    for entry in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
        else:
            names.append(str(entry))
    return ".".join(names) or "array"
