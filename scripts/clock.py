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
    host is. A call that the host cannot put there in that time, since it waits for the GPU on the
    way, is timed as it comes.
    """
    import jax

    for argument in arguments:
        jax.block_until_ready(call(argument))
    start = time.perf_counter()
    jax.block_until_ready(call(arguments[0]))
    most = QUEUED if on_gpu() else 400
    calls = max(1, min(most, int(ROUND_SECONDS / (time.perf_counter() - start))))
    times: list[float] = []
    hold = on_gpu()
    while len(times) < ROUNDS:
        held = _busy() if hold else []
        start = time.perf_counter()
        for i in range(calls):
            out = None  # room for the next result
            out = call(arguments[i % len(arguments)])
        if hold:
            if any(x.is_ready() for x in held):  # some calls did not come in time
                times.clear()
                hold, calls = calls > 1, max(1, calls // 2)
                jax.block_until_ready(out)
                continue
            jax.block_until_ready(held)
            start = time.perf_counter()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def _busy() -> list:
    """Starts some 10 ms of work on every device; what comes of it."""
    work, inputs = _work()
    return [work(x) for x in inputs]


@functools.cache
def _work():
    import jax
    import jax.numpy as jnp

    def work(x):
        for _ in range(4):
            x = jax.lax.optimization_barrier(jnp.dot(x, x, precision="highest"))
        return x

    zeros = jnp.zeros((4096, 4096), jnp.float32)
    inputs = [jax.device_put(zeros, device) for device in jax.local_devices()]
    work = jax.jit(work)
    jax.block_until_ready([work(x) for x in inputs])
    return work, inputs
