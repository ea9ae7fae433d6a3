"""Against transformers' own Qwen2: tiny random models, imported and exported."""

import importlib

import numpy as np
import pytest
from flax import nnx

from hackle import zoo
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
    max_position_embeddings=64,
)


def logits(model):
    with torch.no_grad():
        return model.float().eval()(torch.tensor(TOKENS)).logits.numpy()


def random_model(**changes):
    config = transformers.Qwen2Config(**{**SMALL, **changes})
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at 0 and norms at 1, which would hide a mix-up.
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_import_has_equal_logits(tmp_path, tied, kv_heads):
    theirs = random_model(
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    ours = zoo.from_pretrained(tmp_path)
    assert type(ours).__name__ == "DenseLM" and ours.config.rope_theta == 5e4
    np.testing.assert_allclose(ours(TOKENS), logits(theirs), atol=2e-5, rtol=0)


def test_import_of_bfloat16_files(tmp_path):
    random_model(num_key_value_heads=2).bfloat16().save_pretrained(tmp_path)
    # Loaded anew: casting the model would round its rotary frequencies too.
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = zoo.from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(ours(TOKENS), logits(theirs), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense-tiny", {}),
        ("dense-tiny", {"tie_embeddings": False, "head_width": 16, "rope_theta": 1e6}),
        ("parscale-tiny-p1", {"norm_eps": 1e-5}),
    ],
)
def test_export_loads_in_their_class_with_equal_logits(tmp_path, name, changes):
    ours = zoo.create(name, rngs=nnx.Rngs(3), vocab_size=48, width=64, **changes)
    zoo.save_pretrained(ours, tmp_path / "out", max_shard_bytes=100_000)
    theirs, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(ours(TOKENS), logits(theirs), atol=1e-5, rtol=0)


def test_their_copy_of_our_export_comes_back(tmp_path):
    ours = zoo.create("parscale-tiny-p1", rngs=nnx.Rngs(3), vocab_size=48)
    zoo.save_pretrained(ours, tmp_path / "out")
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "back")
    again = zoo.from_pretrained(tmp_path / "back")
    assert type(again).__name__ == "DenseLM"
    np.testing.assert_array_equal(again(TOKENS), ours(TOKENS))


def test_a_qwen2_checkpoint_becomes_the_trunk_of_streams(tmp_path):
    theirs = random_model(num_key_value_heads=2)
    theirs.save_pretrained(tmp_path / "in")
    trunk = zoo.from_pretrained(tmp_path / "in")
    model = retrofit(trunk, 3, prefix_length=5, rngs=nnx.Rngs(0))
    zoo.save_pretrained(model, tmp_path / "out")
    again = zoo.from_pretrained(tmp_path / "out")
    assert again.config.streams == 3
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
