"""ParaRNN through the training loop's own parts: loss, projection of the state matrices, plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo import registry
from hackle.zoo.errors import UserError
from hackle.zoo.train.loop import run
from hackle.zoo.train.metrics import forward_flops_per_token
from hackle.zoo.train.optimizer import AdamW, is_state_weight
from hackle.zoo.train.plan import Plan
from tests.zoo.train import small

SIZES = {"width": 16, "mlp_width": 24, "depth": 2, "heads": 2}


def recipe(cell="gru", **changes):
    return small.recipe(model=f"pararnn-tiny-{cell}", overrides=SIZES, **changes)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_loss_falls_on_one_batch_and_state_matrices_stay_small(cell):
    rates = dict(learning_rate=3e-2, steps=20, schedule="constant", warmup=0)
    it = Plan(recipe(cell, state_clip=0.05, **rates)).program
    state, losses = it.init(0), []
    for _ in range(20):
        state, metrics = it.step(state, small.batch())
        losses.append(float(metrics.loss))
    assert losses[0] > np.log(small.VOCAB) - 0.2
    assert losses[-1] < losses[0] - 0.5
    kept = {path: v for path, v in nnx.to_flat_state(state.trainable) if is_state_weight(path)}
    assert len(kept) == {"gru": 1, "lstm": 2}[cell]
    for path, v in kept.items():
        assert np.abs(np.asarray(v[...])).max() == pytest.approx(0.05, rel=1e-5), path


def test_the_projection_comes_after_the_step_and_moves_state_matrices_alone():
    start = jnp.asarray([0.49, -0.49, 0.1, 0.8])
    params = {"cell": {"state_weight": start, "peephole": start, "bias": start}}
    gradient = jax.tree.map(lambda x: jnp.asarray([-1.0, 1.0, -1.0, 0.0]), params)
    transform = AdamW(weight_decay=0.0, state_clip=0.5).transform(lambda _: 0.1)
    updates, _ = transform.update(gradient, transform.init(params), params)
    # Adam's first step is one learning rate long.
    np.testing.assert_allclose(updates["cell"]["bias"], [0.1, -0.1, 0.1, 0], rtol=1e-4)
    for name in ("state_weight", "peephole"):
        np.testing.assert_allclose(updates["cell"][name], [0.01, -0.01, 0.1, -0.3], rtol=1e-4)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"attention": "xla"}, "attention='xla': ParaRNNConfig has no attention"),
        ({"recurrence": "fast"}, "pararnn-tiny-gru: .*'fast'"),
        ({"overrides": {**SIZES, "cell": "rnn"}}, "cell='rnn' is not one of gru, lstm"),
        ({"overrides": {**SIZES, "heads": 3}}, "heads=3"),
        ({"overrides": {**SIZES, "recurrence": "scan"}}, "set the recipe's own field recurrence"),
        ({"mode": "frozen_trunk"}, "the model has none"),
        ({"start_from": "/nowhere"}, "needs a ParScale model"),
        ({"state_clip": 0.0}, "state_clip=0.0; expected more than 0, or none"),
    ],
)
def test_what_does_not_fit_is_refused(changes, text):
    with pytest.raises(UserError, match=text):
        Plan(recipe().replace(**changes))


def test_a_dense_model_has_no_recurrence():
    dense = small.recipe(model="dense-tiny", overrides=small.SIZES)
    with pytest.raises(UserError, match="state_clip=0.5: dense-tiny has no recurrence"):
        Plan(dense.replace(state_clip=0.5))
    with pytest.raises(UserError, match="recurrence='scan': DenseConfig has no recurrence"):
        Plan(dense.replace(recurrence="scan"))


def test_matrix_products_are_two_flops_a_weight():
    config = registry.entry("pararnn-400m-lstm").config
    model = nnx.eval_shape(lambda: zoo.create("pararnn-400m-lstm", rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    matrices = sum(
        v.size for path, v in flat
        if path[-1] == "weight" and path[0] != "embedding" and "conv" not in path
    )  # fmt: skip
    parts = forward_flops_per_token(config, 2048)
    assert parts["trunk"] + parts["head"] == 2 * matrices
    assert parts["attention"] == parts["aggregator"] == 0


def test_a_run_resumes_and_exports(tmp_path):
    chosen = recipe(steps=4, save_every=2, state_clip=0.5, length=64, export=True)
    summary = run(chosen, tmp_path / "run", say=lambda _: None)
    assert summary.finished and np.isfinite(summary.loss)
    longer = chosen.replace(recurrence="scan")  # free on resume: the same numbers
    assert run(longer, tmp_path / "run", say=lambda _: None).already
    model = zoo.from_pretrained(tmp_path / "run" / "model")
    assert model.config.cell == "gru" and model.config.vocab_size == small.VOCAB
