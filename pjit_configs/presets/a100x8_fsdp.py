"""Eight A100 80 GB of one host, fully sharded training."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="a100x8_fsdp",
    description="Eight A100 80 GB of one host, fully sharded training",
    chip="a100-80",
    mesh_shape={"fsdp": 8},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
