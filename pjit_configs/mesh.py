"""Building and describing a mesh. All five axes are always there, most of size 1."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hackle.pjit_configs.axes import MESH_AXES
from hackle.pjit_configs.errors import ConfigError


def mesh_sizes(shape: Mapping[str, int], devices: int | None = None) -> dict[str, int]:
    """The size of each of the five mesh axes, in order.

    Args:
      shape: sizes by axis name; axes left out have size 1. One size may be -1: what is left.
      devices: how many devices there are. None checks `shape` alone, and refuses -1.

    Raises:
      ConfigError: an unknown axis, a size that is not a positive integer, two sizes of -1, or a
        product that is not the number of devices.
    """
    for axis, size in shape.items():
        if axis not in MESH_AXES:
            raise ConfigError(f"unknown mesh axis {axis!r}; mesh axes are {', '.join(MESH_AXES)}")
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ConfigError(f"mesh axis {axis} has size {size!r}; expected an integer >= 1 or -1")
    sizes = {axis: shape.get(axis, 1) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh axes {' and '.join(free)} are -1; only one can be what is left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices is None:
        if free:
            raise ConfigError(f"mesh axis {free[0]} is -1, which needs a number of devices")
        return sizes
    if free:
        if devices < 1 or devices % fixed:
            raise ConfigError(
                f"{devices} devices cannot be split by the mesh {_text(shape)}: "
                f"the fixed sizes need a multiple of {fixed}"
            )
        sizes[free[0]] = devices // fixed
    elif fixed != devices:
        raise ConfigError(f"mesh {_text(shape)} needs {fixed} devices, got {devices}")
    return sizes


def build_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `shape` (see `mesh_sizes`) with the five axes, all of type Auto.

    Args:
      devices: exactly those to use. None uses all devices of this run; a shape without -1 that
        needs fewer takes the first ones (never in a run of several processes, where a process
        could be left without any).

    Raises:
      ConfigError: see `mesh_sizes`.
    """
    if devices is None:
        devices = jax.devices()
        if jax.process_count() == 1:
            least = {axis: 1 if size == -1 else size for axis, size in shape.items()}
            needed = math.prod(mesh_sizes(least).values())
            if len(devices) < needed and devices[0].platform == "cpu":
                raise ConfigError(
                    f"mesh {_text(shape)} needs {needed} devices, got {len(devices)}; on a CPU, "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}, set before JAX "
                    "starts, simulates them"
                )
            if -1 not in shape.values():
                devices = devices[:needed]
    sizes = mesh_sizes(shape, len(devices))
    # Neighbours in the mesh become neighbours in a TPU's torus; one axis of the torus may hold
    # several of ours, which `jax.make_mesh` refuses.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices=devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def describe_mesh(mesh: Mesh) -> str:
    """One line, e.g. `fsdp=8 (8 x NVIDIA H100 80GB HBM3)`; axes of size 1 are left out."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    axes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    return f"{_text(axes) if axes else 'one device'} ({mesh.size} x {' / '.join(kinds)})"


def _text(shape: Mapping[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in shape.items()) or "of one device"
