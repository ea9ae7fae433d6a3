"""The one-layer models: sizes of the paper's table, causality, positions."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from hackle.zoo.errors import UserError
from hackle.zoo.tasks.model import MODELS, make_model, sinusoids
from hackle.zoo.tasks.setups import SETUPS, setup


def size(model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(
    ("name", "thousands"), [("gru", 3.8), ("lstm", 4.0), ("transformer", 31.8)]
)
def test_sizes_on_parity_are_the_papers(name, thousands):
    model = nnx.eval_shape(lambda: make_model(name, SETUPS["parity"], rngs=nnx.Rngs(0)))
    assert round(size(model) / 1000, 1) == thousands


@pytest.mark.parametrize("task", ["parity", "keep-nth", "1-hop", "2-hop"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_do_not_depend_on_later_tokens(name, task):
    made = setup(task, length=12)
    model = make_model(name, made, rngs=nnx.Rngs(0))
    tokens = made.task.rows("train", 0, 2)["tokens"]
    changed = tokens.copy()
    changed[:, 7:] = 1 - (changed[:, 7:] > 0)
    one, other = np.asarray(model(tokens)), np.asarray(model(changed))
    assert one.shape[:2] == (2, 12) and one.shape[2] >= made.task.classes
    np.testing.assert_allclose(one[:, :7], other[:, :7], atol=1e-5)
    assert np.abs(one[:, 7:] - other[:, 7:]).max(axis=(1, 2)).min() > 1e-3


def test_sinusoids_are_those_of_the_formula():
    got = np.asarray(sinusoids(30, 8))
    for t in range(30):
        for k in range(4):
            angle = t / 10000 ** (2 * k / 8)
            np.testing.assert_allclose(got[t, k], math.sin(angle), atol=1e-5)
            np.testing.assert_allclose(got[t, 4 + k], math.cos(angle), atol=1e-5)


def test_positions_are_told_apart_only_where_they_are_added():
    zeros = np.zeros((1, 12), np.int32)

    def steps(task):
        logits = make_model("gru", setup(task, length=12), rngs=nnx.Rngs(0))(zeros)
        return np.abs(np.diff(np.asarray(logits)[0], axis=0)).max(axis=1)

    # The same token again and again brings the state to rest, unless positions move it.
    assert steps("parity")[-1] < 0.3 * steps("parity")[0]
    assert steps("keep-nth")[-1] > 0.3 * steps("keep-nth")[0]


def test_unknown_model():
    with pytest.raises(UserError, match="unknown model 'rnn'; expected one of gru, lstm, trans"):
        make_model("rnn", SETUPS["parity"], rngs=nnx.Rngs(0))


def test_a_cell_alone_has_no_mlp():
    with pytest.raises(UserError, match="mlp_width=8 with cell_only; expected 0"):
        dataclasses.replace(SETUPS["parity"], mlp_width=8)
