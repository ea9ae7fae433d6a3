"""Eight v5e chips of one host, decoding with streams on four groups of two chips."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="v5e8_decode",
    description="Eight v5e chips of one host, decoding with streams on four groups of two chips",
    chip="v5e",
    mesh_shape={"stream": 4, "tensor": 2},
    rules=rule_table("decode"),
    precision=PRECISIONS["bfloat16"],
    remat="none",
)
