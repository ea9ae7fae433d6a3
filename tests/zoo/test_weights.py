"""Whole folders: there and back bit for bit, in any dtype, tied and untied."""

import importlib
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from hackle import layers, zoo
from hackle.layers.multiverse import Tags
from hackle.zoo import UserError
from hackle.zoo.weights.folder import CheckpointError
from hackle.zoo.weights.tensor_file import read_header, write_file
from tests.zoo.golden import golden_config, golden_tensors, write_golden_checkpoint
from tests.zoo.published import INDEX, assert_same_tensors, stored, write_folder


@pytest.fixture
def golden(tmp_path):
    return write_golden_checkpoint(tmp_path / "golden", 3)


@pytest.mark.parametrize("streams", [1, 3])
def test_import_then_export_gives_the_same_tensors(tmp_path, streams):
    source = write_golden_checkpoint(tmp_path / "in", streams)
    model = zoo.from_pretrained(source)
    zoo.save_pretrained(model, tmp_path / "out")
    assert_same_tensors(stored(source), stored(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "qwen2_parscale"
    for key, value in golden_config(streams).items():
        if key in written and key != "torch_dtype":
            assert written[key] == value, key


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense-tiny", {}),
        ("dense-tiny", {"tie_embeddings": False, "kv_heads": 1, "head_width": 6}),
        ("dense-tiny", {"qkv_bias": False, "qk_norm": True}),
        ("dense-tiny", {"qkv_bias": False, "rope_scaling": layers.Llama3Scaling(8.0)}),
        ("multiverse-tiny", {"tags": Tags.parathinker(3)}),
        ("parscale-tiny-p1", {"tie_embeddings": False}),
        ("parscale-tiny-p4", {}),
    ],
)
@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_export_then_import_is_bit_equal(tmp_path, name, changes, limit):
    small = dict(vocab_size=40, width=32, mlp_width=48, depth=3)
    model = zoo.create(name, rngs=nnx.Rngs(7), **{**small, **changes})
    zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=limit)
    assert (tmp_path / "out" / INDEX).exists() == (limit < 10**9)
    again = zoo.from_pretrained(tmp_path / "out")
    assert type(again) is type(model) and again.config == model.config
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(again))
    chex.assert_trees_all_equal_dtypes(nnx.state(model), nnx.state(again))
    for path, variable in nnx.to_flat_state(nnx.state(again)):
        assert len(variable.get_metadata("axes")) == variable.ndim, path


