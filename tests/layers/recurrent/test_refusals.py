"""What does not fit is refused in one line, before any compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hackle.layers import recurrent

U, A, P = jnp.zeros((2, 4, 3, 5)), jnp.zeros((3, 5)), jnp.zeros((2, 5))
STATE = jnp.zeros((2, 5))


@pytest.mark.parametrize(
    "u, a, initial, options, text",
    [
        (
            U[:, :, :2],
            A,
            None,
            {},
            r"gru: u must be .* \[batch, time, 3, width\], got float32 \(2,",
        ),
        (jnp.zeros((2, 4, 4, 5)), A, None, {}, r"got float32 \(2, 4, 4, 5\)"),
        (U[0], A, None, {}, r"u must be .* got float32 \(4, 3, 5\)"),
        (U.astype(jnp.int32), A, None, {}, "u must be floating-point .* got int32"),
        (U[:, :0], A, None, {}, r"u has shape \(2, 0, 3, 5\); .* time .* at least 1"),
        (U[:0], A, None, {}, r"u has shape \(0, 4, 3, 5\)"),
        (U, A[:2], None, {}, r"a must be .* \[3, width\] = \(3, 5\), got float32 \(2, 5\)"),
        (U, A[:, :4], None, {}, r"a must be .* = \(3, 5\), got float32 \(3, 4\)"),
        (U, A, STATE[:1], {}, r"initial_state must be .* = \(2, 5\), got \['float32 \(1, 5\)'\]"),
        (
            U,
            A,
            STATE[:, :4],
            {},
            r"initial_state must be .* = \(2, 5\), got \['float32 \(2, 4\)'\]",
        ),
        (
            U,
            A,
            (STATE, STATE),
            {},
            r"initial_state must be 1 x .*, got \[.* \(2, 5\)', .* \(2, 5\)'\]",
        ),
        (
            U,
            A,
            None,
            {"reset": jnp.zeros((4, 2), bool)},
            r"reset must be bool .* got bool \(4, 2\)",
        ),
        (U, A, None, {"reset": jnp.zeros((2, 4))}, r"reset must be bool .* got float32 \(2, 4\)"),
        (U, A, None, {"lengths": jnp.zeros((2,))}, r"lengths must be integers .* got float32"),
        (U, A, None, {"lengths": jnp.zeros((3,), int)}, r"lengths must be .* = \(2,\), got int32"),
        (U, jnp.zeros((3, 5), int), None, {}, r"a must be floating-point .* got int32 \(3, 5\)"),
        (U, A, jnp.zeros((2, 5), int), {}, r"initial_state must be .* got \['int32 \(2, 5\)'\]"),
        (U, A, None, {"reset": [[True] * 3] * 2}, r"reset must be bool .* got bool \(2, 3\)"),
        (U, A, None, {"lengths": [4]}, r"lengths must be integers .* got int32 \(1,\)"),
        (U, A, None, {"lengths": [4, 5]}, r"lengths must be 0 to 4, got \[4, 5\]"),
        (U, A, None, {"method": "fast"}, r"unknown method 'fast' .* one of \('scan', 'newton'"),
        (
            U.at[0, 1, 2, 3].set(jnp.nan),
            A,
            None,
            {},
            r"not finite; the first is nan at \(0, 1, 2, 3\)",
        ),
        (U.at[1, 3, 0, 0].set(jnp.inf), A, None, {}, "gru: u has entries that are not finite"),
        (U, A.at[2, 1].set(jnp.nan), None, {}, "gru: a has entries that are not finite"),
        (U, A, STATE.at[1, 1].set(jnp.inf), {}, "gru: initial_state has entries that are not"),
    ],
)
def test_gru_refuses(u, a, initial, options, text):
    with pytest.raises(ValueError, match=text) as caught:
        recurrent.gru(u, a, initial, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "u, a, peephole, initial, text",
    [
        (U, A, A, None, r"lstm: peephole must be .* \[2, width\] = \(2, 5\), got float32 \(3, 5\)"),
        (U, P, P, None, r"lstm: a must be .* \[3, width\] = \(3, 5\), got float32 \(2, 5\)"),
        (U, A, P, STATE, r"lstm: initial_state must be 2 x .*, got \['float32 \(2, 5\)'\]"),
        (
            U,
            A,
            P,
            (STATE, STATE[:, :1]),
            r"initial_state must be 2 x .* got \[.* \(2, 5\)', .* \(2, 1\)'\]",
        ),
        (U[:, :0], A, P, None, r"lstm: u has shape \(2, 0, 3, 5\)"),
        (U, A, P.at[0, 0].set(jnp.nan), None, "lstm: peephole has entries that are not finite"),
        (U, A, P, (STATE, STATE + jnp.nan), "lstm: initial_state has entries that are not finite"),
    ],
)
def test_lstm_refuses(u, a, peephole, initial, text):
    with pytest.raises(ValueError, match=text):
        recurrent.lstm(u, a, peephole, initial)


def test_shapes_are_checked_inside_jit_too():
    with pytest.raises(ValueError, match="reset must be bool"):
        jax.jit(lambda u: recurrent.gru(u, A, reset=jnp.zeros((2, 3), bool)))(U)


def test_constants_of_a_jitted_function_are_checked_too():
    wrong, lengths = U + jnp.nan, jnp.asarray([5, 1])
    assert jax.jit(lambda a: recurrent.gru(U, a))(A)[0].shape == (2, 4, 5)
    with pytest.raises(ValueError, match="u has entries that are not finite"):
        jax.jit(lambda a: recurrent.gru(wrong, a))(A)
    with pytest.raises(ValueError, match=r"lengths must be 0 to 4, got \[5, 1\]"):
        jax.jit(lambda u: recurrent.gru(u, A, lengths=lengths))(U)


def test_options_of_iteration_belong_to_methods_that_iterate():
    for options in ({"tolerance": 1e-3}, {"max_iterations": 3}, {"fallback": True}):
        ((name, value),) = options.items()
        text = f"gru: method 'scan' does not iterate, got {name}={value}; expected one of"
        with pytest.raises(ValueError, match=text):
            recurrent.gru_with_info(U, A, method="scan", **options)
        if name != "fallback":
            text = f"method None may be one that does not iterate, got {name}={value}; expected"
            with pytest.raises(ValueError, match=text):
                recurrent.gru_with_info(U, A, **options)


def test_whatever_none_stands_for_may_fall_back():
    states, _, info = recurrent.gru_with_info(U + 1, A, fallback=True)
    assert bool(info.converged)
    np.testing.assert_allclose(states, recurrent.gru(U + 1, A, method="scan")[0], atol=1e-6)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"max_iterations": 0}, "max_iterations=0; expected an integer from 1 on"),
        ({"max_iterations": 2.5}, "max_iterations=2.5; expected an integer from 1 on"),
        ({"tolerance": -1e-3}, "tolerance=-0.001; expected a finite number from 0 on"),
        ({"tolerance": float("nan")}, "tolerance=nan; expected a finite number from 0 on"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(options, text):
    for method in ("newton", "shooting"):
        with pytest.raises(ValueError, match=f"lstm: {text}"):
            recurrent.lstm_with_info(U, A, P, method=method, **options)
    with pytest.raises(ValueError, match=f"newton_scan: {text}"):
        recurrent.newton_scan(plus, X, H, **options)


def test_bounds_are_known_before_the_run_and_scan_has_no_use_for_them():
    with pytest.raises(ValueError, match="newton_scan: tolerance is traced; expected a number"):
        jax.jit(lambda t: recurrent.newton_scan(plus, X, H, tolerance=t))(0.1)
    with pytest.raises(ValueError, match="newton_scan: bound=.*; expected a number above 0"):
        recurrent.newton_scan(plus, X, H, bound=jnp.ones(2))
    with pytest.raises(ValueError, match="'scan' does not iterate, got max_iterations=3, fallback"):
        recurrent.newton_scan(plus, X, H, method="scan", max_iterations=3, fallback=True)


@pytest.mark.parametrize(
    "state, text",
    [
        (
            (jnp.zeros(2, jnp.bfloat16), jnp.zeros(2)),
            "must have one dtype, got .'bfloat16', 'float32'",
        ),
        (jnp.zeros((0,)), r"must not be empty, got shapes .\(0,\)"),
    ],
)
def test_states_that_cannot_be_solved_for_are_refused(state, text):
    with pytest.raises(ValueError, match=f"newton_scan: arrays of the state {text}"):
        recurrent.newton_scan(lambda h, x: h, X, state)
    with pytest.raises(ValueError, match=f"check_jacobian: arrays of the state {text}"):
        recurrent.check_jacobian(lambda h, x: h, X[0], state)


def test_lists_are_arrays():
    u, cut = jax.random.normal(jax.random.key(0), U.shape), [False, False, True, False]
    got = recurrent.gru(u.tolist(), (A + 0.5).tolist(), reset=[cut, cut], lengths=[3, 4])
    reset, lengths = jnp.asarray([cut, cut]), jnp.asarray([3, 4])
    want = recurrent.gru(u, A + 0.5, reset=reset, lengths=lengths)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is about a chip without a kernel")
def test_a_kernel_without_its_chip_says_so():
    with pytest.raises(NotImplementedError, match="method 'fused' of a recurrence: .* is "):
        recurrent.gru(U, A, method="fused")


@pytest.mark.parametrize("layer", [recurrent.ParaGRU, recurrent.ParaLSTM])
@pytest.mark.parametrize(
    "options, text",
    [
        ({"heads": 3}, "heads=3 must divide in_width=8 and width=4"),
        ({"heads": 8}, "heads=8 must divide in_width=8 and width=4"),
        ({"heads": 0}, "heads=0 must divide"),
        ({"method": "fast"}, "method 'fast' is not one of"),
        ({"init": "zeros"}, "init 'zeros' is not one of"),
    ],
)
def test_layers_refuse(layer, options, text):
    with pytest.raises(ValueError, match=f"{layer.__name__}: {text}"):
        layer(8, 4, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layer", [recurrent.ParaGRU, recurrent.ParaLSTM])
def test_layers_refuse_inputs(layer):
    made = layer(8, 4, rngs=nnx.Rngs(0))
    name = layer.__name__
    x = rf"{name}: x must be floating-point \[batch, time, 8\], got"
    for wrong, got in (
        (jnp.zeros((2, 3, 7)), r"float32 \(2, 3, 7\)"),
        (jnp.zeros((3, 8)), r"float32 \(3, 8\)"),
        (jnp.zeros((2, 3, 8), jnp.int32), r"int32 \(2, 3, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"{x} {got}"):
            made(wrong)
    with pytest.raises(ValueError, match=rf"{name}: lengths must be integers \[batch\] = \(2,\)"):
        made(jnp.zeros((2, 3, 8)), lengths=jnp.zeros((3,), int))
    for wrong in ([4, 0], [3, -1]):
        with pytest.raises(ValueError, match=f"lengths must be 0 to 3, got \\[{wrong[0]}, "):
            made(jnp.zeros((2, 3, 8)), lengths=jnp.asarray(wrong))
    with pytest.raises(ValueError, match="initial_state must be"):
        made(jnp.zeros((2, 3, 8)), made.initial_state(3))
    with pytest.raises(ValueError, match="at least 1"):
        made(jnp.zeros((2, 0, 8)))


@pytest.mark.parametrize("layer", [recurrent.ParaGRU, recurrent.ParaLSTM])
def test_steps_refuse_inputs(layer):
    made = layer(8, 4, rngs=nnx.Rngs(0))
    state = made.initial_state(2)
    x = rf"{layer.__name__}: x must be floating-point \[batch, 8\], got"
    for wrong, got in (
        (jnp.zeros((2, 7)), r"float32 \(2, 7\)"),
        (jnp.zeros((2, 1, 8)), r"float32 \(2, 1, 8\)"),
        (jnp.zeros((2, 8), jnp.int32), r"int32 \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"{x} {got}"):
            made.step(wrong, state)
    arrays = len(jax.tree.leaves(state))
    for wrong in (made.initial_state(3), (jnp.zeros((2, 4)),) * (3 - arrays), jnp.zeros((2, 8))):
        shapes = r"expected " + rf"\[\(2, 4\){', .*' * (arrays - 1)}\]"
        with pytest.raises(ValueError, match=f"{layer.__name__}: state has shapes .*, {shapes}"):
            made.step(jnp.zeros((2, 8)), wrong)
    whole = jax.tree.map(lambda x: x.astype(jnp.int32), state)
    with pytest.raises(ValueError, match=f"{layer.__name__}: state must be floating-point, got"):
        made.step(jnp.zeros((2, 8)), whole)
    with pytest.raises(ValueError, match=f"{layer.__name__}: batch=0; expected at least 1"):
        made.initial_state(0)


@pytest.mark.parametrize("layer", [recurrent.ParaGRU, recurrent.ParaLSTM])
def test_a_first_step_needs_no_state(layer):
    made, x = layer(8, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
    want = made.step(x, made.initial_state(2))
    for a, b in zip(jax.tree.leaves(made.step(x)), jax.tree.leaves(want), strict=True):
        assert jnp.array_equal(a, b)


@pytest.mark.parametrize("layer", [recurrent.ParaGRU, recurrent.ParaLSTM])
@pytest.mark.parametrize("widths", [(0, 8), (8, 0), (-8, 8)])
def test_layers_need_widths(layer, widths):
    text = f"in_width={widths[0]} and width={widths[1]}; expected both to be at least 1"
    with pytest.raises(ValueError, match=f"{layer.__name__}: {text}"):
        layer(*widths, rngs=nnx.Rngs(0))


def plus(state, x):
    return state + x


X, H = jnp.zeros((4, 2)), jnp.zeros((2,))


@pytest.mark.parametrize(
    "step, inputs, state, options, text",
    [
        (plus, X[:0], H, {}, r"no time steps \(T = 0\)"),
        (lambda h, x: h + x["a"], {"a": X, "b": X[:3]}, H, {}, r"differ in length: \[4, 3\]"),
        (plus, {}, H, {}, r"inputs must be arrays \[T, ...\], got shapes \[\]"),
        (plus, jnp.zeros(()), H, {}, r"inputs must be arrays \[T, ...\], got shapes \[\(\)\]"),
        (plus, X, jnp.zeros((2,), int), {}, r"state must be floating-point .* got \['int32'\]"),
        (plus, X, jnp.zeros((1,)), {}, r"step turns a state of .*\(1,\).* into .*\(2,\)"),
        (plus, X, (), {}, "state must be floating-point"),
        (plus, X, H, {"jacobian": "banded"}, "jacobian 'banded' is not one of"),
        (plus, X, H, {"method": "shooting"}, "method 'shooting' is not one of"),
        (plus, X, H, {"bound": 0.0}, "bound=0.0; expected a number above 0"),
        (
            lambda h, x: (h[0] + x, h[1]),
            X,
            (H, jnp.zeros((3,))),
            {"jacobian": "block"},
            "arrays of a block must have one shape",
        ),
    ],
)
def test_newton_scan_refuses(step, inputs, state, options, text):
    with pytest.raises(ValueError, match=f"newton_scan: .*{text}") as caught:
        recurrent.newton_scan(step, inputs, state, **options)
    assert "\n" not in str(caught.value)
