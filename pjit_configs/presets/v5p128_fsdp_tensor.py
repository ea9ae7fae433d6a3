"""128 v5p chips (4 x 4 x 8): fully sharded, heads and widths split in two."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="v5p128_fsdp_tensor",
    description="128 v5p chips (4 x 4 x 8): fully sharded, heads and widths split in two",
    chip="v5p",
    mesh_shape={"fsdp": 64, "tensor": 2},
    rules=rule_table("fsdp_tensor"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
