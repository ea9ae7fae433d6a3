"""config.json: every field is translated, known to be harmless, or refused by name."""

import dataclasses

import pytest

from hackle import zoo
from hackle.layers import Llama3Scaling
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
QWEN3 = {**QWEN, "model_type": "qwen3", "head_dim": 8}
LLAMA = {**QWEN, "model_type": "llama"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
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
    qwen3, llama = (dense.read_config({"model_type": name}) for name in ("qwen3", "llama"))
    assert (qwen3.vocab_size, qwen3.mlp_width, qwen3.kv_heads) == (151936, 22016, 32)
    assert (llama.vocab_size, llama.mlp_width, llama.kv_heads) == (32000, 11008, 32)
    assert (qwen3.max_length, llama.max_length) == (32768, 2048)
    narrow = {"hidden_size": 64, "num_attention_heads": 4}
    qwen3 = dense.read_config({"model_type": "qwen3", **narrow, "num_key_value_heads": 2})
    assert qwen3.head_width == 128
    llama = dense.read_config({"model_type": "llama", **narrow})
    assert (llama.head_width, llama.kv_heads) == (16, 4)


def test_null_key_value_heads_mean_all_heads():
    assert dense.read_config({**QWEN, "num_key_value_heads": None}).kv_heads == 4


def test_head_dim_is_honoured_and_written_back():
    config = dense.read_config({**QWEN, "head_dim": 8})
    assert config.head_width == 8
    assert dense.write_config(config)["head_dim"] == 8
    assert "head_dim" not in dense.write_config(dense.read_config(QWEN))
    # Without the field, a reader of Qwen3 would take 128.
    assert dense.write_config(dense.read_config({**QWEN3, "head_dim": 4}))["head_dim"] == 4


def test_families_have_what_their_type_says():
    for fields, bias, norm in ((QWEN, True, False), (QWEN3, False, True), (LLAMA, False, False)):
        config = dense.read_config(fields)
        assert (config.qkv_bias, config.qk_norm) == (bias, norm)
        assert dense.write_config(config)["model_type"] == fields["model_type"]


# The fields that decide, of the config.json files as released.
RELEASED = {
    "qwen2.5-0.5b": (
        "qwen2", 151936, 896, 4864, 24, 14, 2, None, 32768, 1e-6, True, 1000000.0, None,
    ),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, None, 131072, 1e-6, False, 1e6, None),
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 40960, 1e-6, True, 1000000, None),
    "qwen3-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 40960, 1e-6, True, 1000000, None),
    "qwen3-32b": ("qwen3", 151936, 5120, 25600, 64, 64, 8, 128, 40960, 1e-6, False, 1e6, None),
    "llama3-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, None, 8192, 1e-5, False, 5e5, None),
    "llama3.1-70b": (
        "llama", 128256, 8192, 28672, 80, 64, 8, None, 131072, 1e-5, False, 5e5, LLAMA3,
    ),
    "llama3.2-1b": (
        "llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, True, 5e5,
        {**LLAMA3, "factor": 32.0},
    ),
}  # fmt: skip
DECIDE = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
    "rope_theta rope_scaling"
).split()


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_the_configs_of_the_registry(name):
    fields = dict(zip(DECIDE, RELEASED[name], strict=True))
    if fields["head_dim"] is None:
        del fields["head_dim"]
    rest = {"hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True}
    if fields["model_type"] == "llama":
        rest |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    else:
        rest |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28}
    assert dense.read_config({**fields, **rest}) == zoo.entry(name).config


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
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, 'rope_scaling.type="yarn"'),
        ("rope_scaling", {"rope_type": "dynamic"}, 'rope_scaling.rope_type="dynamic"'),
        ("rope_scaling", LLAMA3, 'rope_scaling.rope_type="llama3"'),
        ("rope_scaling", "yarn", 'rope_scaling="yarn"'),
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
        ("model_type", "mistral", 'model_type="mistral"'),
    ],
)
def test_refused_by_name_and_value(field, value, shown):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        dense.read_config({**QWEN, field: value})
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "changes", "shown"),
    [
        (QWEN3, {"attention_bias": True}, "attention_bias=true"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window=true"),
        (QWEN3, {"head_dim": 0}, "head_dim=0"),
        (QWEN3, {"parscale_n": 1}, "unknown field parscale_n=1"),
        (QWEN3, {"mlp_bias": False}, "unknown field mlp_bias=false"),
        (QWEN3, {"rope_scaling": LLAMA3}, 'rope_type="llama3"'),
        (LLAMA, {"attention_bias": True}, "attention_bias=true"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=true"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window=4096"),
        (LLAMA, {"use_sliding_window": True}, "unknown field use_sliding_window=true"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type="linear"'),
        (LLAMA, {"rope_scaling": {**LLAMA3, "factor": 0.5}}, "rope_scaling.factor=0.5"),
        (LLAMA, {"rope_scaling": {**LLAMA3, "beta": 1}}, "unknown field rope_scaling.beta=1"),
        (LLAMA, {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor=1.0"),
        (LLAMA, {"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor=0.5"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "original_max_position_embeddings=null",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "field rope_parameters and rope_scaling=",
        ),
        (
            LLAMA,
            {"rope_theta": 1e4, "rope_parameters": {**LLAMA3, "rope_theta": 2e4}},
            "rope_theta and rope_parameters.rope_theta=[10000.0, 20000.0]",
        ),
    ],
)
def test_each_family_refuses_what_it_does_not_have(fields, changes, shown):
    with pytest.raises(UserError, match=r"config\.json") as caught:
        dense.read_config({**fields, **changes})
    assert shown in str(caught.value)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3},
    ],
)
def test_both_spellings_of_stretched_frequencies(spelling):
    config = dense.read_config({**LLAMA, **spelling})
    assert (config.rope_theta, config.rope_scaling) == (5e5, Llama3Scaling(8.0))
    assert dense.write_config(config)["rope_scaling"] == LLAMA3


def test_stretched_frequencies_come_back_from_json():
    """As a checkpoint of a run holds a config."""
    config = dataclasses.replace(zoo.entry("llama3.2-1b").config)
    assert type(config)(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    "changes",
    [{"factor": 0.5}, {"low_frequency": 4.0}, {"low_frequency": 0}, {"original_length": 0}],
)
def test_impossible_scalings_are_refused(changes):
    with pytest.raises(ValueError, match="Llama3Scaling"):
        Llama3Scaling(**{"factor": 8.0, **changes})


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
    for changes in (
        {"qk_norm": True},
        {"rope_scaling": Llama3Scaling(8.0)},
        {"qkv_bias": False, "qk_norm": True, "rope_scaling": Llama3Scaling(8.0)},
    ):
        with pytest.raises(UserError, match=r"qkv_bias=\w+ with qk_norm=\w+ and rope_scaling="):
            dense.write_config(dataclasses.replace(config, **changes))
    config = zoo.entry("parscale-tiny-p2").config
    with pytest.raises(UserError, match="prefix_length=0"):
        parscale.write_config(dataclasses.replace(config, prefix_length=0))
