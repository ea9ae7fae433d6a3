"""Eight simulated CPU devices: parameters, streams and heads each split in two."""

from hackle.pjit_configs.precision import PRECISIONS
from hackle.pjit_configs.presets.base import Preset
from hackle.pjit_configs.rules import rule_table

PRESET = Preset(
    name="cpu8_fsdp_stream_tensor",
    description="Eight simulated CPU devices: parameters, streams and heads each split in two",
    chip="cpu",
    mesh_shape={"fsdp": 2, "stream": 2, "tensor": 2},
    rules=rule_table("fsdp_tensor"),
    precision=PRECISIONS["float32"],
    remat="none",
)
