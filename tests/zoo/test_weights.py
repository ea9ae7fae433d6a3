"""Whole folders: there and back bit for bit, sharded, in other dtypes, damaged in many ways."""

import json
import os
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from hackle import pjit_configs, zoo
from hackle.zoo import UserError, registry
from hackle.zoo.weights.folder import CheckpointError, abstract_model, open_checkpoint
from hackle.zoo.weights.placement import placement
from hackle.zoo.weights.tensor_file import read_header, write_file
from tests.zoo.golden import golden_config, golden_tensors, write_golden_checkpoint

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_folder(folder, tensors, config, dtype=np.float32):
    """A published folder of one file, by plain writing."""
    folder.mkdir(parents=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_file(folder / SINGLE, shapes, np.dtype(dtype), tensors.items())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def stored(folder):
    """Name -> array of all tensors of a folder."""
    return {
        name: np.array(info.map())
        for file in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(file).items()
    }


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


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
    package = pytest.importorskip("safetensors.numpy")
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


# meshes


def some_config(name):
    wide = dict(vocab_size=64, width=32, mlp_width=48, depth=2, heads=4, kv_heads=4, head_width=8)
    return {**wide, "tie_embeddings": False} if name.startswith("dense") else wide


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["dense-tiny", "parscale-tiny-p2"])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1, 1), (1, 2, 2, 1, 2), (2, 1, 1, 1, 4)])
@pytest.mark.parametrize("how", ["mesh", "preset"])
def test_sharded_loading_equals_unsharded(tmp_path, name, shape, how):
    model = zoo.create(name, rngs=nnx.Rngs(1), **some_config(name))
    zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=50_000)
    sizes = dict(zip(pjit_configs.MESH_AXES, shape, strict=True))
    mesh = pjit_configs.build_mesh(sizes)
    rules = pjit_configs.rule_table("fsdp_tensor")
    expected = pjit_configs.shardings(nnx.state(model), rules, mesh)
    if how == "preset":
        mesh = pjit_configs.Preset(
            name="x", description="x", chip=None, mesh_shape=sizes, rules=rules
        )
    loaded = zoo.from_pretrained(tmp_path / "out", mesh=mesh)
    placed = jax.tree.map(lambda x: x.sharding, nnx.state(loaded))
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(placed), strict=True):
        assert got.spec == want.spec and got.mesh == want.mesh
    gate = loaded.blocks.block.mlp.gate.weight[...]
    assert gate.addressable_shards[0].data.size * shape[1] * shape[4] == gate.size
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, nnx.state(loaded)), jax.tree.map(np.asarray, nnx.state(model))
    )
    # And a sharded model is written as the one it equals.
    zoo.save_pretrained(loaded, tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "out"), stored(tmp_path / "again"))


@pytest.mark.devices(8)
def test_only_the_parts_of_a_device_are_read(tmp_path, monkeypatch):
    model = zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(1), **some_config("parscale"))
    zoo.save_pretrained(model, tmp_path / "out")
    made = []
    empty = np.empty
    monkeypatch.setattr(
        np, "empty", lambda shape, *a: made.append(tuple(shape)) or empty(shape, *a)
    )
    zoo.from_pretrained(tmp_path / "out", mesh=pjit_configs.build_mesh({"fsdp": 8}))
    monkeypatch.undo()
    assert (2, 4, 48) in made and (2, 32, 48) not in made


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_a_plain_mesh_places_as_the_rule_table_does(family):
    names = {"dense": "qwen2.5-7b", "parscale": "parscale-1.8b-p4"}
    config = zoo.entry(names[family]).config
    state = abstract_model(registry.FAMILIES[family], config)[1]
    mesh = jax.sharding.AbstractMesh((1, 4, 4, 1, 2), pjit_configs.MESH_AXES)
    expected = pjit_configs.partition_specs(
        state, pjit_configs.rule_table("fsdp_tensor"), dict(mesh.shape)
    )
    from hackle.zoo.weights import placement as module

    for path, variable in nnx.to_flat_state(expected):
        axes = variable.get_metadata("axes")
        assert tuple(module.MESH_AXIS.get(axis) for axis in axes) == tuple(variable.get_value()), (
            path
        )


