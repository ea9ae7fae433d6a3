"""Qwen2 / Qwen2.5 checkpoints <-> `DenseLM`: tensors by `ROWS`, config.json by two functions."""

from collections.abc import Mapping
from typing import Any

from hackle.zoo.dense.modeling import DenseConfig
from hackle.zoo.errors import UserError
from hackle.zoo.weights.config_fields import Fields
from hackle.zoo.weights.table import Row

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"

_LAYER = "model.layers.{layer}."

# Published torch matrices are [out, in]; ours are [in, out], with heads as an axis of their own.
# v vocabulary, d width, h query heads, k key-value heads, e head width, f mlp width.
ROWS = (
    Row("embedding.weight", "model.embed_tokens.weight", "v d", "v d"),
    Row("blocks.block.attention_norm.scale", _LAYER + "input_layernorm.weight", "d", "d"),
    Row(
        "blocks.block.attention.query.weight",
        _LAYER + "self_attn.q_proj.weight",
        "(h e) d",
        "d h e",
    ),
    Row("blocks.block.attention.query.bias", _LAYER + "self_attn.q_proj.bias", "(h e)", "h e"),
    Row(
        "blocks.block.attention.key.weight", _LAYER + "self_attn.k_proj.weight", "(k e) d", "d k e"
    ),
    Row("blocks.block.attention.key.bias", _LAYER + "self_attn.k_proj.bias", "(k e)", "k e"),
    Row(
        "blocks.block.attention.value.weight",
        _LAYER + "self_attn.v_proj.weight",
        "(k e) d",
        "d k e",
    ),
    Row("blocks.block.attention.value.bias", _LAYER + "self_attn.v_proj.bias", "(k e)", "k e"),
    Row(
        "blocks.block.attention.output.weight",
        _LAYER + "self_attn.o_proj.weight",
        "d (h e)",
        "h e d",
    ),
    Row("blocks.block.mlp_norm.scale", _LAYER + "post_attention_layernorm.weight", "d", "d"),
    Row("blocks.block.mlp.gate.weight", _LAYER + "mlp.gate_proj.weight", "f d", "d f"),
    Row("blocks.block.mlp.up.weight", _LAYER + "mlp.up_proj.weight", "f d", "d f"),
    Row("blocks.block.mlp.down.weight", _LAYER + "mlp.down_proj.weight", "d f", "f d"),
    Row("final_norm.scale", "model.norm.weight", "d", "d"),
    Row("head.weight", "lm_head.weight", "v d", "d v"),
)

# Stored twice in some files of tied models; accepted when equal.
TIED = {"lm_head.weight": "model.embed_tokens.weight"}

# Fields of config.json that change neither shapes nor numbers of this code, and why.
IGNORED = {
    "architectures": "model_type decides",
    "auto_map": "names of code files that are not used",
    "_name_or_path": "where the file once lay",
    "_attn_implementation": "chosen at run time",
    "attn_implementation": "chosen at run time",
    "transformers_version": "who wrote the file",
    "torch_dtype": "the files themselves say their dtype; released ones differ from this field",
    "dtype": "as torch_dtype",
    "bos_token_id": "belongs to the tokenizer",
    "eos_token_id": "belongs to the tokenizer; given to generate()",
    "pad_token_id": "padding is said by segment ids",
    "initializer_range": "initialisation only",
    "use_cache": "an argument of generation here",
    "output_attentions": "what a call returns, not what it computes",
    "output_hidden_states": "what a call returns, not what it computes",
    "return_dict": "what a call returns, not what it computes",
    "chunk_size_feed_forward": "memory only",
    "is_encoder_decoder": "no meaning for this model type",
    "id2label": "classification heads only",
    "label2id": "classification heads only",
    "problem_type": "classification heads only",
    "sliding_window": "without effect while use_sliding_window is false, which is checked",
    "max_window_layers": "without effect while use_sliding_window is false, which is checked",
}


