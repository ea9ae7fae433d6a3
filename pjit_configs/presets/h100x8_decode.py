"""Eight H100 of one host, decoding: weights stay in place, kv heads copied."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="h100x8_decode",
    description="Eight H100 of one host, decoding: weights stay in place, kv heads copied",
    chip="h100",
    mesh_shape={"tensor": 8},
    rules=rule_table("decode_shared_kv"),
    precision=PRECISIONS["bfloat16"],
    remat="none",
)
