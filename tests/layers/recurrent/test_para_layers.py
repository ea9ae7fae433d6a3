"""ParaGRU and ParaLSTM: their equations, heads, inits, decoding, Linen faces, training."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from hackle import layers
from hackle.layers import linen, recurrent
from hackle.layers.recurrent import cells
from tests.layers.recurrent.reference import (
    METHODS,
    STATES,
    STEPS,
    call,
    cotangents,
    draw,
    error,
    gradients,
    relative_error,
)

LAYERS = {"gru": recurrent.ParaGRU, "lstm": recurrent.ParaLSTM}
every_cell = pytest.mark.parametrize("cell", LAYERS)
IN, WIDTH = 6, 8


def made(cell, **options):
    layer = LAYERS[cell](IN, WIDTH, **options, rngs=nnx.Rngs(0))
    # Biases that are not zero, and weights large enough to matter.
    layer.bias.set_value(jax.random.normal(jax.random.key(5), (3, WIDTH)))
    layer.state_weight.set_value(3 * layer.state_weight[...])
    return layer


def inputs(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense_matrix(weight):
    """`[heads, fan-in, 3, fan-out]` to the block-diagonal `[Din, 3, D]` that it stands for."""
    heads, fan_in, gates, fan_out = weight.shape
    dense = jnp.zeros((heads * fan_in, gates, heads * fan_out), weight.dtype)
    for k in range(heads):
        rows, columns = slice(k * fan_in, (k + 1) * fan_in), slice(k * fan_out, (k + 1) * fan_out)
        dense = dense.at[rows, :, columns].set(weight[k])
    return dense


def exact(cell, parameters, x):
    """The whole layer in float64, from zero: every output."""
    weights = jnp.concatenate([parameters[k] for k in ("state_weight", "peephole")[: STATES[cell]]])
    u = jnp.einsum("bti,igd->btgd", x, dense_matrix(parameters["weight"])) + parameters["bias"]
    state = (jnp.zeros((x.shape[0], WIDTH)),) * STATES[cell]
    _, states = jax.lax.scan(
        lambda state, row: (STEPS[cell](state, row, weights),) * 2, state, jnp.swapaxes(u, 0, 1)
    )
    return jnp.swapaxes(states[-1], 0, 1)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@every_cell
def test_layer_is_its_equations_with_gradients(cell, method, heads):
    """Of x, B, b, the state matrix and peepholes."""
    layer, x = made(cell, heads=heads, method=method), inputs((2, 40, IN))
    graph, params = nnx.split(layer)
    seed = inputs((2, 40, WIDTH), seed=1)

    @jax.jit
    def both(params, x):
        return jax.value_and_grad(
            lambda params, x: (lambda y: (jnp.sum(y * seed), y))(nnx.merge(graph, params)(x)[0]),
            argnums=(0, 1),
            has_aux=True,
        )(params, x)

    (_, y), (got, got_x) = both(params, x)
    with jax.enable_x64(True):
        plain = {path[0]: np.asarray(v[...], np.float64) for path, v in nnx.to_flat_state(params)}
        y_want, pull = jax.vjp(functools.partial(exact, cell), plain, np.asarray(x, np.float64))
        want, want_x = pull(jnp.asarray(seed, jnp.float64))
    assert error(y, y_want) < 5e-6
    assert relative_error(got_x, want_x) < 1e-5
    assert len(want) == {"gru": 3, "lstm": 4}[cell]
    for path, v in nnx.to_flat_state(got):
        assert relative_error(v[...], want[path[0]]) < 1e-5, path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@every_cell
def test_steps_are_the_sequence(cell, dtype):
    layer, x = made(cell, heads=2), inputs((3, 9, IN), dtype=dtype)
    whole, final = layer(x)
    state, rows = layer.initial_state(3), []
    for t in range(9):
        y, state = layer.step(x[:, t], state)
        rows.append(y)
    assert whole.dtype == y.dtype == dtype
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves((state, final)))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, final, layer.initial_state(3))
    bound = 1e-6 if dtype == jnp.float32 else 2**-8
    # The GPU kernel takes the chip's own tanh for bfloat16.
    own_tanh = dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    of_states = 1e-5 if own_tanh else 1e-6
    assert error(jnp.stack(rows, 1), whole) <= bound and error(state, final) <= of_states
    # From the middle, a prompt and then steps.
    _, state = layer(x[:, :5])
    for t in range(5, 9):
        y, state = layer.step(x[:, t], state)
    assert error(y, whole[:, -1]) <= bound


@every_cell
def test_reset_and_lengths_reach_the_recurrence(cell):
    layer, x = made(cell), inputs((2, 12, IN))
    reset = jnp.zeros((2, 12), bool).at[0, 5].set(True)
    y, final = layer(x, reset=reset)
    alone, state = layer(x[:1, 5:])
    assert error(y[:1, 5:], alone) < 1e-6
    assert error(jax.tree.map(lambda s: s[:1], final), state) < 1e-6
    y, final = layer(x, lengths=jnp.asarray([7, 12]))
    assert not np.any(y[0, 7:])
    assert error(jax.tree.map(lambda s: s[:1], final), layer(x[:1, :7])[1]) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@every_cell
def test_nan_behind_the_length_of_a_row_reaches_nothing(cell, method):
    """Neither outputs, nor final states, nor any gradient."""
    graph, params = nnx.split(made(cell, method=method))
    lengths = jnp.asarray([0, 7, 12])
    behind = (jnp.arange(12) >= lengths[:, None])[..., None]
    x = inputs((3, 12, IN))

    def loss(params, x):
        y, state = nnx.merge(graph, params)(x, lengths=lengths)
        return jnp.sum(y**2) + sum(jnp.sum(s**2) for s in jax.tree.leaves(state)), (y, state)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    found = run(params, jnp.where(behind, jnp.nan, x))
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_equal(found, run(params, jnp.where(behind, 7, x)))


@every_cell
def test_the_bare_recurrence_does_not_see_them_either(cell):
    u, weights, initial, _ = draw(cell, (2, 12, WIDTH), 0.9)
    lengths = jnp.asarray([7, 12])
    hidden = u.at[0, 7:].set(jnp.nan)
    y, final = call(cell, "scan", hidden, weights, initial, None, lengths)
    assert error((y, final), call(cell, "scan", u, weights, initial, None, lengths)) == 0
    given = cotangents(cell, (2, 12, WIDTH))
    found = gradients(cell, "scan", hidden, weights, initial, None, *given, lengths)
    assert error(found, gradients(cell, "scan", u, weights, initial, None, *given, lengths)) == 0
    assert not np.any(found[0][0, 7:])


@pytest.mark.parametrize("method", METHODS)
@every_cell
def test_final_states_of_short_rows_are_not_rounded(cell, method):
    """In bfloat16 a row that ends early ends in the float32 state that it has alone.

    Of the bare recurrence: a product of other rows may be rounded to another pre-activation.
    """
    u, weights, initial, _ = draw(cell, (3, 12, WIDTH), 0.9)
    u, lengths = u.astype(jnp.bfloat16), [5, 1, 12]
    y, final = call(cell, method, u, weights, initial, None, jnp.asarray(lengths))
    assert y.dtype == jnp.bfloat16
    for row, length in enumerate(lengths):
        mine, start = (
            jax.tree.map(lambda s, row=row: s[row : row + 1], s) for s in (final, initial)
        )
        _, alone = call(cell, method, u[row : row + 1, :length], weights, start)
        assert error(mine, alone) < 1e-6, row
        rounded = jax.tree.map(lambda s: s.astype(jnp.bfloat16), alone)
        assert error(rounded, alone) > 1e-4


@pytest.mark.parametrize("method", METHODS)
@every_cell
def test_a_layer_does_not_round_them_either(cell, method):
    """Beside rows that end with it, as the product of input and weights is the same then."""
    layer, x = made(cell, method=method), inputs((3, 12, IN), dtype=jnp.bfloat16)
    lengths = [5, 1, 12]
    y, final = layer(x, lengths=jnp.asarray(lengths))
    assert y.dtype == jnp.bfloat16
    for row, length in enumerate(lengths):
        _, alike = layer(x, lengths=jnp.full(3, length))
        mine, same = (jax.tree.map(lambda s, row=row: s[row], s) for s in (final, alike))
        assert error(mine, same) < 1e-6, row
        rounded = jax.tree.map(lambda s: s.astype(jnp.bfloat16), mine)
        assert error(rounded, mine) > 1e-4


@every_cell
def test_heads_do_not_see_one_another(cell):
    layer, x = made(cell, heads=2), inputs((1, 5, IN))
    other = x.at[..., : IN // 2].add(1.0)
    before, after = layer(x)[0], layer(other)[0]
    np.testing.assert_array_equal(before[..., WIDTH // 2 :], after[..., WIDTH // 2 :])
    assert np.all(before[..., : WIDTH // 2] != after[..., : WIDTH // 2])


@pytest.mark.parametrize(
    "cell, init, bound, spread",
    [
        # Din = 512, D = 1024, 4 heads: fan-in 128, fan-out of a head 256.
        ("gru", "paper", np.sqrt(3 / 128), 1 / np.sqrt(1024)),
        ("lstm", "paper", np.sqrt(3 / 128), 1 / np.sqrt(1024)),
        ("gru", "code", np.sqrt(6 / (128 + 1024)), 2 / np.sqrt(5 * 1024)),
        ("lstm", "code", np.sqrt(6 / (128 + 256)), 2 / np.sqrt(5 * 1024)),
    ],
)
def test_initial_values(cell, init, bound, spread):
    layer = LAYERS[cell](512, 1024, heads=4, init=init, rngs=nnx.Rngs(0))
    weight, bias = np.asarray(layer.weight[...]), np.asarray(layer.bias[...])
    assert weight.shape == (4, 128, 3, 256) and bias.shape == (3, 1024)
    assert 0.999 * bound < np.max(np.abs(weight)) <= bound
    assert np.std(weight) == pytest.approx(bound / np.sqrt(3), rel=0.01)
    names = ("state_weight", "peephole")[: STATES[cell]]
    for name in names:
        values = np.asarray(getattr(layer, name)[...])
        assert values.shape == ((3 if name == "state_weight" else 2), 1024)
        assert np.std(values) == pytest.approx(spread, rel=0.05)
        assert abs(np.mean(values)) < 0.1 * spread
    row = -np.linspace(0, 1, 1024) if init == "code" else np.zeros(1024)
    np.testing.assert_allclose(bias[0], row, atol=1e-6)
    assert not np.any(bias[1:])
    # No two parameters from one key.
    assert len({round(float(np.asarray(getattr(layer, n)[...])[0, 0].ravel()[0]), 7)
                for n in ("weight", *names)}) == 1 + len(names)  # fmt: skip


@every_cell
def test_linen_face_is_the_layer(cell):
    face = getattr(linen, LAYERS[cell].__name__)(IN, WIDTH, heads=2)
    x = inputs((2, 7, IN))
    boxed = face.init(jax.random.key(0), x)
    assert boxed["params"]["state_weight"].names == ("gates", "state")
    assert boxed["params"]["weight"].names == ("heads", "embed", "gates", "head_width")
    params = nn.unbox(boxed)
    y, final = face.apply(params, x)
    layer = LAYERS[cell](IN, WIDTH, heads=2, rngs=nnx.Rngs(1))
    for name, value in params["params"].items():
        getattr(layer, name).set_value(value)
    assert error((y, final), layer(x)) < 1e-6
    state = layer.initial_state(2)
    stepped = face.apply(params, x[:, 0], state, nnx_method="step")
    assert error(stepped, layer.step(x[:, 0], state)) < 1e-6
    again, _ = face.apply(params, x, final, reset=jnp.ones((2, 7), bool))
    assert error(again, layer(x, reset=jnp.ones((2, 7), bool))[0]) < 1e-6


class TinyLM(nnx.Module):
    """Table, recurrence, head."""

    def __init__(self, cell, method, rngs):
        self.table = nnx.Embed(11, IN, rngs=rngs)
        self.cell = LAYERS[cell](IN, WIDTH, method=method, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 11, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.cell(self.table(tokens))[0])


def loss_curve(cell, method):
    """50 steps of Adam on one periodic text."""
    graph, params = nnx.split(TinyLM(cell, method, nnx.Rngs(0)))
    text = np.random.default_rng(0).integers(0, 11, (4, 13))
    tokens = jnp.asarray(np.tile(text, (1, 10)))[:, :129]
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(carry, _):
        params, moments = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=50))
    return np.asarray(run(params)[1])


@every_cell
def test_loss_curves_of_all_methods_agree(cell):
    curves = [loss_curve(cell, method) for method in METHODS]
    assert curves[0][-1] < curves[0][0] - 0.2
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_lengths_may_be_of_a_type_that_time_is_not(dtype):
    layer = recurrent.ParaGRU(4, 4, method="scan", rngs=nnx.Rngs(0))
    conv = layers.CausalConv(4, rngs=nnx.Rngs(0))
    x, lengths = jax.random.normal(jax.random.key(0), (2, 300, 4)), jnp.asarray([100, 7])
    for part in (layer, conv):
        want = part(x, lengths=lengths)
        chex.assert_trees_all_equal(part(x, lengths=lengths.astype(dtype)), want)
        found = jax.jit(lambda n, part=part: part(x, lengths=n))(lengths.astype(dtype))
        chex.assert_trees_all_close(found, want, atol=1e-6)


@pytest.mark.parametrize("method", ["scan", "newton", "shooting"])
def test_outside_jit_a_recurrence_is_traced_once(method, monkeypatch):
    traced = []
    step = cells.GRU.step
    monkeypatch.setattr(cells.GRU, "step", lambda *args: traced.append(1) or step(*args))
    u, a = jnp.ones((1, 71, 3, 2)), jnp.ones((3, 2))
    run = jax.grad(lambda u: jnp.sum(recurrent.gru(u, a, method=method)[0]))
    run(u)
    first = len(traced)
    run(u + 1), recurrent.gru(u, a, method=method)
    more = len(traced)
    run(u + 2), recurrent.gru(u + 1, a, method=method)
    assert 0 < first and len(traced) == more
    jax.clear_caches()
