"""Kernels over a mesh: what each device is given, and which meshes are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hackle.layers import attention, masks
from hackle.layers.attention import dispatch, pallas_tpu, reference
from hackle.layers.sharding import axis_rules

RULES = {"batch": ("data", "fsdp"), "length": "seq", "heads": "tensor", "kv_heads": "tensor"}


class Chip:
    """A default device of another kind."""

    def __init__(self, platform, capability=None):
        self.platform, self.device_kind = platform, platform
        self.client = type("Client", (), {"platform_version": "cuda"})
        if capability is not None:
            self.compute_capability = capability


HOPPER, TPU = Chip("gpu", "9.0"), Chip("tpu")


def mesh(**sizes):
    names = ("data", "fsdp", "seq", "tensor")
    shape = [sizes.get(name, 1) for name in names]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 4)


def all_masks(batch, length):
    rng = np.random.default_rng(0)
    ids = lambda *shape: jnp.asarray(np.sort(rng.integers(0, 3, shape), -1), jnp.int32)
    block, path, segment = ids(1, 2, length), ids(1, 2, length), ids(batch, length)
    yield None
    yield masks.Prefix(2, masks.Padding(jnp.asarray(rng.integers(0, length, batch))))
    # Rows of the batch of their own, and one for all.
    packed = masks.Causal() & masks.Segments(segment, segment)
    yield packed & masks.Branches(block, path, block, path)


@pytest.mark.devices(8)
@pytest.mark.parametrize("key_heads, tensor", [(2, "tensor"), (1, None)])
def test_each_device_runs_its_own(key_heads, tensor, monkeypatch):
    """Values and gradients of the reference; a row and half the heads for each of 8 devices."""
    given = []

    def kernel(query, key, value, mask, scale):
        given.append((query.shape, key.shape))
        return reference.attend(query, key, value, mask, scale)

    monkeypatch.setattr(pallas_tpu, "attend", kernel)
    monkeypatch.setattr(pallas_tpu, "unsupported", lambda *_: None)
    batch, length = 4, 12
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (batch, length, 4, 8))
    key, value = (jax.random.normal(k, (batch, length, key_heads, 8)) for k in keys[1:])

    def loss(name, mask, *arrays):
        return jnp.sum(jnp.sin(attention(*arrays, mask=mask, implementation=name)))

    def grads(name, mask):
        gradient = jax.grad(functools.partial(loss, name, mask), (0, 1, 2))
        return jax.jit(gradient)(query, key, value)

    rules = RULES | {"kv_heads": tensor}
    for mask in all_masks(batch, length):
        want = grads("reference", mask)
        with jax.set_mesh(mesh(data=2, fsdp=2, tensor=2)), axis_rules(rules):
            got = grads("pallas_tpu", mask)
        for x, y in zip(got, want, strict=True):
            # Sums over heads come in another order on several devices: last bits of 20.
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=2e-6)
    assert set(given) == {((1, length, 2, 8), (1, length, 1, 8))}


@pytest.mark.parametrize(
    "sizes, rules, heads, reason",
    [
        ({"data": 2}, None, (4, 2), "nothing says how arrays lie over the mesh"),
        ({"seq": 2}, RULES, (4, 2), r"splits them over \('seq',\)"),
        ({"tensor": 2}, RULES | {"kv_heads": None}, (4, 2), "do not lie as the query heads"),
        ({"tensor": 2}, RULES, (6, 3), "key_heads 3 does not divide over 2"),
        ({"data": 8}, RULES, (4, 2), "batch 4 does not divide over 8"),
        ({"data": 4, "tensor": 2}, RULES, (4, 2), None),
        ({}, None, (4, 2), None),
    ],
)
@pytest.mark.devices(8)
def test_meshes_are_refused_by_name(sizes, rules, heads, reason, monkeypatch):
    size = lambda n: jax.ShapeDtypeStruct((4, 200, n, 64), jnp.bfloat16)
    query, key = map(size, heads)
    choose = lambda name: dispatch._choose(name, dispatch._PREFERENCE, query, key, None)
    here = mesh(**sizes)
    monkeypatch.setattr(jax, "devices", lambda: [TPU])
    with jax.set_mesh(here):
        if rules is None:
            check_choice(choose, reason)
        else:
            with axis_rules(rules):
                check_choice(choose, reason)


def check_choice(choose, reason):
    if reason is None:
        assert choose(None) == choose("pallas_tpu") == "pallas_tpu"
        return
    assert choose(None) == "xla"
    with pytest.raises(NotImplementedError, match=reason):
        choose("pallas_tpu")


def test_inside_a_shard_map_each_device_has_its_own(monkeypatch):
    query = jax.ShapeDtypeStruct((8, 200, 2, 64), jnp.bfloat16)
    manual = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(AxisType.Manual,))
    monkeypatch.setattr(jax, "devices", lambda: [TPU])
    with jax.sharding.use_abstract_mesh(manual):
        assert dispatch._choose(None, dispatch._PREFERENCE, query, query, None) == "pallas_tpu"
