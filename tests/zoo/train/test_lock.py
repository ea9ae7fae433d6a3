"""One process at a time trains in a folder, and a folder outlives its processes."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hackle.zoo.errors import UserError
from hackle.zoo.train.lock import locked
from hackle.zoo.train.loop import run
from hackle.zoo.train.step import Program
from tests.zoo.train.small import recipe

ROOT = Path(__file__).resolve().parents[3]

HOLDER = """
import pathlib, sys, time
from hackle.zoo.train.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_it_ends(tmp_path, monkeypatch):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "inside\n"
        with monkeypatch.context() as patch:
            patch.setattr(Program, "init", None)  # refused before any compute
            with pytest.raises(UserError, match=f"out='{tmp_path}': another process trains there"):
                run(recipe(), tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path):  # a run goes on: test_killed_during_a_save
        pass


def test_a_run_holds_its_folder_to_the_end_and_no_longer(tmp_path, monkeypatch):
    refused = []
    step = Program.step

    def watched(self, state, batch):
        with pytest.raises(UserError, match="another process trains there"), locked(tmp_path):
            pass
        refused.append(True)
        return step(self, state, batch)

    monkeypatch.setattr(Program, "step", watched)
    run(recipe(steps=2), tmp_path, say=lambda _: None)
    assert len(refused) == 2
    with locked(tmp_path):
        pass


def test_the_first_process_of_a_run_holds_for_all(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with locked(tmp_path):
        (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path} cannot be locked") and "No locks available" in said
