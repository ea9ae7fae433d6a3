"""The loss against float64 numpy, in one piece and in several."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hackle.zoo.train.loss import loss_pieces, next_token_loss, next_tokens

B, L, D, V = 3, 12, 5, 17


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(B, L, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    batch = {
        "tokens": rng.integers(0, V, (B, L)).astype(np.int32),
        "segment_ids": np.array(
            [[1] * 5 + [2] * 5 + [0] * 2, [1] * 12, [1] * 3 + [2] * 9], np.int32
        ),
    }
    return features, head, batch


def by_hand(features, head, batch):
    """Sums in float64, position by position."""
    nll = z = 0.0
    correct = count = 0
    mask = batch.get("loss_mask", np.ones((B, L)))
    for b in range(B):
        for i in range(L - 1):
            here, there = batch["segment_ids"][b, i], batch["segment_ids"][b, i + 1]
            if here == 0 or here != there or not mask[b, i + 1]:
                continue
            logits = features[b, i].astype(np.float64) @ head.astype(np.float64)
            log_z = np.log(np.sum(np.exp(logits)))
            target = batch["tokens"][b, i + 1]
            nll += log_z - logits[target]
            z += log_z**2
            correct += int(np.argmax(logits) == target)
            count += 1
    return nll, z, correct, count


def sums(features, head, batch, pieces=1):
    targets, weights = next_tokens(batch)
    found = next_token_loss(features, targets, weights, lambda x: x @ head, pieces=pieces)
    return (*found, jnp.sum(weights))


@pytest.mark.parametrize("pieces", [1, 2, 3, 12])
def test_sums_equal_those_by_hand(case, pieces):
    np.testing.assert_allclose(sums(*case, pieces), by_hand(*case), rtol=2e-6)


def test_masked_targets_do_not_count(case):
    features, head, batch = case
    mask = np.random.default_rng(1).integers(0, 2, (B, L)).astype(np.int32)
    masked = {**batch, "loss_mask": mask}
    np.testing.assert_allclose(
        sums(features, head, masked), by_hand(features, head, masked), rtol=2e-6
    )
    assert by_hand(features, head, masked)[3] < by_hand(features, head, batch)[3]


def test_without_segments_all_but_the_last_position_counts(case):
    _, weights = next_tokens({"tokens": case[2]["tokens"]})
    np.testing.assert_array_equal(weights, np.repeat([[1.0] * (L - 1) + [0.0]], B, axis=0))


def test_padding_alone_gives_zero(case):
    features, head, batch = case
    empty = {**batch, "segment_ids": np.zeros((B, L), np.int32)}
    np.testing.assert_array_equal(sums(features, head, empty), 0.0)


@pytest.mark.parametrize("pieces", [3, 12])
def test_gradients_in_pieces_equal_those_in_one(case, pieces):
    features, head, batch = case

    def loss(features, head, pieces):
        found = sums(features, head, batch, pieces)
        return found[0] + 1e-2 * found[1]

    gradient = jax.grad(loss, argnums=(0, 1))
    chex.assert_trees_all_close(
        gradient(features, head, pieces), gradient(features, head, 1), rtol=1e-5, atol=1e-6
    )


def test_no_array_holds_the_logits_of_a_whole_row(case):
    features, head, batch = case
    gradient = jax.jit(jax.grad(lambda f, h: sums(f, h, batch, 4)[0], argnums=(0, 1)))
    text = gradient.lower(features, head).compile().as_text()
    assert f"f32[{B},{L // 4},{V}]" in text
    assert f"f32[{B},{L},{V}]" not in text
    assert f"f32[4,{B},{L // 4},{V}]" not in text


def test_pieces_must_divide_the_row(case):
    with pytest.raises(ValueError, match="pieces=5 does not divide"):
        sums(*case, pieces=5)


def test_loss_pieces_is_the_least_divisor_that_fits():
    assert loss_pieces(4, 12, 10, max_logits=480) == 1
    assert loss_pieces(4, 12, 10, max_logits=479) == 2
    assert loss_pieces(4, 12, 10, max_logits=100) == 6
    assert loss_pieces(4, 12, 10, max_logits=1) == 12
