"""Which method None stands for: by platform and shape, from one table."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from hackle.layers import recurrent
from hackle.layers.recurrent import methods
from hackle.layers.recurrent.methods import Options

try:
    from jax.sharding import AbstractDevice
except ImportError:  # not public before jax 0.11
    from jax._src.mesh import AbstractDevice


class Kernel:
    """A fused kernel that runs where `reason` is None."""

    def __init__(self, reason=None):
        self.unsupported = lambda u: reason


@pytest.mark.parametrize(
    "platform, kernel, time, method",
    [
        ("cpu", None, 1, "scan"),
        ("cpu", None, 100_000, "scan"),
        ("gpu", Kernel(), 1, "fused"),
        ("tpu", Kernel(), 100_000, "fused"),
        ("gpu", Kernel("an older chip"), 127, "scan"),
        ("gpu", Kernel("an older chip"), 128, "shooting"),
        ("tpu", Kernel("float16"), 128, "shooting"),
        ("abacus", None, 4096, "scan"),
    ],
)
def test_the_table(monkeypatch, platform, kernel, time, method):
    monkeypatch.setattr(methods, "_FUSED", {platform: kernel} if kernel else {})
    u = jax.ShapeDtypeStruct((1, time, 3, 8), jnp.float32)
    for options in (Options(), Options(fallback=True)):
        chosen, told = methods.choose("gru", None, options, platform, u)
        assert chosen == method
        assert told == (options if method == "shooting" else Options())


def test_the_choice_is_logged_once(caplog):
    methods._say_once.cache_clear()
    u = jnp.zeros((1, 2, 3, 1))
    with caplog.at_level("INFO", logger="hackle"):
        for _ in range(2):
            recurrent.gru(u, jnp.zeros((3, 1)), method=None)
    said = [r.getMessage() for r in caplog.records if "recurrence: chose" in r.getMessage()]
    assert len(said) == 1


def seen(u):
    """The platform, as a traced recurrence sees it."""
    found = []
    jax.eval_shape(lambda u: (found.append(methods.platform(u)), u)[1], u)
    return found[0]


def test_the_platform_is_that_of_the_mesh_the_array_or_the_default_device(monkeypatch):
    u = jnp.zeros((1, 2, 3, 1), device=jax.devices("cpu")[0])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert methods.platform(u) == "cpu"  # it is there
    assert seen(u) == "gpu"
    for default in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(default):
            assert seen(u) == "cpu"
    for platform, name in (("cuda", "gpu"), ("gpu", "gpu"), ("tpu", "tpu")):
        chip = AbstractDevice(device_kind="a chip", num_cores=1, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip)):
            assert seen(u) == name
            with jax.default_device("cpu"):
                assert seen(u) == name
