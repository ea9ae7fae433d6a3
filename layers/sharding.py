"""Where activations live on a mesh, said in logical names.

Layers name the axes of their activations; whoever runs them says once, with `axis_rules`, which
mesh axes the names stand for. Without rules or without a mesh the names do nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import jax
from jax.sharding import AxisType, PartitionSpec

MeshAxes = str | tuple[str, ...] | None

_rules: ContextVar[Mapping[str, MeshAxes] | None] = ContextVar("hackle_axis_rules", default=None)


@contextlib.contextmanager
def axis_rules(rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Makes `rules` (logical axis -> mesh axis, tuple of mesh axes, or None) hold inside `with`.

    Rules are read while a function is traced, so the `with` belongs inside the jitted function
    or around its first call. The mesh is that of `jax.set_mesh`; its axes are of type Auto.
    """
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def mesh_axes(*names: str | None) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each dimension of an array lies over here; often none.

    Axes of one device are left out.

    Args:
      names: logical axes of the dimensions; None is not split.

    Raises:
      KeyError: rules hold here, and a name is not among them.
      ValueError: a rule names an axis that the mesh does not have or that is not of type Auto, or
        two dimensions lie over the same.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return ((),) * len(names)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    used: dict[str, str] = {}
    found = []
    for name in names:
        if name is not None and name not in rules:
            raise KeyError(f"no rule for logical axis {name!r}; rules name {sorted(rules)}")
        rule = None if name is None else rules[name]
        axes = (rule,) if isinstance(rule, str) else rule or ()
        for axis in axes:
            if axis not in types:
                raise ValueError(
                    f"rule {name} -> {rule!r}: mesh axis {axis!r}; expected one of {[*types]}"
                )
            if types[axis] != AxisType.Auto:
                raise ValueError(
                    f"rule {name} -> {rule!r}: mesh axis {axis!r} is {types[axis].name}; expected "
                    "Auto, as in jax.make_mesh(..., axis_types=(AxisType.Auto, ...))"
                )
            if axis in used:
                raise ValueError(
                    f"rule {name} -> {rule!r}: mesh axis {axis!r} already splits {used[axis]!r} of "
                    f"this array {names}; expected another"
                )
            used[axis] = str(name)
        found.append(tuple(axis for axis in axes if mesh.shape[axis] > 1))
    return tuple(found)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x`, one logical name (or None) per dimension.

    Raises:
      ValueError: the number of names is not `x.ndim`, or see `mesh_axes`.
      KeyError: a name is not in the rules that hold here.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: array of shape {x.shape} needs {x.ndim} names, got {axes}")
    if _rules.get() is None or jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(*(over or None for over in mesh_axes(*axes)))
    return jax.lax.with_sharding_constraint(x, spec)
