"""All devices there are, each with its rows and a copy of the model."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="any_data",
    description="All devices there are, each with its rows and a copy of the model",
    chip=None,
    mesh_shape={"data": -1},
    rules=rule_table("data"),
    precision=PRECISIONS["mixed"],
    remat="none",
)
