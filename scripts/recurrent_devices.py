"""A recurrence with its time over all devices, beside the same on one of them, checked alike."""

from typing import Any

import recurrent_reference as reference
from recurrent_rows import (
    GRADIENT_ERROR,
    STATE_ERROR,
    Case,
    Given,
    check,
    random_array,
    recurrence,
    require,
    seconds,
    state_arrays,
)

RULES = {"batch": None, "length": "seq", "state": None}


def devices_row(case: Case, row: dict[str, Any]) -> None:
    """Fills `row`, as far as it comes: milliseconds on one device and on all of them.

    Arrays of one device are dropped before those of all are made, since each may fill its memory.
    """
    import jax

    given = Given.random(case)
    require(case, "backward")
    exact = None
    for name, count in (("one device", 1), ("all devices", len(jax.devices()))):
        u, g = placed(case, count)
        forward, both = programs(case, given, count)
        if exact is None:
            exact = of_reference(case, given, u, g)
        h, got = forward(given.state, u)[0], both(given.state, u, g)
        states, (du, dweights, dstate) = given.sampled((h, got))
        error = check("h", [states], [exact[0]], STATE_ERROR[case.dtype])
        row["error"] = max(error, row.get("error", 0.0))
        wrong = check(
            "a gradient",
            [du, dweights, *state_arrays(dstate)],
            exact[1:],
            GRADIENT_ERROR[case.dtype],
            relative=True,
        )
        row["gradient error"] = max(wrong, row.get("gradient error", 0.0))
        del h, got, du
        row[f"{name} forward ms"] = 1e3 * seconds(lambda u: forward(given.state, u), [u])  # noqa: B023
        row[f"{name} both ms"] = 1e3 * seconds(lambda x: both(given.state, *x), [(u, g)])  # noqa: B023
        del u, g
    for what in ("forward", "both"):
        row[f"{what} speedup"] = row[f"one device {what} ms"] / row[f"all devices {what} ms"]


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
    """States h, and gradients of pre-activations, weights and first states, of some channels."""
    u, g, weights, state, final_g = given.sampled((u, g, given.weights, given.state, given.final_g))
    states = reference.solve(case.cell, u, weights, state_arrays(state))
    _, du, dweights, dinitial = reference.gradients(
        case.cell, u, weights, state_arrays(state), states, g, state_arrays(final_g)
    )
    return states[-1], du, dweights, *dinitial
