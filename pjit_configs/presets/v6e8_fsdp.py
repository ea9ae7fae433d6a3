"""Eight v6e chips of one host, fully sharded training."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="v6e8_fsdp",
    description="Eight v6e chips of one host, fully sharded training",
    chip="v6e",
    mesh_shape={"fsdp": 8},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
