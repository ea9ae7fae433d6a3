"""scripts/clock.py: what is timed where a queue is held, with a queue of our own."""

import time

import jax.numpy as jnp
import pytest

from tests.scripts.running import load


@pytest.fixture
def clock(monkeypatch):
    load("bench_recurrent")  # puts the scripts on the path
    import clock

    monkeypatch.setattr(clock, "on_gpu", lambda: True)
    monkeypatch.setattr(clock, "ROUNDS", 3)
    return clock


class Held:
    """Work of some seconds on a device."""

    def __init__(self, seconds):
        self.end = time.perf_counter() + seconds

    def is_ready(self):
        return time.perf_counter() > self.end

    def block_until_ready(self):
        time.sleep(max(0, self.end - time.perf_counter()))


def test_a_call_that_the_host_does_not_finish_in_time_is_timed_whole(clock, monkeypatch):
    monkeypatch.setattr(clock, "_busy", lambda: [Held(0.01)])
    calls = []

    def slow(x):
        calls.append(x)
        time.sleep(0.03)
        return jnp.zeros(())

    assert 0.03 <= clock.seconds(slow, [None]) < 0.2
    assert len(calls) == 2 + 1 + 3  # two to begin with, one late, three rounds


def test_what_the_host_takes_does_not_count(clock, monkeypatch):
    monkeypatch.setattr(clock, "_busy", lambda: [Held(0.2)])
    monkeypatch.setattr(clock, "ROUND_SECONDS", 0.03)

    def call(x):
        time.sleep(0.01)  # of the host
        return jnp.zeros(())

    assert clock.seconds(call, [None]) < 0.005
