"""One v5e chip."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="v5e1",
    description="One v5e chip",
    chip="v5e",
    mesh_shape={},
    rules=rule_table("data"),
    precision=PRECISIONS["mixed"],
    remat="full",
)
