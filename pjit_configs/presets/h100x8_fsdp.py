"""Eight H100 of one host, fully sharded training."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="h100x8_fsdp",
    description="Eight H100 of one host, fully sharded training",
    chip="h100",
    mesh_shape={"fsdp": 8},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
