"""One H200: training what fits, and decoding."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="h200x1",
    description="One H200: training what fits, and decoding",
    chip="h200",
    mesh_shape={},
    rules=rule_table("data"),
    precision=PRECISIONS["mixed"],
    remat="none",
)
