"""Eight simulated CPU devices: two groups of rows, streams split in four."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="cpu8_stream",
    description="Eight simulated CPU devices: two groups of rows, streams split in four",
    chip="cpu",
    mesh_shape={"data": 2, "stream": 4},
    rules=rule_table("streams"),
    precision=PRECISIONS["float32"],
    remat="none",
)
