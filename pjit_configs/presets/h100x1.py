"""One H100: training what fits, and decoding."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="h100x1",
    description="One H100: training what fits, and decoding",
    chip="h100",
    mesh_shape={},
    rules=rule_table("data"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
