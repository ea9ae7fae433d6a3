"""Platform, simulated devices, compile cache and marks; all set before anything imports jax.

The suite runs on eight simulated CPU devices. `HACKLE_TEST_PLATFORM=cuda` runs it on GPUs, where
tests that need more devices than there are skip. `HACKLE_TEST_CACHE=<folder>` keeps compiled
programs from run to run. Settings go into the environment, so that subprocesses inherit them.
"""

import os
import sys

import pytest

PLATFORM = os.environ.get("HACKLE_TEST_PLATFORM", "cpu")
CPU_DEVICES = 8


def _prepare_environment() -> None:
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could choose the platform")
    os.environ["JAX_PLATFORMS"] = PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu"
    if PLATFORM == "cpu":
        flag = "--xla_force_host_platform_device_count"
        kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
        os.environ["XLA_FLAGS"] = " ".join([*kept, f"{flag}={CPU_DEVICES}"])
    else:  # as scripts do; see layers/in_place.py
        flag = "--xla_gpu_enable_dynamic_slice_fusion=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    # GPUs would multiply float32 in TF32, which no tolerance here allows for.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    cache = os.environ.get("HACKLE_TEST_CACHE")
    if cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(cache)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


_prepare_environment()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and PLATFORM == "cpu":
        pytest.skip("needs a GPU: run with HACKLE_TEST_PLATFORM=cuda")
    mark = item.get_closest_marker("devices")
    if mark:
        import jax

        needed, there = mark.args[0], jax.device_count()
        if there < needed:
            reason = f"needs {needed} devices, {PLATFORM} has {there}"
            # On the CPU devices are simulated: too few of them is a defect, not a reason to skip.
            if PLATFORM == "cpu":
                pytest.fail(reason)
            pytest.skip(reason)
