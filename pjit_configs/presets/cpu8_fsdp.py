"""Eight simulated CPU devices that split the rows and the parameters."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="cpu8_fsdp",
    description="Eight simulated CPU devices that split the rows and the parameters",
    chip="cpu",
    mesh_shape={"fsdp": 8},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["float32"],
    remat="none",
)