def test_shards_hold_what_they_may_and_the_index_says_it_all(tmp_path):
    model = zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(0), vocab_size=64, depth=2)
    zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=300_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    found = {name: file.name for file in files for name in read_header(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == 4 * model.config.parameter_count()
    for file in files:
        sizes = [info.stop - info.start for info in read_header(file).values()]
        assert len(sizes) == 1 or sum(sizes) <= 300_000
    # In the order of the layers, as released: each file holds one stretch of them.
    order = [name for file in files for name in read_header(file)]
    layers = [int(name.split(".")[2]) for name in order if ".layers." in name]
    assert layers == sorted(layers)


def test_folders_written_by_the_safetensors_package_load(tmp_path):
    package = importlib.import_module("safetensors.numpy")
    folder = tmp_path / "in"
    folder.mkdir()
    tensors = golden_tensors(3)
    parts = {f"part-{i}.safetensors": dict(list(tensors.items())[i::3]) for i in range(3)}
    for file, part in parts.items():
        package.save_file(part, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(golden_config(3)))
    whole = zoo.from_pretrained(write_golden_checkpoint(tmp_path / "one", 3))
    chex.assert_trees_all_equal(nnx.state(whole), nnx.state(zoo.from_pretrained(folder)))


# dtypes


def test_stored_dtype_is_kept_or_cast(tmp_path):
    tensors = golden_tensors(3)
    folder = write_folder(tmp_path / "bf16", tensors, golden_config(3), ml_dtypes.bfloat16)
    kept = nnx.state(zoo.from_pretrained(folder))
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    wide = nnx.state(zoo.from_pretrained(folder, dtype=jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(wide, jax.tree.map(lambda x: x.astype("float32"), kept))
    assert zoo.from_pretrained(folder, dtype="float16").final_norm.scale.dtype == jnp.float16
    with pytest.raises(UserError, match="dtype 'int8' is not float32"):
        zoo.from_pretrained(folder, dtype="int8")


def test_bfloat16_models_are_written_as_float32_unless_asked(tmp_path, golden):
    model = zoo.from_pretrained(golden, dtype="bfloat16")
    zoo.save_pretrained(model, tmp_path / "wide")
    zoo.save_pretrained(model, tmp_path / "own", dtype=None)
    assert {t.dtype.name for t in stored(tmp_path / "wide").values()} == {"float32"}
    assert {t.dtype.name for t in stored(tmp_path / "own").values()} == {"bfloat16"}
    for name in ("wide", "own"):
        again = zoo.from_pretrained(tmp_path / name, dtype="bfloat16")
        chex.assert_trees_all_equal(nnx.state(model), nnx.state(again))


def test_layers_of_different_dtype_need_a_choice(tmp_path):
    folder, tensors = tmp_path / "mixed", golden_tensors(1)
    folder.mkdir()
    halves = {"a": np.float32, "b": ml_dtypes.bfloat16}
    weight_map = {}
    for (file, dtype), layer in zip(halves.items(), ("layers.0.", "layers.1."), strict=True):
        part = {
            k: v for k, v in tensors.items() if layer in k or (file == "a" and "layers" not in k)
        }
        write_file(
            folder / file, {k: v.shape for k, v in part.items()}, np.dtype(dtype), part.items()
        )
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(golden_config(1)))
    with pytest.raises(UserError, match="layers differ in dtype"):
        zoo.from_pretrained(folder)
    assert zoo.from_pretrained(folder, dtype="float32").config.streams == 1


# tied heads


def test_a_stored_copy_of_the_tied_table_is_accepted_only_when_equal(tmp_path):
    tensors = golden_tensors(1)
    table = tensors["model.embed_tokens.weight"]
    same = write_folder(tmp_path / "same", {**tensors, "lm_head.weight": table}, golden_config(1))
    assert zoo.from_pretrained(same).head is None
    other = table.copy()
    other[-1, -1] += 1e-3
    folder = write_folder(tmp_path / "x", {**tensors, "lm_head.weight": other}, golden_config(1))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        zoo.from_pretrained(folder)
    folder = write_folder(
        tmp_path / "y", {**tensors, "lm_head.weight": table[:5]}, golden_config(1)
    )
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[5, 16\], expected \[32, 16\]"):
        zoo.from_pretrained(folder)


def test_an_untied_head_is_needed_and_used(tmp_path):
    tensors = golden_tensors(1)
    untied = {**golden_config(1), "tie_word_embeddings": False}
    head = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    folder = write_folder(tmp_path / "a", {**tensors, "lm_head.weight": head}, untied)
    np.testing.assert_array_equal(zoo.from_pretrained(folder).head.weight[...], head.T)
    with pytest.raises(CheckpointError, match=r"1 missing tensors: lm_head.weight"):
        zoo.from_pretrained(write_folder(tmp_path / "b", tensors, untied))


# execution fields


def test_execution_fields_are_chosen_at_loading(golden):
    model = zoo.from_pretrained(golden, remat="full", attention="reference")
    assert (model.config.remat, model.config.attention) == ("full", "reference")
    with pytest.raises(UserError, match="remat='some'"):
        zoo.from_pretrained(golden, remat="some")
    with pytest.raises(UserError, match="unknown attention implementation 'flash'; expected one"):
        zoo.from_pretrained(golden, attention="flash")