def test_meshes_that_do_not_fit_are_refused(golden):
    state = abstract_model(registry.FAMILIES["parscale"], open_checkpoint(golden).config)[1]
    with pytest.raises(TypeError, match="mesh is a int"):
        placement(state, 8)


@pytest.mark.devices(8)
def test_a_dimension_that_does_not_divide_is_named(golden):
    mesh = pjit_configs.build_mesh({"tensor": 8})
    with pytest.raises(UserError, match=r"attention\.\w+\.\w+: (kv_)?heads of size \d"):
        zoo.from_pretrained(golden, mesh=mesh)
    preset = pjit_configs.Preset(
        name="x",
        description="x",
        chip=None,
        mesh_shape={"tensor": 8},
        rules=pjit_configs.rule_table("tensor"),
    )
    with pytest.raises(UserError, match="does not divide over tensor=8"):
        zoo.from_pretrained(golden, mesh=preset)


@pytest.mark.devices(8)
def test_a_mesh_with_fewer_axes_shards_over_those_it_has(golden):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4), ("fsdp",), axis_types=(AxisType.Auto,))
    model = zoo.from_pretrained(golden, mesh=mesh)
    assert model.embedding.weight[...].sharding.shard_shape((32, 16)) == (32, 4)


def test_without_a_mesh_parameters_are_not_tied_to_a_device(golden):
    assert not zoo.from_pretrained(golden).embedding.weight[...].committed


# execution fields


def test_execution_fields_are_chosen_at_loading(golden):
    model = zoo.from_pretrained(golden, remat="full", attention="reference")
    assert (model.config.remat, model.config.attention) == ("full", "reference")
    with pytest.raises(UserError, match="remat='some'"):
        zoo.from_pretrained(golden, remat="some")


# damaged folders


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder):
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "unknown field": (lambda f: edit_config(f, surprise=1), "unknown field surprise=1"),
    "model type": (lambda f: edit_config(f, model_type="gpt2"), "model_type 'gpt2'"),
    "not json": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "model_type is missing"),
    "no weights": (lambda f: (f / SINGLE).unlink(), f"neither {SINGLE} nor {INDEX}"),
    "truncated": (truncate, r"truncated: \d+ of \d+ bytes"),
    "empty file": (lambda f: (f / SINGLE).write_bytes(b""), "truncated or not a safetensors"),
    "odd heads": (lambda f: edit_config(f, head_dim=3), "head_width=3 must be even"),
    "other depth": (lambda f: edit_config(f, num_hidden_layers=3), "14 missing tensors: model.lay"),
    "other width": (lambda f: edit_config(f, intermediate_size=25), "6 tensors of another shape"),
    "other streams": (lambda f: edit_config(f, parscale_n=1), "8 unexpected tensors: model.agg"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(golden, what):
    damage, message = DAMAGE[what]
    damage(golden)
    with pytest.raises(UserError, match=message) as caught:
        zoo.from_pretrained(golden)
    assert "\n" not in str(caught.value)
    assert str(golden) in str(caught.value) or what == "odd heads"


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="nothing-here does not exist"):
        zoo.from_pretrained(tmp_path / "nothing-here")


def test_all_problems_of_the_tensors_are_collected(tmp_path):
    tensors = golden_tensors(3)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.prefix_v"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((16, 24), np.float32)
    tensors["model.extra"] = np.zeros(3, np.float32)
    folder = write_folder(tmp_path / "x", tensors, golden_config(3))
    with pytest.raises(CheckpointError) as caught:
        zoo.from_pretrained(folder)
    assert len(caught.value.problems) == 3
    for part in (
        "2 missing tensors: model.norm.weight, model.layers.1.self_attn.prefix_v",
        "1 unexpected tensors: model.extra",
        "model.layers.0.mlp.up_proj.weight is [16, 24], expected [24, 16]",
    ):
        assert part in str(caught.value)


def test_integer_tensors_are_refused(tmp_path):
    folder = write_folder(tmp_path / "x", golden_tensors(1), golden_config(1), np.int8)
    with pytest.raises(CheckpointError, match=r"26 tensors of a dtype other than F32, BF16, F16"):
        zoo.from_pretrained(folder)


