"""Saved ParaRNN checkpoints <-> `ParaRNNLM`: our own layout, since none has been released.

Names and orientation follow those of Qwen2 where a tensor has a counterpart there: matrices are
[out, in], except the cell's, whose input projection is one matrix per head and gate.
"""

from collections.abc import Mapping
from typing import Any

from hackle.zoo.dense.params import raise_problems
from hackle.zoo.pararnn.modeling import CELLS, ParaRNNConfig
from hackle.zoo.weights.config_fields import Fields
from hackle.zoo.weights.table import Row

MODEL_TYPE = "pararnn"
ARCHITECTURE = "ParaRNNForCausalLM"

_LAYER = "model.layers.{layer}."

# v vocabulary, d width, s state channels, k taps, f mlp width; of the cell: h heads, g gates,
# i and o the channels of a head before and after the projection, p peepholes.
ROWS = (
    Row("embedding.weight", "model.embed_tokens.weight", "v d", "v d"),
    Row("blocks.block.mixer_norm.scale", _LAYER + "input_layernorm.weight", "d", "d"),
    Row("blocks.block.skip_scale", _LAYER + "skip_scale", "d", "d"),
    Row("blocks.block.mixer.input.weight", _LAYER + "mixer.in_proj.weight", "s d", "d s"),
    Row("blocks.block.mixer.gate.weight", _LAYER + "mixer.gate_proj.weight", "s d", "d s"),
    Row("blocks.block.mixer.conv.weight", _LAYER + "mixer.conv.weight", "k s", "k s"),
    Row("blocks.block.mixer.cell.weight", _LAYER + "mixer.cell.weight", "h g o i", "h i g o"),
    Row("blocks.block.mixer.cell.bias", _LAYER + "mixer.cell.bias", "g s", "g s"),
    Row("blocks.block.mixer.cell.state_weight", _LAYER + "mixer.cell.state_weight", "g s", "g s"),
    Row("blocks.block.mixer.cell.peephole", _LAYER + "mixer.cell.peephole", "p s", "p s"),
    Row("blocks.block.mixer.norm.scale", _LAYER + "mixer.norm.weight", "s", "s"),
    Row("blocks.block.mixer.output.weight", _LAYER + "mixer.out_proj.weight", "d s", "s d"),
    Row("blocks.block.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", "d", "d"),
    Row("blocks.block.mlp.gate.weight", _LAYER + "mlp.gate_proj.weight", "f d", "d f"),
    Row("blocks.block.mlp.up.weight", _LAYER + "mlp.up_proj.weight", "f d", "d f"),
    Row("blocks.block.mlp.down.weight", _LAYER + "mlp.down_proj.weight", "d f", "f d"),
    Row("final_norm.scale", "model.norm.weight", "d", "d"),
    Row("head.weight", "lm_head.weight", "v d", "d v"),
)

TIED = {"lm_head.weight": "model.embed_tokens.weight"}

# Fields of config.json that change neither shapes nor numbers of this code, and why.
IGNORED = {
    "architectures": "model_type decides",
    "torch_dtype": "the files themselves say their dtype",
    "bos_token_id": "belongs to the tokenizer",
    "eos_token_id": "belongs to the tokenizer; given to generate()",
    "pad_token_id": "padding is said by segment ids",
}


# Our sizes -> fields of config.json.
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_heads",
    "taps": "conv_taps",
}


def read_config(fields: Mapping[str, Any]) -> ParaRNNConfig:
    """A config.json of model type pararnn as a `ParaRNNConfig`; no field has a default.

    Raises:
      UserError: naming every field that is missing, unknown, or has a value that cannot be.
    """
    needed = ("cell", *_SIZES.values(), "rms_norm_eps", "tie_word_embeddings")
    read = Fields({**dict.fromkeys(needed), **fields})
    read.only("model_type", MODEL_TYPE)
    read.only("cell", *CELLS)
    read.ignore(IGNORED)
    sizes: dict[str, Any] = {name: read.integer(key, 1) for name, key in _SIZES.items()}
    config = ParaRNNConfig(
        cell=read.get("cell"),
        **sizes,
        norm_eps=read.number("rms_norm_eps", 0.0, 0),
        tie_embeddings=read.boolean("tie_word_embeddings", False),
    )
    raise_problems(read)
    return config


def write_config(config: ParaRNNConfig) -> dict[str, Any]:
    """The config.json of a `ParaRNNConfig`; every field is written out."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "cell": config.cell,
        **{key: getattr(config, name) for name, key in _SIZES.items()},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
