"""The step: accumulation, frozen trunk, steps that are not finite, meshes, recompilation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hackle import pjit_configs
from hackle.pjit_configs import ConfigError
from hackle.zoo.errors import UserError
from hackle.zoo.parscale import is_stream_parameter
from hackle.zoo.train.loss import next_tokens
from hackle.zoo.train.optimizer import AdamW, schedule
from tests.zoo.train.small import VOCAB, batch, program


def host(tree):
    """A copy that donation cannot take away."""
    return jax.tree.map(lambda x: np.array(x), tree)


def train(it, steps=2, seed=0):
    state = it.init(seed)
    for step in range(steps):
        state, metrics = it.step(state, batch(step))
    return host((state.trainable, state.frozen)), host(metrics)


@pytest.fixture(scope="module")
def plain():
    """The program of most tests, compiled once."""
    return program()


@pytest.fixture(scope="module")
def whole(plain):
    """Two steps on one device, in one part."""
    return train(plain)


@pytest.fixture(scope="module")
def one_device():
    """Two steps of the model that eight devices share, on one."""
    return sharded("cpu1")


def sharded(preset, **settings):
    sizes = {"heads": 8, "kv_heads": 8, "head_width": 4, "width": 32, "vocab_size": 64}
    it = program(
        "parscale-tiny-p8",
        preset,
        sizes,
        vocab_size=64,
        batch=16,
        **settings,
    )
    state, metrics = it.init(0), None
    for step in range(2):
        state, metrics = it.step(state, batch(step, rows=16))
    return it, host((state.trainable, state.optimizer)), host(metrics)


def test_loss_falls_on_one_batch(plain):
    it = plain
    state = it.init(0)
    losses = []
    for _ in range(20):
        state, metrics = it.step(state, batch())
        losses.append(float(metrics.loss))
    assert losses[0] > np.log(VOCAB) - 0.2
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_big_batch(whole, parts):
    # Rows hold unequal numbers of targets, so a mean of means would differ.
    (params, _), metrics = train(program(accumulate=parts))
    chex.assert_trees_all_close(metrics, whole[1], rtol=1e-5)
    chex.assert_trees_all_close(params, whole[0][0], atol=1e-5)


def test_pieces_of_the_loss_change_nothing(whole):
    it = program(max_logits=8 * 4 * VOCAB)
    assert it.loss_pieces == 4
    (params, _), metrics = train(it)
    chex.assert_trees_all_close(metrics, whole[1], rtol=1e-5)
    chex.assert_trees_all_close(params, whole[0][0], atol=1e-5)


def test_loss_is_that_of_the_model(plain):
    it = plain
    state = it.init(0)
    data = batch()
    model = it.model(state)
    logits = np.asarray(
        model(data["tokens"], positions=data["positions"], segment_ids=data["segment_ids"])
    ).astype(np.float64)
    segments = data["segment_ids"]
    counts = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
    log_z = np.log(np.exp(logits).sum(-1))[:, :-1]
    chosen = np.take_along_axis(logits[:, :-1], data["tokens"][:, 1:, None], -1)[..., 0]
    sums = it.evaluate(state, data)
    assert float(sums.targets) == counts.sum()
    assert float(sums.nll) == pytest.approx(((log_z - chosen) * counts).sum(), rel=1e-5)
    metrics = it.step(state, data)[1]
    assert float(metrics.loss) == pytest.approx(float(sums.nll / sums.targets), rel=1e-6)
    assert float(metrics.z) == pytest.approx((log_z**2 * counts).sum() / counts.sum(), rel=1e-5)


def test_z_loss_enters_the_gradient_but_not_the_reported_loss(plain):
    data = batch()
    before, it = plain.init(0), program(z_loss=0.1)

    def objective(params):
        sums = it._sums(params, before.frozen, data)
        return (sums.nll + 0.1 * sums.z) / jnp.sum(next_tokens(data)[1])

    expected = optax.tree.norm(jax.grad(objective)(before.trainable))
    metrics = it.step(it.init(0), data)[1]
    without = plain.step(before, data)[1]
    assert float(metrics.loss) == float(without.loss)
    assert float(metrics.grad_norm) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics.grad_norm) != pytest.approx(float(without.grad_norm), rel=1e-3)


def test_gradients_are_clipped_to_the_global_norm():
    it = program(optimizer=AdamW(clip=1e-3, weight_decay=0.0))
    state, metrics = it.step(it.init(0), batch())
    assert float(metrics.grad_norm) > 1e-2  # before clipping
    # After one step the first moment is (1 - beta1) times the gradient that Adam saw.
    moments = [x for x in jax.tree.leaves(state.optimizer[1].mu)]
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in moments)) / (1 - 0.9)
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_every_parameter_gets_a_gradient(plain):
    state, _ = plain.step(plain.init(0), batch())
    for path, moment in nnx.to_flat_state(state.optimizer[1].nu):
        assert float(jnp.max(moment[...])) > 0, path


def test_a_frozen_trunk_does_not_move_and_has_no_optimiser_state():
    it = program(mode="frozen_trunk")
    state = it.init(0)
    before = host((state.trainable, state.frozen))
    for step in range(3):
        state, _ = it.step(state, batch(step))
    chex.assert_trees_all_equal(host(state.frozen), before[1])
    trained = nnx.to_flat_state(state.trainable).paths
    assert trained and all(is_stream_parameter(path) for path in trained)
    assert not any(is_stream_parameter(path) for path in nnx.to_flat_state(state.frozen).paths)
    assert list(nnx.to_flat_state(state.optimizer[1].mu).paths) == list(trained)
    old = dict(nnx.to_flat_state(before[0]))
    for path, value in nnx.to_flat_state(state.trainable):
        assert not np.array_equal(value[...], old[path][...]), path


def test_frozen_and_full_training_start_from_the_same_parameters(plain):
    programs = plain, program(mode="frozen_trunk")
    states = [nnx.state(it.model(it.init(3))) for it in programs]
    chex.assert_trees_all_equal(*states)


def test_a_model_without_streams_has_nothing_to_train_beside_a_frozen_trunk():
    with pytest.raises(UserError, match="the model has none"):
        program("dense-tiny", mode="frozen_trunk")


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    it = program(learning_rate=schedule("cosine", 1e-2, steps=10, warmup=5))
    state, good = it.step(it.init(0), batch())
    before = host((state.trainable, state.optimizer))
    bad = batch()
    bad["tokens"][0, 0] = VOCAB  # the table gives NaN for ids that it does not have
    for count in (1, 2):
        state, metrics = it.step(state, bad)
        assert not np.isfinite(float(metrics.loss))
        assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (count, count)
        chex.assert_trees_all_equal(host((state.trainable, state.optimizer)), before)
    state, metrics = it.step(state, batch(1))
    assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (2, 0)
    assert int(state.step) == 4
    # The learning rate counts updates, as the optimiser does.
    assert float(metrics.learning_rate) == pytest.approx(float(good.learning_rate) * 2)
    assert np.isfinite(float(metrics.loss))
    chex.assert_tree_all_finite(host(state.trainable))


def test_a_gradient_that_overflows_is_skipped():
    it = program(z_loss=1e38)
    state = it.init(0)
    before = host(state.trainable)
    state, metrics = it.step(state, batch())
    assert np.isfinite(float(metrics.loss)) and int(metrics.skipped) == 1
    chex.assert_trees_all_equal(host(state.trainable), before)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "preset, settings",
    [
        ("cpu8_data", {}),
        ("cpu8_fsdp", {}),
        ("cpu8_tensor", {}),
        ("cpu8_stream", {}),
        ("cpu8_fsdp_stream_tensor", {"accumulate": 2}),
    ],
)
def test_eight_devices_equal_one(preset, settings, one_device):
    it, state, metrics = sharded(preset, **settings)
    assert it.mesh.size == 8
    chex.assert_trees_all_close(metrics, one_device[2], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, one_device[1], atol=1e-5)


@pytest.mark.devices(8)
def test_state_is_made_sharded_and_stays_so():
    it = program(preset="cpu8_fsdp", sizes={"width": 32})
    state = it.init(0)
    large = state.trainable["blocks"]["block"]["mlp"]["up"]["weight"][...]
    assert large.addressable_shards[0].data.size * 8 == large.size
    moment = state.optimizer[1].mu["blocks"]["block"]["mlp"]["up"]["weight"][...]
    assert moment.sharding == large.sharding
    state, _ = it.step(state, batch())
    assert state.trainable["blocks"]["block"]["mlp"]["up"]["weight"][...].sharding == large.sharding
    parts = it.device_bytes()
    assert parts["parameters"] < 4 * sum(x.size for x in jax.tree.leaves(state.trainable)) / 6
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-2)


@pytest.mark.devices(8)
def test_the_batch_must_fit_the_mesh():
    with pytest.raises(ConfigError, match="batch of 4 rows does not divide"):
        program(preset="cpu8_fsdp", batch=8, accumulate=2)
    with pytest.raises(UserError, match="batch=8 does not divide into accumulate=3"):
        program(accumulate=3)


def test_the_step_is_traced_once():
    it = program()
    it._jit_step = jax.jit(
        chex.assert_max_traces(it._step, n=1),
        in_shardings=(it.shardings, it.batch_sharding),
        donate_argnums=0,
    )
    state = it.init(0)
    for step in range(3):
        state, _ = it.step(state, batch(step))


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32(plain):
    mixed = pjit_configs.preset("cpu1").replace(precision=pjit_configs.PRECISIONS["mixed"])
    it, low = plain, program(preset=mixed)
    state, metrics = low.step(low.init(0), batch())
    exact = it.step(it.init(0), batch())[1]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.trainable, metrics.loss)))
    assert float(metrics.loss) != float(exact.loss)
    assert float(metrics.loss) == pytest.approx(float(exact.loss), rel=1e-2)
    assert float(metrics.grad_norm) == pytest.approx(float(exact.grad_norm), rel=5e-2)
    assert "bf16" in low.trace_step().lower().as_text()
    assert "bf16" not in it.trace_step().lower().as_text()
