"""Against transformers' own Qwen2, Qwen3 and Llama: tiny random models, imported and exported."""

import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import layers, zoo
from hackle.zoo.parscale import retrofit

torch = importlib.import_module("torch")
transformers = importlib.import_module("transformers")

TOKENS = np.random.default_rng(0).integers(0, 48, (2, 13))
SMALL = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
# Of the four frequencies of a head of width 8, one is kept, one mixed, and two are divided.
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OURS = layers.Llama3Scaling(8.0, original_length=32)

# Their class, and fields of its config.
KINDS = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 all heads": ("Qwen2", {"num_key_value_heads": 4}),
    "qwen2 base": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 tied wide": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama 3.1": ("Llama", {"rope_parameters": STRETCHED}),
    "llama 3.2": ("Llama", {"rope_parameters": STRETCHED, "tie_word_embeddings": True}),
}


def logits(model):
    with torch.no_grad():
        return model.float().eval()(torch.tensor(TOKENS)).logits.numpy()


def random_model(kind="Qwen2", **changes):
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at 0 and norms at 1, which would hide a mix-up.
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_have_equal_logits(tmp_path, kind):
    name, changes = KINDS[kind]
    theirs = random_model(name, **changes)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    ours = zoo.from_pretrained(tmp_path / "in")
    assert type(ours).__name__ == "DenseLM"
    assert (ours.config.qkv_bias, ours.config.qk_norm) == (name == "Qwen2", name == "Qwen3")
    np.testing.assert_allclose(ours(TOKENS), expected, atol=1e-5, rtol=0)

    zoo.save_pretrained(ours, tmp_path / "out", max_shard_bytes=20_000)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 1
    again, info = getattr(transformers, f"{name}ForCausalLM").from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(logits(again), expected, atol=1e-6, rtol=0)
    same = ("vocab_size", "head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings")
    for key in same:
        assert getattr(again.config, key, None) == getattr(theirs.config, key, None), key


def test_what_distinguishes_the_families_changes_the_logits(tmp_path):
    """Norms, biases and stretched frequencies that were dropped would be seen above."""
    for kind, part in (("Qwen3", "norm"), ("Qwen2", "bias")):
        theirs = random_model(kind)
        before = logits(theirs)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "self_attn" in name and part in name:
                    parameter.fill_(1.0 if part == "norm" else 0.0)
        assert np.abs(logits(theirs) - before).max() > 0.1
    plain = dict(rope_type="default", rope_theta=STRETCHED["rope_theta"])
    before = logits(random_model("Llama", rope_parameters=STRETCHED))
    assert np.abs(logits(random_model("Llama", rope_parameters=plain)) - before).max() > 0.01


@pytest.mark.parametrize(
    "scaling",
    [
        layers.Llama3Scaling(8.0),
        layers.Llama3Scaling(32.0),
        layers.Llama3Scaling(3.0, low_frequency=0.5, high_frequency=7.0, original_length=1000),
    ],
)
def test_stretched_frequencies_are_theirs(scaling):
    rope = importlib.import_module("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        },
    )
    expected, factor = rope.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (jnp.arange(0, 128, 2) / 128)
    assert factor == 1.0
    np.testing.assert_allclose(scaling(plain), expected.numpy(), rtol=1e-6)
    kept = np.isclose(expected.numpy(), plain, rtol=1e-6)
    divided = np.isclose(expected.numpy() * scaling.factor, plain, rtol=1e-6)
    assert kept.any() and divided.any() and not (kept | divided).all()


def test_the_example_of_small_heads_has_all_three_kinds_of_frequency():
    plain = 1 / 50.0 ** (np.arange(0, 8, 2) / 8)
    ratio = np.asarray(OURS(jnp.asarray(plain))) / plain
    np.testing.assert_allclose(ratio[[0, 2, 3]], [1, 1 / 8, 1 / 8], rtol=1e-6)
    assert 0.2 < ratio[1] < 0.9


def test_import_of_bfloat16_files(tmp_path):
    random_model().bfloat16().save_pretrained(tmp_path)
    # Loaded anew: casting the model would round its rotary frequencies too.
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = zoo.from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(ours(TOKENS), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        ("dense-tiny", "Qwen2", {}),
        (
            "dense-tiny",
            "Qwen2",
            {"tie_embeddings": False, "head_width": 16, "rope_theta": 1e6},
        ),
        ("dense-tiny", "Qwen3", {"qkv_bias": False, "qk_norm": True}),
        ("dense-tiny", "Llama", {"qkv_bias": False, "rope_scaling": OURS}),
        ("parscale-tiny-p1", "Qwen2", {"norm_eps": 1e-5}),
    ],
)
def test_export_loads_in_their_class_with_equal_logits(tmp_path, name, kind, changes):
    ours = zoo.create(name, rngs=nnx.Rngs(3), vocab_size=48, width=64, **changes)
    zoo.save_pretrained(ours, tmp_path / "out", max_shard_bytes=100_000)
    theirs, info = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(ours(TOKENS), logits(theirs), atol=1e-5, rtol=0)
    if name != "parscale-tiny-p1":
        assert type(transformers.AutoConfig.from_pretrained(tmp_path / "out")) is type(
            theirs.config
        )


def test_their_copy_of_our_export_comes_back(tmp_path):
    ours = zoo.create("parscale-tiny-p1", rngs=nnx.Rngs(3), vocab_size=48)
    zoo.save_pretrained(ours, tmp_path / "out")
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "back")
    again = zoo.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == "DenseLM"
    np.testing.assert_array_equal(again(TOKENS), ours(TOKENS))


def test_what_their_files_say_of_unsupported_models_is_refused(tmp_path):
    """Configs as transformers writes them, not as we imagine them."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    refused = {
        ("Llama", "rope_parameters", (("factor", 2.0), ("rope_type", "dynamic"))): "dynamic",
        ("Llama", "attention_bias", True): "attention_bias=true",
        ("Llama", "mlp_bias", True): "mlp_bias=true",
        ("Qwen3", "attention_bias", True): "attention_bias=true",
        ("Qwen3", "rope_parameters", tuple(STRETCHED.items())): 'rope_type="llama3"',
        ("Qwen2", "use_sliding_window", True): "use_sliding_window=true",
        ("Qwen2", "rope_parameters", tuple(yarn.items())): 'rope_type="yarn"',
    }
    for i, ((kind, field, value), message) in enumerate(refused.items()):
        if isinstance(value, tuple):
            value = {"original_max_position_embeddings": 32, **dict(value)}
            if value["rope_type"] == "dynamic":
                del value["original_max_position_embeddings"]
        random_model(kind, **{field: value}).save_pretrained(tmp_path / str(i))
        with pytest.raises(zoo.UserError) as caught:
            zoo.from_pretrained(tmp_path / str(i))
        assert message in str(caught.value), (kind, field)


def test_biases_in_a_file_of_a_family_that_has_none_are_named(tmp_path):
    random_model("Llama", attention_bias=True).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "attention_bias": False}))
    with pytest.raises(zoo.UserError, match=r"12 unexpected tensors: .*q_proj\.bias"):
        zoo.from_pretrained(tmp_path)


def test_a_qwen2_checkpoint_becomes_the_trunk_of_streams(tmp_path):
    theirs = random_model()
    theirs.save_pretrained(tmp_path / "in")
    trunk = zoo.from_pretrained(tmp_path / "in")
    model = retrofit(trunk, 3, prefix_length=5, rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, tmp_path / "out")
    again = zoo.from_pretrained(tmp_path / "out")
    assert again.config.streams == 3
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
