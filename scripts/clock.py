"""How long a compiled call takes on its device."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 7
ROUND_SECONDS = 0.03
QUEUED = 24  # calls in a GPU's queue at once: JAX lets a device have 32


def on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def seconds(call: Callable[[Any], Any], arguments: list) -> float:
    """Median seconds of one `call(argument)` over some rounds of many calls.

    On a GPU the calls of a round are put into its queue behind work that takes longer than to put
    them there, and the clock starts when that work ends: so it is the GPU's time, however slow the
    host is.
    """
    import jax

    for argument in arguments:
        jax.block_until_ready(call(argument))
    start = time.perf_counter()
    jax.block_until_ready(call(arguments[0]))
    most = QUEUED if on_gpu() else 400
    calls = max(1, min(most, int(ROUND_SECONDS / (time.perf_counter() - start))))
    times: list[float] = []
    while len(times) < ROUNDS:
        held = _busy() if on_gpu() else None
        start = time.perf_counter()
        for i in range(calls):
            out = None  # room for the next result
            out = call(arguments[i % len(arguments)])
        if held is not None:
            if held.is_ready() and calls > 1:  # some calls did not come in time
                calls //= 2
                continue
            held.block_until_ready()
            start = time.perf_counter()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _busy():
    """Starts a few milliseconds of work; what comes of it."""
    work, x = _work()
    return work(x)


@functools.cache
def _work():
    import jax
    import jax.numpy as jnp

    def work(x):
        for _ in range(4):
            x = jax.lax.optimization_barrier(jnp.dot(x, x, precision="highest"))
        return x

    x = jnp.zeros((4096, 4096), jnp.float32)
    work = jax.jit(work)
    work(x).block_until_ready()
    return work, x
