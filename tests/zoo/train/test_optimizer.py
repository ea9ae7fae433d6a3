"""Schedules, the decay rule, and that the rule reaches the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo.errors import UserError
from hackle.zoo.train.optimizer import AdamW, decays, mask_of, schedule
from tests.zoo.train.small import SIZES


def rates(kind, steps=100, **settings):
    rate = schedule(kind, 2.0, steps=steps, **settings)
    return np.array([rate(step) for step in range(steps)])


def test_cosine_rises_linearly_and_falls_to_its_end():
    found = rates("cosine", warmup=10, final=0.1)
    np.testing.assert_allclose(found[:10], 2.0 * (np.arange(10) / 10 * 10 / 11 + 1 / 11), rtol=1e-6)
    assert found[0] > 0
    assert found[10] == found.max() == 2.0
    expected = 0.2 + 1.8 * 0.5 * (1 + np.cos(np.pi * np.arange(90) / 90))
    np.testing.assert_allclose(found[10:], expected, rtol=1e-5)


def test_wsd_is_stable_between_warm_up_and_decay():
    found = rates("wsd", warmup=10, decay=20, final=0.0)
    np.testing.assert_allclose(found[10:80], 2.0)
    np.testing.assert_allclose(found[80:], 2.0 * (1 - np.arange(20) / 20), rtol=1e-5)
    np.testing.assert_allclose(rates("wsd", warmup=10)[10:], 2.0)


def test_two_stages_of_wsd_join():
    # Stage 2 starts its decay at the rate where stage 1 stood.
    assert rates("wsd", warmup=10)[-1] == rates("wsd", steps=20, decay=20)[0]


def test_constant_stays():
    np.testing.assert_allclose(rates("constant"), 2.0)


@pytest.mark.parametrize(
    "kind, settings, text",
    [
        ("linear", {}, "unknown schedule 'linear'; expected one of cosine, wsd, constant"),
        ("wsd", {"warmup": 60, "decay": 60}, "warmup=60 and decay=60 do not fit into steps=100"),
        ("cosine", {"warmup": 101}, "do not fit"),
    ],
)
def test_impossible_schedules_are_refused(kind, settings, text):
    with pytest.raises(UserError, match=text):
        rates(kind, **settings)


def test_the_rule_by_name():
    assert decays(("blocks", "block", "mlp", "up", "weight"))
    assert decays(("embedding", "weight"))
    assert decays(("aggregator", "hidden_weight"))
    assert decays(("blocks", "block", "attention", "value", "weight"))
    assert not decays(("blocks", "block", "attention_norm", "scale"))
    assert not decays(("blocks", "block", "skip_scale"))
    assert not decays(("blocks", "block", "attention", "query", "bias"))
    assert not decays(("aggregator", "output_bias"))
    assert not decays(("blocks", "block", "attention", "prefix", "value"))


def test_only_what_decays_moves_without_a_gradient():
    params = nnx.state(zoo.create("parscale-tiny-p2", rngs=nnx.Rngs(0), **SIZES), nnx.Param)
    # Everything is away from zero, so that a wrong decay would show.
    params = jax.tree.map(lambda x: x + 1.0, params)
    transform = AdamW(weight_decay=0.5).transform(lambda _: 0.1)
    updates, _ = transform.update(
        jax.tree.map(jnp.zeros_like, params), transform.init(params), params
    )
    for path, update in nnx.to_flat_state(updates):
        start = dict(nnx.to_flat_state(params))[path][...]
        expected = -0.05 * start if decays(path) else jnp.zeros_like(start)
        np.testing.assert_allclose(update[...], expected, rtol=1e-6, err_msg=str(path))


def test_the_mask_has_the_structure_of_the_parameters():
    params = nnx.state(zoo.create("dense-tiny", rngs=nnx.Rngs(0), **SIZES), nnx.Param)
    assert jax.tree.structure(mask_of(decays, params)) == jax.tree.structure(params)
