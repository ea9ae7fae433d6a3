"""A full v5e pod of 16 x 16 chips, fully sharded training."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="v5e256_fsdp",
    description="A full v5e pod of 16 x 16 chips, fully sharded training",
    chip="v5e",
    mesh_shape={"fsdp": 256},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="full",
)
