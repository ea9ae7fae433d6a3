"""The trainer of the synthetic tasks: against a plain loop, and what it learns."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hackle.zoo.errors import UserError
from hackle.zoo.tasks import training
from hackle.zoo.tasks.model import make_model
from hackle.zoo.tasks.settings import Settings
from hackle.zoo.tasks.setups import SETUPS, setup
from hackle.zoo.tasks.training import train

# Equal numbers where they can be: every other shape is compiled anew.
SMALL = dict(
    batch=4, train_rows=12, test_rows=20, held_out_rows=20, seeds=2, check_every=2, state_clip=None
)


def maker(name, setup):
    return lambda rngs: make_model(name, setup, rngs=rngs)


def answers(model, task, count, split="test"):
    """Share of right answers, by numpy."""
    rows = task.rows(split, 0, count)
    guess = np.asarray(jax.jit(model)(rows["tokens"])).argmax(axis=-1)
    return (guess == rows["targets"])[rows["mask"] == 1].mean()


def trained(made, outcome, seed=0):
    model = make_model("gru", made, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x[seed], outcome.params))
    return model


def test_training_equals_a_plain_loop():
    """Batches of all rows, so that their order does not matter; the rate falls as a cosine."""
    made = setup("keep-nth", length=7)
    outcome = train(
        maker("gru", made),
        made.task,
        Settings(
            **SMALL | dict(batch=12, seeds=1, check_every=1),
            epochs=3,
            learning_rate=1e-2,
            weight_decay=0,
        ),
    )
    key = jax.random.split(jax.random.key(0), 1)[0]
    graph, params = nnx.split(make_model("gru", made, rngs=nnx.Rngs(key)))
    rows = made.task.rows("train", 0, 12)
    asked = rows["mask"] == 1

    def loss(params):
        logits = nnx.merge(graph, params)(rows["tokens"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows["targets"])
        return nll[asked].mean()

    losses = []
    optimizer = optax.adam(lambda step: 1e-2 * (1 + jnp.cos(jnp.pi * step / 3)) / 2)
    moments = optimizer.init(params)
    for _ in range(3):
        value, gradient = jax.value_and_grad(loss)(params)
        losses.append(float(value))
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(params, updates)
    assert [check.epoch for check in outcome.checks] == [1, 2, 3]
    np.testing.assert_allclose([check.loss[0] for check in outcome.checks], losses, rtol=1e-5)
    got = jax.tree.map(lambda x: x[0], outcome.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, params)


def test_accuracy_is_that_of_each_seed_and_runs_repeat(monkeypatch):
    monkeypatch.setattr(training, "EVALUATED", 10)
    made = setup("keep-nth", length=7)
    settings = Settings(**SMALL | dict(test_rows=25), epochs=40, stop_after=3, learning_rate=1e-2)
    told = []
    outcome = train(maker("gru", made), made.task, settings, tell=told.append)
    assert told == outcome.checks and [check.epoch for check in told] == [2, 3]
    assert outcome.best == max(outcome.accuracy)
    for seed in range(2):
        model = trained(made, outcome, seed)
        assert outcome.accuracy[seed] == pytest.approx(answers(model, made.task, 25), abs=1e-6)
        held_out = answers(model, made.task, 20, "validation")
        assert told[-1].accuracy[seed] == pytest.approx(held_out, abs=1e-6)
    # Losses are means over the epochs since the check before.
    assert len(set(told[0].loss)) == 2
    again = train(maker("gru", made), made.task, settings)
    assert again.checks == outcome.checks


def test_the_order_of_rows_does_not_depend_on_when_it_is_looked_at():
    made = setup("keep-nth", length=7)

    def run(check_every):
        settings = Settings(**SMALL | dict(check_every=check_every), epochs=3, learning_rate=1e-2)
        return train(maker("gru", made), made.task, settings).params

    often = run(1)
    for check_every in (2, 3):
        chex.assert_trees_all_close(run(check_every), often, atol=1e-6)


def test_every_seed_and_epoch_has_an_order_of_its_own():
    few, many = (
        jax.random.key_data(training.order_keys(Settings(seeds=seeds, seed=seed), 0, 4))
        for seeds, seed in ((2, 0), (3, 0))
    )
    np.testing.assert_array_equal(few, many[:2])
    other = jax.random.key_data(training.order_keys(Settings(seeds=3, seed=5), 0, 4))
    assert len(np.unique(np.concatenate([many, other]).reshape(24, -1), axis=0)) == 24


def test_training_ends_where_it_is_told_to():
    made = setup("keep-nth", length=7)
    outcome = train(
        maker("gru", made),
        made.task,
        Settings(**SMALL, epochs=40),
        tell=lambda check: check.epoch >= 4,
    )
    assert [check.epoch for check in outcome.checks] == [2, 4] and len(outcome.accuracy) == 2


def test_state_clip_bounds_the_state_weights_alone():
    made = setup("keep-nth", length=7)
    settings = Settings(**SMALL | dict(state_clip=0.05), epochs=2, learning_rate=0.1)
    outcome = train(maker("lstm", made), made.task, settings)
    for path, leaf in nnx.to_flat_state(outcome.params):
        largest = np.abs(np.asarray(leaf[...])).max()
        if path[-1] in ("state_weight", "peephole"):
            assert largest == pytest.approx(0.05)
        else:
            assert largest > 0.06


def test_training_stops_when_all_is_right():
    made = setup("parity", length=2)
    settings = Settings(**SMALL | dict(train_rows=64), epochs=200, learning_rate=1e-2)
    outcome = train(maker("gru", made), made.task, settings)
    assert outcome.checks[-1].epoch < 200 and outcome.best == 1
    assert all(max(check.accuracy) < 1 for check in outcome.checks[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epochs=0), "epochs=0; expected at least 1"),
        (dict(batch=17, train_rows=16), "batch=17; expected at most train_rows=16"),
        (dict(stop_after=9, epochs=8), "stop_after=9; expected 1 to epochs=8"),
        (dict(learning_rate=0.0), "learning_rate=0.0; expected a number above 0"),
        (dict(learning_rate=math.nan), "learning_rate=nan; expected a number above 0"),
        (dict(weight_decay=-1.0), "weight_decay=-1.0; expected at least 0"),
        (dict(weight_decay=math.nan), "weight_decay=nan; expected at least 0"),
        (dict(state_clip=math.nan), "state_clip=nan; expected more than 0"),
        (dict(state_clip=0.0), "state_clip=0.0; expected more than 0"),
        (dict(seed=-1), "seed=-1; expected at least 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        Settings(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_parity_of_length_100_is_learnt(cell):
    made = SETUPS["parity"]
    changes = dict(seeds=1, train_rows=5000, test_rows=2000, check_every=2, stop_after=30)
    settings = dataclasses.replace(made.training, **changes)
    assert train(maker(cell, made), made.task, settings).best == 1


@pytest.mark.slow
def test_parity_learnt_at_length_16_holds_at_32():
    short, long = setup("parity", length=16), setup("parity", length=32)
    changes = dict(seeds=1, train_rows=2000, test_rows=1000, check_every=2, stop_after=50)
    settings = dataclasses.replace(short.training, **changes)
    outcome = train(maker("gru", short), short.task, settings)
    assert outcome.best == 1
    assert answers(trained(long, outcome), long.task, 2000) == 1
