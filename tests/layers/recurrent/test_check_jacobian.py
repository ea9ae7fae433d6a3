"""`check_jacobian` of steps that are not finite everywhere."""

import jax.numpy as jnp
import pytest

from hackle.layers.recurrent import check_jacobian

ZERO, ONE = jnp.zeros(20), jnp.ones(20)


@pytest.mark.parametrize("reach", [3.0, 0.3, 0.03])
def test_a_step_that_is_finite_near_the_state_is_checked_there(reach):
    """`log` of states beyond the reach is not a number."""
    alone = lambda h, x: jnp.log(reach + h) + x
    check_jacobian(alone, ZERO, ZERO)
    mixed = lambda h, x: jnp.log(reach + h) * jnp.roll(h, 1) + x
    check_jacobian(mixed, ZERO, ZERO, "dense")
    with pytest.raises(ValueError, match="is not 'diagonal'"):
        check_jacobian(mixed, ZERO, ZERO)


def test_the_second_state_shows_products_wherever_it_is():
    hidden = lambda h, x: jnp.sqrt(0.04 + h) + h * jnp.roll(h, 1)
    with pytest.raises(ValueError, match="is not 'diagonal'"):
        check_jacobian(hidden, ZERO, ZERO)


def test_what_is_not_finite_is_said():
    with pytest.raises(ValueError, match="at this state and input .* is not finite"):
        check_jacobian(lambda h, x: jnp.log(h), ONE, ZERO)
    spike = lambda h, x: jnp.where(h == 1, h, jnp.nan)
    with pytest.raises(ValueError, match=r"finite at this state, but not .* size \(1.0, 0.1, 0.01"):
        check_jacobian(spike, ONE, ONE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_mixing_step_is_seen_in_any_dtype_and_size(dtype, size):
    state = jnp.zeros(8, dtype)
    alone = lambda h, x: jnp.tanh(size * h + x)
    check_jacobian(alone, state, state)
    mixed = lambda h, x: (size * jnp.roll(h, 1) + x).astype(h.dtype)
    with pytest.raises(ValueError, match="is not 'diagonal'"):
        check_jacobian(mixed, state, state)
