"""config.json: every field is translated, known to be harmless, or refused by name."""

import dataclasses

import pytest

from hackle import zoo
from hackle.zoo import UserError, registry
from hackle.zoo.dense import params as dense
from hackle.zoo.parscale import params as parscale
from tests.zoo.golden import golden_config

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def test_missing_keys_take_the_defaults_of_the_published_class():
    config = parscale.read_config({"model_type": "qwen2_parscale"})
    assert dataclasses.asdict(config) == {
        "vocab_size": 151936,
        "width": 4096,
        "mlp_width": 22016,
        "depth": 32,
        "heads": 32,
        "kv_heads": 32,
        "head_width": 128,
        "max_length": 32768,
        "streams": 1,
        "prefix_length": 48,
        "smoothing": 0.01,
        "rope_theta": 10000.0,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
        "remat": "none",
        "attention": None,
        "embedding_std": 0.02,
    }
    assert dense.read_config({"model_type": "qwen2"}).tie_embeddings is False


def test_null_key_value_heads_mean_all_heads():
    assert dense.read_config({**QWEN, "num_key_value_heads": None}).kv_heads == 4


def test_head_dim_is_honoured_and_written_back():
    config = dense.read_config({**QWEN, "head_dim": 8})
    assert config.head_width == 8
    assert dense.write_config(config)["head_dim"] == 8
    assert "head_dim" not in dense.write_config(dense.read_config(QWEN))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"},
        {"rope_theta": 500000, "rope_parameters": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float32"},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_both_spellings_of_the_rotary_base(spelling):
    assert dense.read_config({**QWEN, **spelling}).rope_theta == 5e5


def test_no_rotary_base_is_ten_thousand():
    assert dense.read_config(QWEN).rope_theta == 1e4
    assert (
        dense.read_config({**QWEN, "rope_parameters": {"rope_type": "default"}}).rope_theta == 1e4
    )


def test_full_attention_layers_are_accepted():
    dense.read_config({**QWEN, "layer_types": ["full_attention"] * 2})


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("hidden_act", "gelu", 'hidden_act="gelu"'),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "rope_scaling="),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, 'rope_type="yarn"'),
        ("rope_parameters", {"rope_type": "default", "factor": 4.0}, "rope_parameters.factor=4.0"),
        ("rope_parameters", "default", 'rope_parameters="default"'),
        ("rope_parameters", {"rope_theta": None}, "rope_parameters.rope_theta=null"),
        ("rope_theta", -1.0, "rope_theta=-1.0"),
        ("use_sliding_window", True, "use_sliding_window=true"),
        ("attention_dropout", 0.1, "attention_dropout=0.1"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding_attention"),
        ("layer_types", ["full_attention"], "layer_types="),
        ("quantization_config", {"bits": 4}, 'quantization_config={"bits": 4}'),
        ("is_decoder", True, "is_decoder=true"),
        ("attention_bias", False, "unknown field attention_bias=false"),
        ("some_new_field", None, "unknown field some_new_field=null"),
        ("vocab_size", "32", 'vocab_size="32"'),
        ("vocab_size", 0, "vocab_size=0"),
        ("num_hidden_layers", True, "num_hidden_layers=true"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps=NaN"),
        ("tie_word_embeddings", 1, "tie_word_embeddings=1"),
        ("num_key_value_heads", 3, "num_key_value_heads=3"),
        ("hidden_size", 18, "hidden_size=18"),
        ("parscale_n", 4, "parscale_n=4"),
        ("model_type", "llama", 'model_type="llama"'),
    ],
)
def test_refused_by_name_and_value(field, value, shown):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        dense.read_config({**QWEN, field: value})
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("parscale_n", 0), ("parscale_n_tokens", 0), ("parscale_attn_smooth", 1.5), ("new", 1)],
)
def test_parscale_fields_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        parscale.read_config({**golden_config(3), field: value})


def test_all_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        dense.read_config({**QWEN, "hidden_act": "relu", "a": 1, "attention_dropout": 0.5})
    for part in ('hidden_act="relu"', "unknown field a=1", "attention_dropout=0.5"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_config_survives_writing_and_reading(name):
    entry = zoo.entry(name)
    params = registry.FAMILIES[entry.family].params
    assert params.read_config(params.write_config(entry.config)) == entry.config


def test_a_config_without_published_form_is_refused():
    config = zoo.entry("dense-tiny").config
    with pytest.raises(UserError, match="qkv_bias=False"):
        dense.write_config(dataclasses.replace(config, qkv_bias=False))
    config = zoo.entry("parscale-tiny-p2").config
    with pytest.raises(UserError, match="prefix_length=0"):
        parscale.write_config(dataclasses.replace(config, prefix_length=0))
