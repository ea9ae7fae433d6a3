"""Two processes make the run that one makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hackle.zoo.train.checkpoint import RunFolder, load_model
from hackle.zoo.train.loop import run
from hackle.zoo.train.report import read_metrics
from tests.zoo.train.small import recipe

ROOT = Path(__file__).resolve().parents[3]

WORKER = """
import json, sys
import jax
rank, port, out, fields, stop = json.loads(sys.argv[1])
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
from hackle.zoo.train import loop
from hackle.zoo.train.recipe import Recipe
if stop:
    loop.Stop.agreed = lambda self, step: step >= stop
summary = loop.run(Recipe(**fields), out)
print(f"steps {summary.step}")
"""


def two_processes(it, out, stop=0):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = []
    for rank in (0, 1):
        task = json.dumps([rank, port, str(out), it.to_json(), stop])
        command = [sys.executable, "-c", WORKER, task]
        workers.append(subprocess.Popen(command, env=environment, **pipes))
    said = []
    try:
        for worker in workers:
            said.append(worker.communicate(timeout=300)[0])
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), said
    return said


@pytest.mark.slow
@pytest.mark.devices(8)
def test_two_processes_equal_one_also_across_a_resume(tmp_path):
    text = "\n".join(f"x{i} = {i * i}" for i in range(400))
    (tmp_path / "corpus").mkdir()
    for name in range(30):
        (tmp_path / "corpus" / f"{name}.py").write_text(f"# {name}\n{text[name * 50 :]}")
    it = recipe(
        corpus=str(tmp_path / "corpus"),
        data_dir=str(tmp_path / "data"),
        vocab_size=300,
        preset="any_fsdp",
        overrides={"width": 32},
        eval_every=3,
    )
    run(it, tmp_path / "one", say=lambda _: None)  # eight devices in this process
    said = two_processes(it, tmp_path / "two", stop=4)
    assert "plan: 6 steps" in said[0] and "plan:" not in said[1]
    assert RunFolder(tmp_path / "two").latest() == 4
    assert "resuming at step 4 of 6" in two_processes(it, tmp_path / "two")[0]
    assert RunFolder(tmp_path / "two").steps() == [4, 6]
    for a, b in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        assert a["step"] == b["step"]
        for name in a.keys() & {"loss", "validation_loss"}:
            # bfloat16; other batches would differ by more than a hundredth.
            assert a[name] == pytest.approx(b[name], rel=2e-3), (a["step"], name)
    load_model(tmp_path / "two")
