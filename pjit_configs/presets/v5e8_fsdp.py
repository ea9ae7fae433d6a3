"""Eight v5e chips of one host, fully sharded training."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="v5e8_fsdp",
    description="Eight v5e chips of one host, fully sharded training",
    chip="v5e",
    mesh_shape={"fsdp": 8},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="full",
)
