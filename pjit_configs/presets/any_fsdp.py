"""All devices there are, splitting the rows and the parameters."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="any_fsdp",
    description="All devices there are, splitting the rows and the parameters",
    chip=None,
    mesh_shape={"fsdp": -1},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="none",
)
