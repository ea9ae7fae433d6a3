"""When kernels that write in place are safe, and that they are right where they are said to be."""

import os
import subprocess
import sys

import jax
import pytest

from hackle.layers import in_place
from tests.house.tree import ROOT

OFF, ON = in_place.FLAG, in_place.FLAG.replace("false", "true")


@pytest.mark.parametrize(
    ("flags", "safe"),
    [
        ("", False),
        (OFF, True),
        (f"--xla_dump_to=x {OFF} --xla_dump_hlo_as_text", True),
        (f"{ON} {OFF.replace('false', '0')}", True),
        (f"{OFF} {ON}", False),  # the last one counts
        (OFF + "_", False),
    ],
)
def test_the_flag_is_read_as_xla_reads_it(flags, safe, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "__version_info__", in_place.FIRST)
    why = in_place.unsafe()
    assert (why is None) == safe
    assert safe or f"set XLA_FLAGS={OFF}" in why


def test_older_jax_is_safe(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert in_place.unsafe() is None


# Not strict: where all of these pass without the flag, XLA has been mended, and in_place.py can go.
LOST = pytest.mark.xfail(reason="XLA loses what is left as it was", strict=False)
WITHOUT = pytest.param("", marks=LOST)


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [OFF, WITHOUT], ids=["with the flag", "without"])
@pytest.mark.parametrize(
    ("what", "allowed"),
    [("recurrence('gru')", 1e-5), ("recurrence('lstm')", 1e-5), ("attention()", 5e-3)],
)
def test_gradients_through_a_scan_over_layers(what, allowed, flags):
    code = (
        "from hackle.layers import in_place; in_place.unsafe = lambda: None\n"
        f"from tests.layers import scanned; print(scanned.{what})"
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    there = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths}
    there |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], env=there, capture_output=True, text=True, check=False
    )
    if "NotImplementedError" in found.stderr:
        pytest.skip(found.stderr.splitlines()[-1])
    assert found.returncode == 0, found.stderr[-2000:]
    assert float(found.stdout.split()[-1]) < allowed
