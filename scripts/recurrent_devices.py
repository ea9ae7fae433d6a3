"""A recurrence with its time over all devices, beside the same on one of them, checked alike."""

import functools
from typing import Any

import recurrent_reference as reference
from clock import seconds
from recurrent_rows import (
    FINAL_ERROR,
    GRADIENT_ERROR,
    STATE_ERROR,
    Case,
    Given,
    check,
    random_array,
    recurrence,
    require,
    state_arrays,
)
from rows import WrongResult

RULES = {"batch": None, "length": "seq", "state": None}


def devices_row(case: Case, row: dict[str, Any]) -> None:
    """Fills `row`: milliseconds on one device and on all of them, once both are right.

    Arrays of one device are dropped before those of all are made, since each may fill its memory.
    """
    import jax

    given = Given.random(case)
    require(case, "backward")
    exact, times, errors = None, {}, []
    row["devices"] = len(jax.devices())
    for name, count in (("one device", 1), ("all devices", row["devices"])):
        u, g = placed(case, count)
        forward, both = programs(case, given, count)
        exact = exact or of_reference(case, given, u, g)
        errors.append(checked(case, given, exact, count, forward(given.state, u), both, u, g))
        run_forward = functools.partial(forward, given.state)
        run_both = functools.partial(both, given.state)
        times[f"{name} forward ms"] = 1e3 * seconds(run_forward, [u])
        times[f"{name} both ms"] = 1e3 * seconds(lambda x, run=run_both: run(*x), [(u, g)])
        del u, g
    row["error"], row["gradient error"] = map(max, zip(*errors, strict=True))
    row |= times
    for what in ("forward", "both"):
        row[f"{what} speedup"] = times[f"one device {what} ms"] / times[f"all devices {what} ms"]


def checked(case: Case, given: Given, exact, count: int, found, both, u, g) -> tuple[float, float]:
    """Errors of the states and of the gradients.

    Raises:
      WrongResult: one is too large, or time does not lie over `count` devices.
    """
    h, final = found
    if len(h.sharding.device_set) != count:
        raise WrongResult(f"h lies on {len(h.sharding.device_set)} devices, expected {count}")
    states, gradients = exact
    h, final, (du, dweights, dstate) = given.sampled((h, final, both(given.state, u, g)))
    error = check("h", [h], states[-1:], STATE_ERROR[case.dtype])
    last = [x[:, -1] for x in states]
    check("the final state", state_arrays(final), last, FINAL_ERROR[case.dtype])
    got = [du, dweights, *state_arrays(dstate)]
    allowed = GRADIENT_ERROR[case.dtype]
    return error, check("a gradient", got, gradients, allowed, relative=True)


def mesh(count: int):
    """Of the first `count` devices, in one axis."""
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("seq",))


def placed(case: Case, count: int):
    """Pre-activations and the cotangent of h, with time over `count` devices."""
    import jax

    spec = jax.sharding.PartitionSpec(None, "seq")
    sharding = jax.sharding.NamedSharding(mesh(count), spec)
    return [jax.device_put(x, sharding) for x in (random_array(0, case, 3), random_array(1, case))]


def programs(case: Case, given: Given, count: int):
    """`forward(state, u) -> (h, final)`, `both(state, u, g) -> (du, dweights, dstate)`."""
    import jax

    from hackle.layers.sharding import axis_rules

    def forward(state, u):
        with axis_rules(RULES):
            return recurrence(case, u, given.weights, state)

    def both(state, u, g):
        with axis_rules(RULES):
            run = lambda *a: recurrence(case, *a)
            _, pull = jax.vjp(run, u, given.weights, state)
            return pull((g, given.final_g))

    def on_mesh(function):
        jitted = jax.jit(function)

        def call(*arrays):
            with jax.set_mesh(mesh(count)):
                return jitted(*arrays)

        return call

    return on_mesh(forward), on_mesh(both)


def of_reference(case: Case, given: Given, u, g):
    """States, and gradients of pre-activations, weights and first states, of some channels."""
    u, g, weights, state, final_g = given.sampled((u, g, given.weights, given.state, given.final_g))
    states = reference.solve(case.cell, u, weights, state_arrays(state))
    _, du, dweights, dinitial = reference.gradients(
        case.cell, u, weights, state_arrays(state), states, g, state_arrays(final_g)
    )
    return states, [du, dweights, *dinitial]
