"""Checkpoints: exact, on any mesh, safe from donation, refused by name."""

import shutil

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from hackle.pjit_configs import preset
from hackle.zoo.errors import UserError
from hackle.zoo.train.checkpoint import (
    METADATA_FILE,
    Checkpoints,
    RunFolder,
    check_identity,
    differences,
    load_model,
)
from hackle.zoo.train.plan import Plan
from tests.zoo.train.small import batch, program, recipe


def host(tree):
    def copy(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x)

    return jax.tree.map(copy, tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with steps 2 and 3 of a run, and the states as they were."""
    plan = Plan(recipe())
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    writer = Checkpoints(folder, plan.identity("data"), keep=2)
    state, states = plan.program.init(0), {}
    for step in (1, 2, 3):
        state, _ = plan.program.step(state, batch(step))
        states[step] = host(state)
        writer.save(step, state, {"next": step})
        # The buffers are donated at once: what is written must be a copy.
    for _ in range(3):
        state, _ = plan.program.step(state, batch())
    writer.close()
    return plan, folder, states


def test_only_the_last_are_kept(saved):
    _, folder, _ = saved
    assert folder.steps() == [2, 3]
    assert folder.latest() == 3
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("step", [2, 3])
def test_states_come_back_bit_by_bit(saved, step):
    plan, folder, states = saved
    reader = Checkpoints(folder, {}, keep=2)
    state = reader.restore(step, plan.program.abstract, plan.program.shardings)
    reader.close()
    chex.assert_trees_all_equal(host(state), states[step])
    assert folder.metadata(step)["data"] == {"next": step}
    assert folder.identity(step) == plan.identity("data")


@pytest.mark.devices(8)
def test_a_checkpoint_loads_onto_another_mesh(saved):
    _, folder, states = saved
    plan = Plan(recipe(preset="cpu8_data"))
    reader = Checkpoints(folder, {}, keep=2)
    state = reader.restore(3, plan.program.abstract, plan.program.shardings)
    reader.close()
    chex.assert_trees_all_equal(host(state), states[3])
    weight = state.trainable["final_norm"]["scale"][...]
    assert len(weight.sharding.device_set) == 8
    plan.program.step(state, batch())


def test_a_model_comes_from_its_run_alone(saved):
    plan, folder, states = saved
    model = load_model(folder.path)
    assert model.config == plan.config
    chex.assert_trees_all_equal(host(nnx.state(model)), states[3].trainable)
    low = load_model(folder.path, step=2, preset=preset("cpu1"), dtype="bfloat16")
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(nnx.state(low)))
    with pytest.raises(UserError, match=r"no checkpoint of step 7; steps: \[2, 3\]"):
        load_model(folder.path, step=7)


def test_both_modes_name_parameters_alike(tmp_path):
    it = program(mode="frozen_trunk")
    writer = Checkpoints(RunFolder(tmp_path), {}, keep=1)
    state = it.init(0)
    writer.save(1, state, None)
    writer.close()
    full = program()
    found = RunFolder(tmp_path).parameters(1, nnx.state(full.model(full.init(1))))
    chex.assert_trees_all_equal(host(found), host(nnx.state(it.model(state))))


def test_what_is_not_complete_is_not_there(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.latest() is None
    folder.checkpoints.mkdir()
    (folder.checkpoints / "4.orbax-checkpoint-tmp-0").mkdir()
    (folder.checkpoints / "5").mkdir()
    assert folder.latest() is None
    with pytest.raises(UserError, match="no complete checkpoint; steps: none"):
        load_model(tmp_path)


def test_a_damaged_checkpoint_is_a_user_error(saved, tmp_path):
    plan, folder, _ = saved
    shutil.copytree(folder.path, tmp_path / "copy")
    copy = RunFolder(tmp_path / "copy")
    for path in (copy.checkpoints / "3" / "parameters").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:1000])
    reader = Checkpoints(copy, {}, keep=2)
    with pytest.raises(UserError, match=f"{DAMAGED}: .*Unterminated .*; delete") as caught:
        reader.restore(3, plan.program.abstract, plan.program.shardings)
    reader.close()
    assert caught.value.__cause__ is not None


DAMAGED = "checkpoint .*/3 cannot be read and may be damaged"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:100], f"{DAMAGED}: JSONDecodeError: Unterminated .*; delete this fold"),
        (lambda text: "[]", f"{DAMAGED}: TypeError"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 7'),
         "checkpoint .*/3 has format version 7; expected 1"),
    ],
)  # fmt: skip
def test_damaged_metadata_are_no_other_version(saved, tmp_path, change, message):
    shutil.copytree(saved[1].path, tmp_path / "copy")
    copy = RunFolder(tmp_path / "copy")
    path = copy.checkpoints / "3" / METADATA_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        copy.metadata(3)
    shutil.rmtree(path.parent)
    assert copy.latest() == 2 and copy.metadata(2)["data"] == {"next": 2}


def test_a_full_device_is_no_damaged_checkpoint(saved, monkeypatch):
    plan, folder, _ = saved

    def full(*_, **__):
        raise RuntimeError("no handler") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(ocp, "load_checkpointables", full)
    reader = Checkpoints(folder, {}, keep=2)
    with pytest.raises(RuntimeError, match="no handler"):
        reader.restore(3, plan.program.abstract, plan.program.shardings)
    reader.close()


def identity(**changes):
    plan = Plan(recipe(**changes))
    return plan.identity("corpus")


def test_what_may_differ_may_differ(tmp_path):
    check_identity(identity(), identity(eval_every=3, keep=1, remat="full", data_dir="x"), tmp_path)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"steps": 7}, "of another recipe: steps: saved 6, now 7; use another --out"),
        ({"seed": 1, "batch": 4}, "batch: saved 8, now 4; seed: saved 0, now 1"),
        ({"length": 8}, "length: saved 16, now 8"),
        ({"model": "parscale-tiny-p4"}, "of another model: streams: saved 2, now 4"),
        ({"vocab_size": 62}, "of another model: vocab_size: saved 61, now 62"),
        ({"preset": "h100x1"}, "precision of the preset: compute: saved 'float32', now 'bfloat16'"),
    ],
)
def test_what_may_not_differ_is_named(tmp_path, changes, text):
    with pytest.raises(UserError, match=text):
        check_identity(identity(), identity(**changes), tmp_path)


def test_other_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="content of corpus 'random' has changed"):
        check_identity(identity(), {**identity(), "data": "other"}, tmp_path)


def test_differences_name_fields_of_either_side():
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == (
        "a: saved 1, now None; b: saved 2, now 3; c: saved None, now 4"
    )
