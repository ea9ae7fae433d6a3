"""Multiverse folders: every reader of the trunk loads them; one more field names the tags."""

import importlib
import json

import chex
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.layers import Llama3Scaling
from hackle.layers.multiverse import Tags
from hackle.zoo import UserError
from hackle.zoo.multiverse import as_multiverse, params
from tests.zoo.published import assert_same_tensors, stored

torch = importlib.import_module("torch")
transformers = importlib.import_module("transformers")

TOKENS = np.random.default_rng(0).integers(0, 192, (2, 13))
KINDS = {"Qwen2": {}, "Qwen3": dict(qkv_bias=False, qk_norm=True), "Llama": dict(qkv_bias=False)}
SMALL = dict(width=32, mlp_width=40, depth=2, head_width=8)


def logits(model):
    with torch.no_grad():
        return model.float().eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_tags_comes_back_and_loads_elsewhere(tmp_path, kind):
    changes = {**SMALL, **KINDS[kind], "tie_embeddings": kind == "Qwen3"}
    model = zoo.create("multiverse-tiny", rngs=nnx.Rngs(2), **changes)
    zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=20_000)
    again = zoo.from_pretrained(tmp_path / "out")
    assert type(again) is type(model) and again.config == model.config
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(again))

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(model(TOKENS), logits(theirs), atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "back")
    back = zoo.from_pretrained(tmp_path / "back")
    assert back.config == model.config, "transformers keeps the field that names the tags"
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))


def test_a_published_folder_is_dense_until_tags_are_named(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=192,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(config)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    trunk = zoo.from_pretrained(tmp_path / "in")
    assert type(trunk).__name__ == "DenseLM"
    model = as_multiverse(trunk, Tags.numbered(128))
    np.testing.assert_allclose(model(TOKENS), logits(theirs), atol=1e-5, rtol=0)
    zoo.save_pretrained(model, tmp_path / "tagged")
    zoo.save_pretrained(params.as_dense(model), tmp_path / "dense")
    for name, kind in (("tagged", "MultiverseLM"), ("dense", "DenseLM")):
        assert type(zoo.from_pretrained(tmp_path / name)).__name__ == kind
        assert_same_tensors(stored(tmp_path / name), stored(tmp_path / "in"))
    fields = json.loads((tmp_path / "tagged" / "config.json").read_text())
    tags = fields.pop(params.MARKER)
    assert tags["path"] == [["Path", 136, 137]]
    assert fields == json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(
    "tags",
    [Tags(), Tags.parathinker(3), Tags.npr(9), Tags.threadweaver(30)],
    ids=["multiverse", "parathinker", "npr", "threadweaver"],
)
def test_every_set_of_tags_survives_json(tags):
    config = zoo.entry("multiverse-32b").config
    config = type(config)(**{**vars(config), "tags": tags})
    fields = json.loads(json.dumps(params.write_config(config)))
    assert params.read_config(fields) == config


@pytest.mark.parametrize(
    ("tags", "shown"),
    [
        (None, "field multiverse_tags=None; expected an object"),
        ([1], r"field multiverse_tags=\[1\]; expected an object"),
        ({"road": []}, "road"),
        ({"path": [["Path", 1]]}, "field multiverse_tags: "),
        ({"path": [["Path", 1, "2"]]}, "field multiverse_tags: "),
        ({"path": [["Path", 1, 1]]}, "tag </Path> has token id 1, which <Path> has too"),
        ({"path": 3}, "field multiverse_tags: "),
    ],
)
def test_tags_that_are_none_are_refused(tags, shown):
    fields = params.write_config(zoo.entry("multiverse-tiny").config)
    with pytest.raises(UserError, match=shown):
        params.read_config({**fields, params.MARKER: tags})


def test_other_fields_are_checked_as_those_of_the_trunk(tmp_path):
    fields = params.write_config(zoo.entry("multiverse-tiny").config)
    with pytest.raises(UserError, match="unknown field surprise=1"):
        params.read_config({**fields, "surprise": 1})
    with pytest.raises(UserError, match="unknown field multiverse_tags"):
        zoo.registry.FAMILIES["dense"].params.read_config(fields)
    # Beside a family that has no tags, the field is not known.
    (tmp_path / "x").mkdir()
    config = {**fields, "model_type": "qwen2_parscale"}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unknown field multiverse_tags"):
        zoo.from_pretrained(tmp_path / "x")


def test_a_run_remembers_tags_and_frequencies(tmp_path):
    """Checkpoints hold configs as JSON, where tags and scalings are plain objects."""
    checkpoint = importlib.import_module("hackle.zoo.train.checkpoint")
    imported = importlib.import_module("hackle.zoo.train.imported")
    changes = {**SMALL, "qkv_bias": False, "rope_scaling": Llama3Scaling(8.0)}
    model = zoo.create("multiverse-tiny", rngs=nnx.Rngs(2), **changes)
    imported.write_run(tmp_path / "run", model, source="x")
    again = checkpoint.load_model(tmp_path / "run")
    assert type(again) is type(model) and again.config == model.config
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))


def test_a_resumed_run_is_known_as_the_same():
    """Nothing of the identity changes on its way through a file."""
    plan = importlib.import_module("hackle.zoo.train.plan")
    recipe = importlib.import_module("hackle.zoo.train.recipe").Recipe(
        model="multiverse-tiny", vocab_size=192, length=16, batch=8, corpus="random"
    )
    identity = plan.Plan(recipe).identity("data")
    assert json.loads(json.dumps(identity)) == identity
