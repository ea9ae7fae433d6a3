"""Where loaded parameters go.

Model code does not depend on `hackle.pjit_configs`, so the caller brings the placement: a preset
(anything with `.shardings(abstract_state)`), or a plain mesh, which gets the one table below. A
test keeps it equal to the rule table `fsdp_tensor` of `hackle.pjit_configs`.
"""

from typing import Any

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from hackle.zoo.errors import UserError

# Logical axis -> mesh axis; every other logical axis stays whole.
MESH_AXIS = {
    "stream": "stream",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "state": "tensor",
    "vocab": "tensor",
    "embed_out": "tensor",
}
# `data` and `seq` split no parameter.
_KNOWN = ("data", "fsdp", "stream", "seq", "tensor")


def placement(state: nnx.State, mesh: Any) -> dict[tuple[Any, ...], Sharding | None]:
    """Path -> sharding for every parameter of an abstract state.

    Args:
      mesh: None (JAX's default device, shardings None), a `jax.sharding.Mesh`, or an object with
        `.shardings(abstract_state)`, such as a preset of `hackle.pjit_configs`.

    Raises:
      UserError: naming the parameter, when a dimension does not divide over the mesh; an axis of
        a plain mesh that hackle does not know.
      TypeError: `mesh` is none of these.
    """
    flat = nnx.to_flat_state(state)
    if mesh is None:
        return {tuple(path): None for path, _ in flat}
    if isinstance(mesh, Mesh):
        foreign = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in _KNOWN]
        if foreign:
            raise UserError(
                f"mesh axis {foreign[0]!r} is none of hackle's ({', '.join(_KNOWN)}); rename it, "
                "or pass a preset"
            )
        return {tuple(path): _sharding(path, variable, mesh) for path, variable in flat}
    if not hasattr(mesh, "shardings"):
        raise TypeError(
            f"mesh is a {type(mesh).__name__}; expected None, a jax.sharding.Mesh or a preset"
        )
    try:
        placed = mesh.shardings(state)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {tuple(path): variable.get_value() for path, variable in nnx.to_flat_state(placed)}


def _sharding(path: tuple[Any, ...], variable: nnx.Variable, mesh: Mesh) -> Sharding:
    spec = []
    for size, axis in zip(variable.shape, variable.get_metadata("axes"), strict=True):
        over = MESH_AXIS.get(axis)
        parts = mesh.shape.get(over, 1)
        if size % parts:
            raise UserError(
                f"{'.'.join(map(str, path))}: {axis} of size {size} does not divide over "
                f"{over}={parts} of the mesh; use another mesh, or a preset with other rules"
            )
        spec.append(over if over in mesh.shape else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
