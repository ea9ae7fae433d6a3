"""Meshes: sizes, what is left, and every refusal by its message."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType

from hackle import pjit_configs
from hackle.pjit_configs import MESH_AXES, ConfigError, build_mesh, describe_mesh, mesh_sizes


def test_all_axes_in_order_and_the_rest_is_one():
    assert mesh_sizes({"tensor": 2, "data": 3}) == dict(data=3, fsdp=1, stream=1, seq=1, tensor=2)
    assert tuple(mesh_sizes({})) == MESH_AXES == ("data", "fsdp", "stream", "seq", "tensor")


def test_minus_one_is_what_is_left():
    assert mesh_sizes({"fsdp": -1, "stream": 2}, 8)["fsdp"] == 4
    assert mesh_sizes({"fsdp": -1}, 1)["fsdp"] == 1


@pytest.mark.parametrize(
    ("shape", "devices", "words"),
    [
        ({"model": 2}, 2, ["unknown mesh axis 'model'", "data, fsdp, stream, seq, tensor"]),
        ({"data": 0}, 1, ["mesh axis data", "size 0"]),
        ({"data": -2}, 1, ["mesh axis data", "size -2"]),
        ({"data": 2.0}, 2, ["mesh axis data", "size 2.0"]),
        ({"data": True}, 1, ["mesh axis data", "size True"]),
        ({"data": -1, "fsdp": -1}, 8, ["data and fsdp are -1"]),
        ({"fsdp": -1, "stream": 3}, 8, ["8 devices", "stream=3", "multiple of 3"]),
        ({"fsdp": -1}, None, ["mesh axis fsdp is -1", "number of devices"]),
        ({"fsdp": 4}, 8, ["fsdp=4", "needs 4 devices", "got 8"]),
        ({"fsdp": 16}, 8, ["fsdp=16", "needs 16 devices", "got 8"]),
    ],
)
def test_refusals_name_the_axis_and_the_numbers(shape, devices, words):
    with pytest.raises(ConfigError) as caught:
        mesh_sizes(shape, devices)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.devices(8)
def test_built_mesh_is_auto_and_uses_each_device_once():
    mesh = build_mesh({"fsdp": -1, "tensor": 2}, jax.devices()[:8])
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == dict(data=1, fsdp=4, stream=1, seq=1, tensor=2)
    assert mesh.axis_types == (AxisType.Auto,) * 5
    assert len({device.id for device in mesh.devices.flat}) == 8


@pytest.mark.devices(8)
def test_devices_left_to_it_are_the_first_but_given_ones_must_fit():
    assert list(build_mesh({"data": 2}).devices.flat) == jax.devices()[:2]
    with pytest.raises(ConfigError, match="needs 2 devices, got 8"):
        build_mesh({"data": 2}, jax.devices()[:8])


def test_too_few_devices_name_the_preset():
    with pytest.raises(ConfigError, match=r"preset v5e256_fsdp: mesh fsdp=256 needs 256 devices"):
        pjit_configs.preset("v5e256_fsdp").mesh()


HINT = "XLA_FLAGS=--xla_force_host_platform_device_count="


@pytest.mark.parametrize("shape", [{"fsdp": 16}, {"fsdp": -1, "tensor": 16}])
def test_too_few_cpu_devices_say_how_to_simulate_more(shape, monkeypatch):
    there = jax.devices("cpu")[:1]
    monkeypatch.setattr(jax, "devices", lambda: there)
    with pytest.raises(ConfigError, match=f"needs 16 devices, got 1; .*{HINT}16, set") as caught:
        build_mesh(shape)
    assert "\n" not in str(caught.value)


def test_no_simulation_is_offered_where_it_does_not_help(monkeypatch):
    there = jax.devices("cpu")[:1]
    with pytest.raises(ConfigError, match="needs 16 devices, got 1$"):
        build_mesh({"fsdp": 16}, there)  # the caller chose them
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu")])
    with pytest.raises(ConfigError, match="needs 16 devices, got 1$"):
        build_mesh({"fsdp": 16})


def test_description_leaves_out_axes_of_size_one():
    kind = jax.devices()[0].device_kind
    assert describe_mesh(build_mesh({}, jax.devices()[:1])) == f"one device (1 x {kind})"