def read_config(fields: Mapping[str, Any]) -> DenseConfig:
    """A published config.json of model type qwen2 as a `DenseConfig`.

    Raises:
      UserError: naming every field that is unknown or has a value this code does not support.
    """
    read = Fields(fields)
    read.only("model_type", MODEL_TYPE)
    # A one-stream ParScale config saved again by transformers as Qwen2 keeps these.
    read.only("parscale_n", 1)
    read.ignore(dict.fromkeys(("parscale_n_tokens", "parscale_attn_smooth"), "unused at P = 1"))
    common = read_trunk(read)
    raise_problems(read)
    return DenseConfig(**common, qkv_bias=True)


def write_config(config: DenseConfig) -> dict[str, Any]:
    """The config.json of a `DenseConfig`, in the older spelling, which every reader knows.

    Raises:
      UserError: the model has no biases on query, key and value; the published layout has.
    """
    if not config.qkv_bias:
        raise UserError("qkv_bias=False has no published qwen2 form; expected qkv_bias=True")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **write_trunk(config),
    }


def read_trunk(read: Fields) -> dict[str, Any]:
    """The fields that qwen2 and qwen2_parscale share, as arguments of our config classes.

    Missing keys take the defaults of the published config class, which are not those of any
    released model.
    """
    read.ignore(IGNORED)
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("use_sliding_window", False)
    read.only("rope_scaling", None, {"rope_type": "default"}, {"type": "default"})
    read.only("quantization_config", None)
    read.only("pruned_heads", None, {})
    read.only("tie_encoder_decoder", False)
    read.only("add_cross_attention", False)
    read.only("is_decoder", False)
    width = read.integer("hidden_size", 4096)
    heads = read.integer("num_attention_heads", 32)
    depth = read.integer("num_hidden_layers", 32)
    kv_heads = (
        heads
        if read.get("num_key_value_heads", 32) is None
        else read.integer("num_key_value_heads", 32)
    )
    if read.get("head_dim") is not None:
        head_width = read.integer("head_dim", 1)
    else:
        head_width = width // heads
        if head_width * heads != width:
            read.problem("hidden_size", width, f"a multiple of num_attention_heads={heads}")
    if kv_heads > heads or heads % kv_heads:
        read.problem("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    layer_types = read.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * depth:
        read.problem("layer_types", layer_types, f"full_attention, {depth} times")
    return {
        "vocab_size": read.integer("vocab_size", 151936),
        "width": width,
        "mlp_width": read.integer("intermediate_size", 22016),
        "depth": depth,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": head_width,
        "max_length": read.integer("max_position_embeddings", 32768),
        "rope_theta": _rope_theta(read),
        "norm_eps": read.number("rms_norm_eps", 1e-6, 0),
        "tie_embeddings": read.boolean("tie_word_embeddings", False),
    }


def _rope_theta(read: Fields) -> float:
    """`rope_theta` at the top (transformers 4) or inside `rope_parameters` (transformers 5)."""
    top = None if read.get("rope_theta") is None else read.number("rope_theta", 10000.0, 1)
    inside = read.get("rope_parameters")
    if inside is None:
        return 10000.0 if top is None else top
    if not isinstance(inside, dict):
        read.problem("rope_parameters", inside, "an object")
        return 10000.0
    for key, value in inside.items():
        ok = key == "rope_theta" or (key in ("rope_type", "type") and value == "default")
        ok = ok or (key == "partial_rotary_factor" and value == 1)
        if not ok:
            expected = "only rope_theta and rope_type 'default'"
            read.problem(f"rope_parameters.{key}", value, expected)
    theta = inside.get("rope_theta", 10000.0 if top is None else top)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta >= 1:
        read.problem("rope_parameters.rope_theta", theta, "a number at least 1")
        return 10000.0
    if top is not None and top != theta:
        read.problem("rope_theta", top, f"the same as rope_parameters.rope_theta={theta}")
    return float(theta)


def write_trunk(config: Any) -> dict[str, Any]:
    """The fields that qwen2 and qwen2_parscale share; every one is written out."""
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "initializer_range": 0.02,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if config.head_width * config.heads != config.width:
        fields["head_dim"] = config.head_width
    return fields


def raise_problems(read: Fields) -> None:
    """Raises a UserError that lists all problems of a config, if there are any."""
    problems = read.problems()
    if problems:
        raise UserError("config.json: " + "; ".join(problems))