def sharded(tmp_path):
    model = zoo.from_pretrained(write_golden_checkpoint(tmp_path / "golden", 3))
    zoo.save_pretrained(model, tmp_path / "shards", max_shard_bytes=9000)
    return tmp_path / "shards", sorted((tmp_path / "shards").glob("*.safetensors"))


def test_missing_and_damaged_shards_are_all_named(tmp_path):
    folder, files = sharded(tmp_path)
    held = len(read_header(files[0]))
    files[0].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        zoo.from_pretrained(folder)
    assert len(caught.value.problems) == 2
    assert f"missing file {files[0].name} with {held} tensors: model.embed_tokens" in str(
        caught.value
    )
    assert f"{files[2]}: truncated" in str(caught.value)


def test_index_and_shards_must_agree(tmp_path):
    folder, files = sharded(tmp_path)
    shutil.copy(files[0], files[1])
    with pytest.raises(CheckpointError) as caught:
        zoo.from_pretrained(folder)
    assert f"{files[1].name} lacks" in str(caught.value)
    assert f"{files[1].name} has {len(read_header(files[0]))} tensors not in the index" in str(
        caught.value
    )


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(tmp_path, index):
    folder, _ = sharded(tmp_path)
    (folder / INDEX).write_text(index)
    with pytest.raises(UserError, match=r"index\.json"):
        zoo.from_pretrained(folder)


def test_an_index_stays_inside_its_folder(tmp_path):
    folder, _ = sharded(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../golden/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        zoo.from_pretrained(folder)


# writing


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, golden):
    model = zoo.from_pretrained(golden)
    before = sorted(p.name for p in golden.iterdir())
    with pytest.raises(UserError, match=r"not empty \(it holds config.json\)"):
        zoo.save_pretrained(model, golden)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not a checkpoint"):
        zoo.save_pretrained(model, notes, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        zoo.save_pretrained(model, notes / "notes.txt")
    assert sorted(p.name for p in golden.iterdir()) == before
    assert [p.name for p in notes.iterdir()] == ["notes.txt"]


def test_overwriting_replaces_weights_and_keeps_the_tokenizer(tmp_path, golden):
    folder, _ = sharded(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more").mkdir()
    model = zoo.create("dense-tiny", rngs=nnx.Rngs(0), depth=1, width=16, vocab_size=8)
    zoo.save_pretrained(model, folder, overwrite=True)
    held = sorted(p.name for p in folder.iterdir())
    assert held == ["config.json", SINGLE, "more", "tokenizer.json"]
    assert zoo.from_pretrained(folder).config == model.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["golden", "shards"]


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path, golden):
    model = zoo.from_pretrained(golden)
    (tmp_path / "empty").mkdir()
    zoo.save_pretrained(model, tmp_path / "empty")
    zoo.save_pretrained(model, str(tmp_path / "a" / "b" / "c"))
    for folder in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert zoo.from_pretrained(folder).config == model.config


def test_a_failed_write_leaves_nothing_behind(tmp_path, golden, monkeypatch):
    model = zoo.from_pretrained(golden)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        zoo.save_pretrained(model, tmp_path / "out", max_shard_bytes=5000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["golden"]


def test_a_full_disk_is_seen_before_writing(tmp_path, golden, monkeypatch):
    model = zoo.from_pretrained(golden)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match=r"GB needed, 0.00 GB free"):
        zoo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_place_is_a_user_error(golden):
    model = zoo.from_pretrained(golden)
    with pytest.raises(UserError, match="cannot write"):
        zoo.save_pretrained(model, Path("/proc/nothing/here"))
    with pytest.raises(UserError, match="cannot write"):
        zoo.save_pretrained(model, golden / "config.json" / "below-a-file")


def test_extra_config_fields(tmp_path, golden):
    model = zoo.from_pretrained(golden)
    zoo.save_pretrained(model, tmp_path / "out", extra={"eos_token_id": 7})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    with pytest.raises(UserError, match="extra config fields hidden_size, surprise"):
        zoo.save_pretrained(model, tmp_path / "no", extra={"surprise": 1, "hidden_size": 3})
    with pytest.raises(UserError, match="max_shard_bytes=0"):
        zoo.save_pretrained(model, tmp_path / "no", max_shard_bytes=0)
