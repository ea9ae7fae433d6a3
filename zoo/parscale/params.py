"""Released ParScale checkpoints <-> `ParScaleLM`: the rows and fields of Qwen2, and the streams.

Source of names and shapes: the released files; see the model card for what was checked.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from hackle.zoo.dense import params as dense
from hackle.zoo.dense.modeling import DenseConfig, DenseLM
from hackle.zoo.errors import UserError
from hackle.zoo.parscale.modeling import ParScaleConfig, ParScaleLM
from hackle.zoo.weights.config_fields import Fields
from hackle.zoo.weights.table import Row

MODEL_TYPE = "qwen2_parscale"
_TRUNK = dataclasses.replace(dense.MODEL_TYPES["qwen2"], architecture="Qwen2ParScaleForCausalLM")

# p streams, k key-value heads, t prefix length, e head width, j and o the two widths of W1.
ROWS = (
    *dense.ROWS,
    Row(
        "blocks.block.attention.prefix.key",
        "model.layers.{layer}.self_attn.prefix_k",
        "p k t e",
        "p k t e",
    ),
    Row(
        "blocks.block.attention.prefix.value",
        "model.layers.{layer}.self_attn.prefix_v",
        "p k t e",
        "p k t e",
    ),
    # The published MLP sees the streams interleaved: input j * P + p is width j of stream p.
    Row("aggregator.hidden_weight", "model.aggregate_layer.0.weight", "o (j p)", "p j o"),
    Row("aggregator.hidden_bias", "model.aggregate_layer.0.bias", "o", "o"),
    Row("aggregator.output_weight", "model.aggregate_layer.2.weight", "p o", "o p"),
    Row("aggregator.output_bias", "model.aggregate_layer.2.bias", "p", "p"),
)

TIED = dense.TIED
IGNORED = dense.IGNORED


def read_config(fields: Mapping[str, Any]) -> ParScaleConfig:
    """A published config.json of model type qwen2_parscale as a `ParScaleConfig`.

    Missing keys take the defaults of the published config class: smoothing 0.01 and untied
    weights, where every released file says 0.1 and tied.

    Raises:
      UserError: naming every field that is unknown or has a value this code does not support.
    """
    read = Fields(fields)
    read.only("model_type", MODEL_TYPE)
    common = dense.read_trunk(read, _TRUNK)
    own: dict[str, Any] = {
        "streams": read.integer("parscale_n", 1),
        "prefix_length": read.integer("parscale_n_tokens", 48),
        "smoothing": read.number("parscale_attn_smooth", 0.01, 0, 1),
    }
    dense.raise_problems(read)
    return ParScaleConfig(**common, **own)


def write_config(config: ParScaleConfig) -> dict[str, Any]:
    """The config.json of a `ParScaleConfig`; every field that a default could bend is written.

    Raises:
      UserError: streams without a prefix, which the published layout cannot say.
    """
    if config.prefix_length < 1:
        raise UserError(
            f"prefix_length={config.prefix_length} has no published form; expected at least 1"
        )
    return {
        **dense.write_trunk(config, _TRUNK),
        "model_type": MODEL_TYPE,
        "parscale_n": config.streams,
        "parscale_n_tokens": config.prefix_length,
        "parscale_attn_smooth": config.smoothing,
    }


def as_dense(model: ParScaleLM) -> DenseLM:
    """A one-stream model as the Qwen2 model that it is; the arrays are shared, not copied.

    Raises:
      UserError: the model has more streams.
    """
    if model.config.streams != 1:
        raise UserError(f"a model of {model.config.streams} streams is no dense model; expected 1")
    names = {field.name for field in dataclasses.fields(DenseConfig)}
    fields = {k: v for k, v in dataclasses.asdict(model.config).items() if k in names}
    return DenseLM.with_state(DenseConfig(**fields, qkv_bias=True), nnx.state(model))
