"""hackle.pjit_configs: data about meshes. Imports jax and the standard library, no model code.

A preset says for one purpose on one kind of hardware: the mesh, which logical axis lies over which
mesh axis, the dtypes, and what the backward pass recomputes. `list_presets()` and `preset(name)`.
"""

if not __name__.startswith("hackle."):
    raise ImportError(f"import this package as 'hackle.pjit_configs', not as {__name__!r}")

from hackle.pjit_configs.axes import AXES, MESH_AXES
from hackle.pjit_configs.chips import CHIPS, Chip, chip_of
from hackle.pjit_configs.errors import ConfigError
from hackle.pjit_configs.mesh import build_mesh, describe_mesh, mesh_sizes
from hackle.pjit_configs.precision import PRECISIONS, Precision
from hackle.pjit_configs.presets import list_presets, preset
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.remat import REMAT
from hackle.pjit_configs.rules import RULES, Rules, rule_table
from hackle.pjit_configs.sharding import (
    batch_sharding,
    bytes_per_device,
    check_batch,
    partition_specs,
    replicated,
    shardings,
)

__all__ = [
    "AXES",
    "CHIPS",
    "MESH_AXES",
    "PRECISIONS",
    "REMAT",
    "RULES",
    "Chip",
    "ConfigError",
    "Precision",
    "Preset",
    "Rules",
    "batch_sharding",
    "build_mesh",
    "bytes_per_device",
    "check_batch",
    "chip_of",
    "describe_mesh",
    "list_presets",
    "mesh_sizes",
    "partition_specs",
    "preset",
    "replicated",
    "rule_table",
    "shardings",
]
