"""One CPU device: tests and demos."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="cpu1",
    description="One CPU device: tests and demos",
    chip="cpu",
    mesh_shape={},
    rules=rule_table("data"),
    precision=PRECISIONS["float32"],
    remat="none",
)
