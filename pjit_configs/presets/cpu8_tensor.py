"""Eight simulated CPU devices: four groups of rows, heads and widths split in two."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="cpu8_tensor",
    description="Eight simulated CPU devices: four groups of rows, heads and widths split in two",
    chip="cpu",
    mesh_shape={"data": 4, "tensor": 2},
    rules=rule_table("tensor"),
    precision=PRECISIONS["float32"],
    remat="none",
)
