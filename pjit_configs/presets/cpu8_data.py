"""Eight simulated CPU devices, each with its rows and a copy of the model."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="cpu8_data",
    description="Eight simulated CPU devices, each with its rows and a copy of the model",
    chip="cpu",
    mesh_shape={"data": 8},
    rules=rule_table("data"),
    precision=PRECISIONS["float32"],
    remat="none",
)
