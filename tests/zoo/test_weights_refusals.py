"""Damaged folders are refused whole, and a folder that cannot be written is left alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo import UserError
from hackle.zoo.weights.folder import CheckpointError
from hackle.zoo.weights.tensor_file import read_header
from tests.zoo.golden import golden_config, golden_tensors, write_golden_checkpoint
from tests.zoo.published import INDEX, SINGLE, write_folder


@pytest.fixture
def golden(tmp_path):
    return write_golden_checkpoint(tmp_path / "golden", 3)


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
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json; expected a publ"),
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


def test_a_name_on_the_hub_says_how_to_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a local folder") as caught:
        zoo.from_pretrained("Qwen/Qwen2.5-0.5B")
    assert "`hf download Qwen/Qwen2.5-0.5B --local-dir DIR`" in str(caught.value)
    (tmp_path / "runs").mkdir()
    for path in ("runs/p5", "nowhere", "../nowhere/else", "a/b/c"):
        with pytest.raises(UserError, match=f"checkpoint folder {path} does not exist$"):
            zoo.from_pretrained(path)


def test_a_file_names_the_folder_that_holds_it(golden):
    for file in ("config.json", SINGLE):
        with pytest.raises(UserError, match=f"{file} is a file; expected .*: {golden}$"):
            zoo.from_pretrained(golden / file)


def test_a_training_run_names_the_model_in_it(golden, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"convert.py export {run} OUT"):
        zoo.from_pretrained(run)
    golden.rename(run / "model")
    with pytest.raises(UserError, match=f"is a training run; expected .*: {run}/model$"):
        zoo.from_pretrained(run)
    assert zoo.from_pretrained(run / "model").config.streams == 3


def test_home_is_expanded_and_a_url_refused(golden, monkeypatch):
    monkeypatch.setenv("HOME", str(golden.parent))
    assert zoo.from_pretrained("~/golden").config.streams == 3
    with pytest.raises(UserError, match=f"checkpoint folder {golden.parent}/other does not exist"):
        zoo.from_pretrained("~/other")
    with pytest.raises(UserError, match="'gs://bucket/model' is a URL"):
        zoo.from_pretrained("gs://bucket/model")


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
