"""scripts/train.py as a person runs it: bad input, signals, dry run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from hackle.zoo.train.checkpoint import RunFolder, load_model
from hackle.zoo.train.step import Program
from tests.scripts.running import ROOT, SCRIPTS, call, load

SMALL = [
    "--recipe", "parscale-tiny-p2",
    *(f"--set=model.{name}" for name in ("width=16", "mlp_width=24", "depth=1", "heads=2",
                                         "head_width=8", "prefix_length=3", "max_length=64")),
    *(f"--set={name}" for name in ("corpus=random", "vocab_size=61", "length=16", "batch=8",
                                   "steps=6", "warmup=2", "eval_batches=0", "save_every=2")),
]  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load("train")


def test_no_published_form_is_refused_before_training(script, tmp_path, capsys, no_compute):
    args = [*SMALL, "--set", "model.prefix_length=0", "--out", tmp_path / "x"]
    assert call(script, *args) == 2
    assert "set export=false" in capsys.readouterr().err


@pytest.fixture
def no_compute(monkeypatch):
    def refuse(*_):
        raise AssertionError("computed before it refused")

    for name in ("init", "step", "evaluate"):
        monkeypatch.setattr(Program, name, refuse)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    assert call(script, *SMALL, "--out", out) == 0
    return out


def test_a_run_and_the_same_again(script, tmp_path, capsys):
    assert call(script, *SMALL, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "plan: 6 steps of 8 x 16 = 128 tokens" in said
    assert re.search(r"training loss: 4\.\d+ after 6 steps, 768 tokens", said)
    assert re.search(
        r"speed: [\d,]+ tokens/s, (MFU [\d.]+ %, )?[\d.]+ % of it waiting for input", said
    )
    assert f"model: {tmp_path}/model" in said
    assert call(script, *SMALL, "--out", tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_dry_run_says_what_would_be_and_computes_nothing(script, no_compute, tmp_path, capsys):
    assert call(script, *SMALL, "--set", "mode=frozen_trunk", "--dry-run") == 0
    said = capsys.readouterr().out
    model = script_model(2)
    trunk = script_model(1)
    assert f"{model:,} parameters, {model - trunk:,} trainable, {trunk:,} frozen" in said
    idle = jax.device_count() - 1
    assert "mesh: cpu1: one device (1 x " in said
    assert (f"; {idle} more devices are idle, preset=any_fsdp takes all" in said) == (idle > 0)
    assert "768 in all" in said
    # float32 parameters, and two moments and two counters for the trainable ones.
    assert f"parameters {model * 4 / 1024:.2f} KiB" in said
    assert f"optimizer {((model - trunk) * 8 + 8) / 1024:.2f} KiB" in said
    assert "no weight decay on: aggregator.hidden_bias, aggregator.output_bias, " in said
    assert said.endswith("dry run: nothing was computed\n")


def script_model(streams):
    from hackle.zoo.parscale import ParScaleConfig

    return ParScaleConfig.tiny(
        streams, width=16, mlp_width=24, depth=1, heads=2, head_width=8, prefix_length=3,
        max_length=64, vocab_size=61,
    ).parameter_count()  # fmt: skip


def test_a_dry_run_of_a_large_model_needs_no_memory(script, no_compute, capsys):
    assert call(script, "--recipe", "throughput-1.8b-p4", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "1,816,945,156 parameters" in said
    assert "it has 79.60 GiB" in said


def test_the_list_names_recipes_and_fields(script, capsys):
    assert call(script, "--list") == 0
    said = capsys.readouterr().out
    assert "parscale-tiny-p8" in said
    assert "  learning_rate=0.001" in said


@pytest.mark.parametrize(
    "args, text",
    [
        (["--recipe", "parscale-tiny-p3"], "unknown recipe 'parscale-tiny-p3'; did you mean"),
        ([], "give --recipe NAME"),
        ([*SMALL], "give --out DIR"),
        ([*SMALL, "--set", "colour=red"], "unknown recipe field 'colour'"),
        ([*SMALL, "--set", "model.colour=red"], "unknown config field model.colour"),
        ([*SMALL, "--set", "steps=few"], "steps='few'; expected an integer"),
        ([*SMALL, "--set", "preset=h100x99"], "unknown preset 'h100x99'"),
        ([*SMALL, "--set", "preset=cpu8_data", "--set", "batch=12"], "batch of 12 rows does not"),
        ([*SMALL, "--set", "length=65"], "length=65 exceeds the rotary range"),
        ([*SMALL, "--set", "attention=cudnn"], "attention='cudnn'"),
        ([*SMALL, "--set", "start_from=/nowhere"], "start_from='/nowhere' holds no finished"),
        ([*SMALL, "--set", "corpus=/nowhere"], "/nowhere"),
        (["--recipe", "parscale-tiny-stage2-p4"], "give --set start_from=DIR"),
        ([*SMALL, "--resume", "must"], "holds no checkpoint"),
    ],
)
@pytest.mark.devices(8)
def test_bad_input_is_one_line_and_code_2(script, no_compute, tmp_path, capsys, args, text):
    out = [] if args in ([], SMALL) else ["--out", tmp_path / "out"]
    assert call(script, *args, *out) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and text in said
    assert said.count("\n") == 1


def refused(script, capsys, *args):
    assert call(script, *args) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_an_empty_folder_is_no_corpus(script, no_compute, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    said = refused(
        script, capsys, *SMALL, f"--set=corpus={tmp_path}/empty", "--out", tmp_path / "o"
    )
    assert str(tmp_path / "empty") in said


def test_an_output_folder_that_cannot_be_written(script, no_compute, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    said = refused(script, capsys, *SMALL, "--out", tmp_path / "file" / "run")
    assert f"cannot write output folder {tmp_path}/file/run: Not a directory" in said


def test_a_checkpoint_of_another_model_or_recipe(script, finished, no_compute, capsys):
    said = refused(script, capsys, *SMALL, "--set", "model.depth=2", "--out", finished)
    assert "of another model: depth: saved 1, now 2" in said
    said = refused(script, capsys, *SMALL, "--seed", 3, "--set", "steps=9", "--out", finished)
    assert "of another recipe: steps: saved 6, now 9; seed: saved 0, now 3" in said
    said = refused(script, capsys, *SMALL, "--resume", "never", "--out", finished)
    assert "holds a checkpoint of step 6" in said


def test_a_run_that_does_not_converge_ends_with_code_1(script, tmp_path, capsys):
    args = ["--set", "z_loss=1e38", "--set", "max_nonfinite=2", "--out", tmp_path]
    assert call(script, *SMALL, *args) == 1
    assert "error: loss or gradient not finite for 2 steps in a row" in capsys.readouterr().err


# Processes of their own.


def start(*args, code=None, **environment):
    """The script in a process, with `code` run first in it."""
    program = ["-u", str(SCRIPTS / "train.py")]
    if code is not None:
        setup = f"import runpy, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nsys.argv[0] = 'train.py'"
        then = f"runpy.run_path({program[1]!r}, run_name='__main__')"
        program = ["-u", "-c", "\n".join([setup, code, then])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *program, *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def same_parameters(one, other):
    states = [nnx.to_flat_state(nnx.state(load_model(run))) for run in (one, other)]
    for (path, a), (_, b) in zip(*states, strict=True):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_0(tmp_path, number):
    # Many steps, of which the signal cuts off most.
    args = [*SMALL, "--set", "steps=100000", "--set", "log_every=50", "--out", tmp_path]
    process = start(*args)
    deadline = time.monotonic() + 120
    while not RunFolder(tmp_path).steps() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    step = int(re.search(r"stopped at step (\d+) of 100000, saved", said)[1])
    assert RunFolder(tmp_path).latest() == step


def test_a_url_is_no_folder_of_a_run(script, tmp_path, capsys, monkeypatch, no_compute):
    monkeypatch.chdir(tmp_path)
    assert call(script, *SMALL, "--out", "gs://bucket/run") == 2
    assert "is a URL; expected a path" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("place", ["localhost:1,2", "localhost:1,2,x"])
def test_places_among_processes(script, place, capsys):
    assert call(script, *SMALL, "--dry-run", "--distributed", place) == 2
    assert f"--distributed {place!r}; expected HOST:PORT,COUNT,INDEX" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = [*SMALL, "--set", "preset=any_fsdp", "--set", "export=false", "--out", tmp_path]
    places = [f"localhost:{port},2,{rank}" for rank in (0, 1)]
    both = [start(*args, "--distributed", place, XLA_FLAGS="") for place in places]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "after 6 steps, 768 tokens" in said[0][0]
    assert "loss" not in said[1][0]
    assert RunFolder(tmp_path).latest() == 6


# Kills its own process as soon as the save of step 4 is half-way: the directory exists, under its
# temporary name.
KILL = """
import os, signal
from hackle.zoo.train.checkpoint import Checkpoints
save = Checkpoints.save
def half(self, step, state, data):
    save(self, step, state, data)
    while step == 4:
        names = os.listdir(self.folder.checkpoints)
        if any(not name.isdecimal() for name in names) or "4" in names:
            os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = half
"""


def test_killed_during_a_save_it_resumes_from_the_last_complete_one(script, tmp_path, capsys):
    # Large enough that writing takes a while.
    args = [*SMALL, "--set", "vocab_size=40000", "--set", "model.width=32"]
    process = start(*args, "--out", tmp_path / "killed", code=KILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, errors
    names = os.listdir(tmp_path / "killed" / "checkpoints")
    assert "2" in names and "4" not in names and len(names) == 2
    assert RunFolder(tmp_path / "killed").steps() == [2]
    assert call(script, *args, "--out", tmp_path / "killed") == 0
    assert "resuming at step 2 of 6" in capsys.readouterr().out
    assert RunFolder(tmp_path / "killed").steps() == [4, 6]
    assert len(os.listdir(tmp_path / "killed" / "checkpoints")) == 2  # the half one is gone
    assert call(script, *args, "--out", tmp_path / "whole") == 0
    same_parameters(tmp_path / "killed", tmp_path / "whole")
