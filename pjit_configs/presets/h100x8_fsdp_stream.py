"""Eight H100 of one host: ParScale with streams in two groups."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="h100x8_fsdp_stream",
    description="Eight H100 of one host: ParScale with streams in two groups",
    chip="h100",
    mesh_shape={"fsdp": 4, "stream": 2},
    rules=rule_table("fsdp"),
    precision=PRECISIONS["mixed"],
    remat="dots",
)
