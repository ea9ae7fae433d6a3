"""Every preset: consistent with its file, and a golden layout of one real model on each."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import pytest
from flax import nnx

from hackle.pjit_configs import (
    MESH_AXES,
    ConfigError,
    Preset,
    list_presets,
    mesh_sizes,
    partition_specs,
    preset,
    rule_table,
)
from hackle.zoo import registry

MODEL = "parscale-1.8b-p4"
GOLDEN = Path(__file__).parent / "golden" / f"{MODEL}.json"
UPDATE = "HACKLE_UPDATE_GOLDEN"


def test_presets_are_listed_by_file():
    folder = Path(__file__).parents[2] / "pjit_configs" / "presets"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert list_presets() == sorted(files)


@pytest.mark.parametrize("name", list_presets())
def test_preset_is_named_as_its_file_and_says_what_it_is_for(name):
    found = preset(name)
    assert found.name == name
    assert found.description and "\n" not in found.description
    hardware, _, _ = name.partition("_")
    if hardware != "any":
        # The number at the end of the first word is the number of devices.
        count = 1
        for size in found.mesh_shape.values():
            count *= size
        assert hardware.endswith(str(count)), (hardware, count)
        for axis in ("fsdp", "stream", "tensor"):
            assert (axis in name) <= (found.mesh_shape.get(axis, 1) > 1)


def test_chips_without_bfloat16_units_compute_in_float32():
    for name in list_presets():
        found = preset(name)
        if found.hardware is not None and found.hardware.peak_flops is None:
            assert found.precision.compute == "float32", name


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'cpu8_fspd'; did you mean cpu8_fsdp"):
        preset("cpu8_fspd")


@pytest.mark.parametrize("name", ["base", "presets", "../mesh", "", "__init__"])
def test_only_presets_are_presets(name):
    with pytest.raises(ConfigError, match="unknown preset"):
        preset(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": "h1000"}, "unknown chip 'h1000'"),
        ({"remat": "all"}, "unknown remat 'all'"),
        ({"mesh_shape": {"model": 8}}, "unknown mesh axis 'model'"),
        ({"mesh_shape": {"data": 0}}, "mesh axis data has size 0"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(change, message):
    good = dict(name="mine", description="mine", chip=None, mesh_shape={}, rules=rule_table("data"))
    Preset(**good)
    with pytest.raises(ConfigError, match=message):
        Preset(**{**good, **change})


def test_presets_are_frozen_and_changed_by_copy():
    found = preset("cpu1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.remat = "full"
    assert found.replace(remat="full").remat == "full" and preset("cpu1").remat == "none"


@functools.cache
def abstract_model():
    found = registry.entry(MODEL)
    make = lambda: found.model_class(found.config, rngs=nnx.Rngs(0))
    return nnx.split(nnx.eval_shape(make))[1]


def layout(name):
    """`path: size/mesh axis ...` of every parameter, as one line each."""
    found = preset(name)
    sizes = mesh_sizes({axis: 8 if n == -1 else n for axis, n in found.mesh_shape.items()})
    state = abstract_model()
    specs = dict(nnx.to_flat_state(partition_specs(state, found.rules, sizes)))
    lines = {}
    for path, variable in nnx.to_flat_state(state):
        entries = specs[path].get_value()
        words = []
        for size, entry in zip(variable.shape, entries, strict=True):
            over = (entry,) if isinstance(entry, str) else entry or ()
            split = "".join(f"/{axis}{sizes[axis]}" for axis in over if sizes[axis] > 1)
            words.append(f"{size}{split}")
        lines[".".join(map(str, path))] = " ".join(words)
    return lines


def test_layout_of_a_real_model_on_every_preset_is_as_recorded():
    """A change of rules, axes or parameters shows here; set HACKLE_UPDATE_GOLDEN=1 to record it."""
    found = {name: layout(name) for name in list_presets()}
    if os.environ.get(UPDATE):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    recorded = json.loads(GOLDEN.read_text())
    assert sorted(found) == sorted(recorded)
    for name in found:
        assert found[name] == recorded[name], f"{name}: set {UPDATE}=1 if this is meant"


def test_layouts_split_what_they_say():
    """Every fsdp preset splits all parameters that matter; stream presets split the prefixes."""
    state = abstract_model()
    for name in list_presets():
        found = preset(name)
        sizes = mesh_sizes({axis: 8 if n == -1 else n for axis, n in found.mesh_shape.items()})
        specs = dict(nnx.to_flat_state(partition_specs(state, found.rules, sizes)))
        for path, variable in nnx.to_flat_state(state):
            axes, spec = variable.get_metadata("axes"), specs[path].get_value()
            for mesh_axis, logical in (("fsdp", "embed"), ("stream", "stream"), ("tensor", "mlp")):
                if sizes[mesh_axis] > 1 and logical in axes:
                    assert mesh_axis in jax.tree.leaves(tuple(spec)), (name, path)
    assert tuple(sizes) == MESH_AXES
