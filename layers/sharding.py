"""Where activations live on a mesh, said in logical names.

Layers name the axes of their activations; whoever runs them says once, with `axis_rules`, which
mesh axes the names stand for. Without rules or without a mesh the names do nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import jax
from jax.sharding import PartitionSpec

MeshAxes = str | tuple[str, ...] | None

_rules: ContextVar[Mapping[str, MeshAxes] | None] = ContextVar("hackle_axis_rules", default=None)


@contextlib.contextmanager
def axis_rules(rules: Mapping[str, MeshAxes]) -> Iterator[None]:
    """Makes `rules` (logical axis -> mesh axis, tuple of mesh axes, or None) hold inside `with`.

    Rules are read while a function is traced, so the `with` belongs inside the jitted function
    or around its first call.
    """
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that a logical axis lies over here; often none.

    Raises:
      KeyError: rules hold here, and the name is not among them.
    """
    rules, mesh = _rules.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return ()
    if name not in rules:
        raise KeyError(f"no rule for logical axis {name!r}; rules name {sorted(rules)}")
    axes = rules[name]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of `x`, one logical name (or None) per dimension.

    Raises:
      ValueError: the number of names is not `x.ndim`.
      KeyError: a name is not in the rules that hold here.
    """
    if len(axes) != x.ndim:
        raise ValueError(f"constrain: array of shape {x.shape} needs {x.ndim} names, got {axes}")
    rules = _rules.get()
    if rules is None or jax.sharding.get_abstract_mesh().empty:
        return x
    for name in axes:
        if name is not None and name not in rules:
            raise KeyError(f"no rule for logical axis {name!r}; rules name {sorted(rules)}")
    spec = PartitionSpec(*(None if name is None else rules[name] for name in axes))
    return jax.lax.with_sharding_constraint(x, spec)
