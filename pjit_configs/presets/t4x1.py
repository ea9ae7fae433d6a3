"""One T4, which has no bfloat16 units: float32."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="t4x1",
    description="One T4, which has no bfloat16 units: float32",
    chip="t4",
    mesh_shape={},
    rules=rule_table("data"),
    precision=PRECISIONS["float32"],
    remat="dots",
)
