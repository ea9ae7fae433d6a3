"""One A100 80 GB."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="a100x1",
    description="One A100 80 GB",
    chip="a100-80",
    mesh_shape={},
    rules=rule_table("data"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
