"""Qwen2, Qwen2.5, Qwen3 and Llama checkpoints <-> `DenseLM`.

Tensors correspond by `ROWS`, one table for all of them; config.json is read and written by two
functions, with `MODEL_TYPES` for what differs from one published `model_type` to the next.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hackle.layers.rotary import Llama3Scaling
from hackle.zoo.dense.modeling import DenseConfig
from hackle.zoo.errors import UserError
from hackle.zoo.weights.config_fields import Fields
from hackle.zoo.weights.table import Row


@dataclasses.dataclass(frozen=True)
class Published:
    """What distinguishes the files of one `model_type`.

    Attributes:
      architecture: the class that reads them elsewhere.
      qkv_bias, qk_norm: as in `DenseConfig`.
      defaults: of the published config class, for fields that a file may leave out; they are not
        those of any released model.
      fixed: fields without counterpart here, and the one value that this code means.
      stretched: rotary frequencies may be scaled as in Llama 3.1.
    """

    architecture: str
    qkv_bias: bool
    qk_norm: bool
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    stretched: bool = False


_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "head_dim": None,
    "max_position_embeddings": 32768,
}
_LLAMA = {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
}

# Qwen2.5 is of type qwen2. A Llama file has no windows at all, so one would be of another model.
MODEL_TYPES: dict[str, Published] = {
    "qwen2": Published(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        qk_norm=False,
        defaults=_QWEN,
        fixed={"use_sliding_window": False},
    ),
    "qwen3": Published(
        "Qwen3ForCausalLM",
        qkv_bias=False,
        qk_norm=True,
        defaults={**_QWEN, "head_dim": 128},
        fixed={"use_sliding_window": False, "attention_bias": False},
    ),
    "llama": Published(
        "LlamaForCausalLM",
        qkv_bias=False,
        qk_norm=False,
        defaults=_LLAMA,
        fixed={"sliding_window": None, "attention_bias": False, "mlp_bias": False},
        stretched=True,
    ),
}

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
    Row("blocks.block.attention.query_norm.scale", _LAYER + "self_attn.q_norm.weight", "e", "e"),
    Row("blocks.block.attention.key_norm.scale", _LAYER + "self_attn.k_norm.weight", "e", "e"),
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
    "pretraining_tp": "how products were cut in training; the numbers are the same",
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
    """A published config.json of one of `MODEL_TYPES` as a `DenseConfig`.

    Raises:
      UserError: naming every field that is unknown or has a value this code does not support.
    """
    read = Fields(fields)
    read.only("model_type", *MODEL_TYPES)
    name = fields.get("model_type", "qwen2")
    if name == "qwen2":
        # A one-stream ParScale config saved again by transformers as Qwen2 keeps these.
        read.only("parscale_n", 1)
        read.ignore(dict.fromkeys(("parscale_n_tokens", "parscale_attn_smooth"), "unused at P = 1"))
    kind = MODEL_TYPES.get(name, MODEL_TYPES["qwen2"])
    trunk = read_trunk(read, kind)
    raise_problems(read)
    return DenseConfig(**trunk, qkv_bias=kind.qkv_bias, qk_norm=kind.qk_norm)


def write_config(config: DenseConfig) -> dict[str, Any]:
    """The config.json of a `DenseConfig`, in the older spelling, which every reader knows.

    Raises:
      UserError: no published model type has what this model has.
    """
    for name, kind in MODEL_TYPES.items():
        scalable = kind.stretched or config.rope_scaling is None
        if scalable and (kind.qkv_bias, kind.qk_norm) == (config.qkv_bias, config.qk_norm):
            return {"model_type": name, **write_trunk(config, kind)}
    raise UserError(
        f"qkv_bias={config.qkv_bias} with qk_norm={config.qk_norm} and rope_scaling="
        f"{config.rope_scaling} has no published form; expected those of {', '.join(MODEL_TYPES)}"
    )


def read_trunk(read: Fields, kind: Published) -> dict[str, Any]:
    """The fields that all these files share, as arguments of our config classes.

    `rope_scaling` is among them only where `kind` may have one.
    """
    read.ignore(IGNORED)
    for key, value in kind.fixed.items():
        read.only(key, value)
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("quantization_config", None)
    read.only("pruned_heads", None, {})
    read.only("tie_encoder_decoder", False)
    read.only("add_cross_attention", False)
    read.only("is_decoder", False)

    def integer(key: str) -> int:
        return read.integer(key, kind.defaults[key])

    width = read.integer("hidden_size", 4096)
    heads = read.integer("num_attention_heads", 32)
    depth = read.integer("num_hidden_layers", 32)
    all_heads = read.get("num_key_value_heads", kind.defaults["num_key_value_heads"]) is None
    kv_heads = heads if all_heads else integer("num_key_value_heads")
    if read.get("head_dim", kind.defaults["head_dim"]) is not None:
        head_width = integer("head_dim")
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
        "vocab_size": integer("vocab_size"),
        "width": width,
        "mlp_width": integer("intermediate_size"),
        "depth": depth,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": head_width,
        "max_length": integer("max_position_embeddings"),
        **_rotary(read, kind.stretched),
        "norm_eps": read.number("rms_norm_eps", 1e-6, 0),
        "tie_embeddings": read.boolean("tie_word_embeddings", False),
    }


def _rotary(read: Fields, stretched: bool) -> dict[str, Any]:
    """Base and scaling of the rotary frequencies, in either spelling.

    transformers 4 has `rope_theta` at the top and the rest in `rope_scaling`, transformers 5 has
    everything in `rope_parameters`. A file with both must say the same twice.
    """
    thetas, scalings = {}, {}
    if read.get("rope_theta") is not None:
        thetas["rope_theta"] = read.number("rope_theta", 10000.0, 1)
    for place in ("rope_parameters", "rope_scaling"):
        inside = read.object(place)
        if inside is None:
            continue
        if "rope_theta" in inside:
            thetas[f"{place}.rope_theta"] = inside.number("rope_theta", 10000.0, 1)
        inside.only("partial_rotary_factor", 1)
        known = ("default", "llama3") if stretched else ("default",)
        inside.only("rope_type", *known)
        inside.only("type", *known)
        kind = inside.get("rope_type", inside.get("type", "default"))
        scalings[place] = _llama3(inside) if kind == "llama3" else None
    for found in (thetas, scalings):
        if len(set(found.values())) > 1:
            read.problem(" and ".join(found), [*found.values()], "the same twice")
    theta = next(iter(thetas.values()), 10000.0)
    if not stretched:
        return {"rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": next(iter(scalings.values()), None)}


def _llama3(read: Fields) -> Llama3Scaling | None:
    """The scaling in the fields of `rope_scaling`; None where they have problems."""
    factor = read.number("factor", None, 1)
    low = read.number("low_freq_factor", None, 0)
    high = read.number("high_freq_factor", None, low)
    length = read.integer("original_max_position_embeddings", None)
    if read.problems():
        return None
    if not 0 < low < high:
        read.problem("high_freq_factor", high, f"more than low_freq_factor={low}, and that above 0")
        return None
    return Llama3Scaling(factor, low, high, length)


def write_trunk(config: Any, kind: Published) -> dict[str, Any]:
    """The fields that all these files share; every one that a default could bend is written."""
    fields = {
        "architectures": [kind.architecture],
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
        **{key: value for key, value in kind.fixed.items() if value is not None},
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
    }
    if kind.stretched and config.rope_scaling is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency,
            "high_freq_factor": config.rope_scaling.high_frequency,
            "original_max_position_embeddings": config.rope_scaling.original_length,
        }
    if kind.defaults["head_dim"] is not None or config.head_width * config.heads != config.width:
        fields["head_dim"] = config.head_width
    return fields


def raise_problems(read: Fields) -> None:
    """Raises a UserError that lists all problems of a config, if there are any."""
    problems = read.problems()
    if problems:
        raise UserError("config.json: " + "; ".join(problems))
