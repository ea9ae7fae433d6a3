"""The causal convolution against sums written out, and the gated norm against its equation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hackle.layers as layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 9, 5))
TAIL = RNG.normal(size=(3, 3, 5))
RESET = RNG.random((3, 9)) < 0.3


def make(taps=4):
    conv = layers.CausalConv(5, taps, rngs=nnx.Rngs(0))
    return conv, np.asarray(conv.weight[...], np.float64)


def written_out(weight, x, tail, reset):
    """One output at a time, looking back until something hides what is older."""
    taps, out = len(weight), np.zeros_like(x)
    rows = np.concatenate([tail[:, tail.shape[1] - (taps - 1) :], x], axis=1)
    for b, t in np.ndindex(x.shape[:2]):
        for lag in range(taps):
            out[b, t] += weight[lag] * rows[b, t + taps - 1 - lag]
            if t - lag >= 0 and reset[b, t - lag]:
                break
    return out


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("with_reset", [False, True])
def test_values(taps, with_tail, with_reset):
    conv, weight = make(taps)
    tail = TAIL[:, : taps - 1] if with_tail else np.zeros((3, taps - 1, 5))
    reset = RESET if with_reset else np.zeros((3, 9), bool)
    given = jnp.asarray(tail, jnp.float32) if with_tail else None
    out, _ = conv(
        jnp.asarray(X, jnp.float32), given, reset=jnp.asarray(reset) if with_reset else None
    )
    np.testing.assert_allclose(out, written_out(weight, X, tail, reset), atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_parts_with_their_tails_equal_the_whole(cut):
    conv, _ = make()
    x, tail, reset = jnp.asarray(X, jnp.float32), jnp.asarray(TAIL, jnp.float32), jnp.asarray(RESET)
    whole, end = conv(x, tail, reset=reset)
    first, between = conv(x[:, :cut], tail, reset=reset[:, :cut])
    second, after = conv(x[:, cut:], between, reset=reset[:, cut:])
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
    np.testing.assert_array_equal(after, end)


def test_what_lies_behind_the_length_of_a_row_changes_nothing():
    conv, _ = make()
    x, tail, reset = jnp.asarray(X, jnp.float32), jnp.asarray(TAIL, jnp.float32), jnp.asarray(RESET)
    lengths = [0, 2, 9]
    _, found = conv(x, tail, reset=reset, lengths=jnp.asarray(lengths))
    np.testing.assert_array_equal(found[0], tail[0])
    for row, length in list(enumerate(lengths))[1:]:
        one = slice(row, row + 1)
        _, alone = conv(x[one, :length], tail[one], reset=reset[one, :length])
        np.testing.assert_array_equal(found[row], alone[0])


def test_gradients_stop_at_a_reset():
    conv, weight = make()
    reset = jnp.zeros((1, 6), bool).at[0, 3].set(True)
    x = jnp.ones((1, 6, 5))
    late = lambda x: jnp.sum(conv(x, reset=reset)[0][:, 3:])
    gradient = np.asarray(jax.grad(late)(x))[0]
    assert (gradient[:3] == 0).all()
    np.testing.assert_allclose(gradient[5], weight[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[3], weight[:3].sum(0), rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
    conv, weight = make()
    x = jnp.asarray(X, jnp.bfloat16)
    out, tail = conv(x)
    assert out.dtype == tail.dtype == jnp.bfloat16
    exact = written_out(
        weight, np.asarray(x, np.float64), np.zeros((3, 3, 5)), np.zeros((3, 9), bool)
    )
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-6)


F = jnp.asarray(X, jnp.float32)


@pytest.mark.parametrize(
    "x, given, message",
    [
        (F[0], {}, r"x must be floating-point \[batch, time, 5\], got float32 \(9, 5\)"),
        (F[..., :4], {}, r"x must be .*, got float32 \(3, 9, 4\)"),
        (F.astype(int), {}, r"x must be floating-point .*, got int32 \(3, 9, 5\)"),
        (F, {"tail": F[:, :4]}, r"tail must be .* = \(3, 3, 5\), got \(3, 4, 5\)"),
        (F, {"reset": jnp.zeros((3, 8), bool)}, r"reset must be bool .*, got bool \(3, 8\)"),
        (F, {"reset": jnp.zeros((3, 9), int)}, r"reset must be bool .*, got int32 \(3, 9\)"),
        (F, {"lengths": jnp.ones(2, int)}, r"lengths must be integers .* = \(3,\), got int32 \(2"),
        (F, {"lengths": jnp.ones(3)}, r"lengths must be integers .*, got float32 \(3,\)"),
        (F, {"lengths": jnp.asarray([1, 10, 2])}, r"lengths must be 0 to 9, got \[1, 10, 2\]"),
        (F, {"lengths": jnp.asarray([-1, 9, 2])}, r"lengths must be 0 to 9, got \[-1, 9, 2\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(x, given, message):
    with pytest.raises(ValueError, match=f"CausalConv: {message}"):
        make()[0](x, **given)


def test_nan_behind_the_length_of_a_row_reaches_nothing():
    conv, _ = make()
    lengths = jnp.asarray([0, 2, 9])
    graph, state = nnx.split(conv)

    def loss(state, x, tail):
        out, end = nnx.merge(graph, state)(x, tail, lengths=lengths)
        return jnp.sum(jnp.where(behind, 0, out) ** 2) + jnp.sum(end**2)

    behind = (jnp.arange(9) >= lengths[:, None])[..., None]
    tail = jnp.asarray(TAIL, jnp.float32)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    chex.assert_trees_all_equal(
        run(state, jnp.where(behind, jnp.nan, F), tail), run(state, jnp.where(behind, 7, F), tail)
    )


def test_lengths_that_cannot_be_seen_to_be_wrong_are_those_nearest():
    conv, _ = make()
    found = jax.jit(lambda lengths: conv(F, lengths=lengths))(jnp.asarray([-1, 10, 4]))
    chex.assert_trees_all_close(found, conv(F, lengths=jnp.asarray([0, 9, 4])), atol=1e-6)


def test_gated_norm_is_its_equation():
    norm = layers.GatedRMSNorm(5, 1e-3, rngs=nnx.Rngs(0))
    norm.scale.set_value(jnp.arange(5.0))
    gate = RNG.normal(size=X.shape)
    y = X * gate / (1 + np.exp(-gate))
    expected = np.arange(5) * y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3)
    found = norm(jnp.asarray(X, jnp.float32), jnp.asarray(gate, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert norm(jnp.asarray(X, jnp.bfloat16), jnp.asarray(gate)).dtype == jnp.bfloat16
