"""Compiles for TPUs that are not there: libtpu brings the compiler, and a topology is described.

A kernel that the compiler refuses fails here as it would on the chip. One process at a time may
hold libtpu, so compiles run in processes of their own, one after the other whatever runs the tests.
"""

import fcntl
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # smallest topology of each
Program = tuple[str, Callable[..., Any], tuple[Any, ...]]


def compiled(chip: str, programs: Callable[[], Iterable[Program]]) -> dict[str, str]:
    """Name -> optimised HLO of each program, compiled for one chip.

    Args:
      programs: a function at the top of its module. It gives `(name, function, arguments)`, where
        arguments are trees of `jax.ShapeDtypeStruct`.

    Raises:
      RuntimeError: with the end of the compiler's output.
    """
    # Not the settings that the suite makes for its own processes, in jax's names for them.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    where = [programs.__module__, programs.__qualname__]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hlo.json"
        command = [sys.executable, "-m", "tests.tpu_compile", CHIPS[chip], *where, str(out)]
        root = Path(__file__).parents[1]
        lock = Path(tempfile.gettempdir()) / f"hackle-libtpu-{os.getuid()}.lock"
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{chip} refuses a program of {where[0]}:\n{ran.stderr[-4000:]}")
        return json.loads(out.read_text())


def _main(topology: str, module: str, function: str, out: str) -> None:
    import jax
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def on_chip(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    texts = {}
    for name, program, arguments in getattr(importlib.import_module(module), function)():
        print(f"compiling {name}", file=sys.stderr)
        lowered = jax.jit(program).lower(*jax.tree.map(on_chip, arguments))
        texts[name] = lowered.compile().as_text()
    Path(out).write_text(json.dumps(texts))


if __name__ == "__main__":
    _main(*sys.argv[1:])
