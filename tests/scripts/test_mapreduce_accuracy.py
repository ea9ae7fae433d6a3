"""scripts/mapreduce_accuracy.py: both twins are trained, solve in turns, and are reported."""

import json

import pytest

from hackle.zoo.train.checkpoint import RunFolder
from tests.scripts.running import call, load
from tests.zoo.mapreduce.test_evaluation import Teacher

TINY = [
    f"--set={pair}"
    for pair in (
        "model.width=16", "model.mlp_width=24", "model.depth=1", "model.heads=2",
        "model.kv_heads=2", "model.head_width=8", "length=256", "batch=4", "steps=2", "warmup=1",
        "eval_batches=1", "save_every=0",
    )
]  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """The script with decoders that know the answers, but for the parallel one's second."""
    from hackle.zoo.mapreduce import evaluation

    decoders = {
        "parallel": lambda model, max_new_tokens: Teacher(True, wrong={1}),
        "sequential": lambda model, max_new_tokens: Teacher(False),
    }
    monkeypatch.setattr(evaluation, "DECODERS", decoders)
    return load("mapreduce_accuracy")


def test_training_solving_and_report(script, tmp_path, monkeypatch, capsys):
    import report

    monkeypatch.setattr(report.write, "__kwdefaults__", {"folder": tmp_path / "reports"})
    out = tmp_path / "out"
    command = ["--out", out, "--problems", 6, *TINY, f"--set=data_dir={tmp_path / 'data'}"]
    # No time at all: nothing is trained, and the same command goes on.
    assert call(script, *command, "--seconds", 0) == 0
    assert "stopped; the same command goes on" in capsys.readouterr().out
    first = out / "seed-0"
    assert not (first / "parallel.jsonl").exists()
    assert call(script, *command) == 0
    printed = capsys.readouterr().out
    assert "| all | parallel | 6 | 83.33 | 100 |" in printed
    assert "| all | sequential | 6 | 100 | 100 |" in printed
    assert "| table | parallel | 2 | 50 | 100 |" in printed
    assert "on 6 problems that both were given: -16.67 % (standard error 15.21" in printed
    assert len((first / "parallel.jsonl").read_text().splitlines()) == 6

    # The same runs in another folder, and a report.
    again = ["--out", tmp_path / "again", "--runs", first / "parallel", first / "sequential"]
    assert call(script, *again, "--problems", 6, "--report", "--note", "A note.") == 0
    (page,) = (tmp_path / "reports").glob("mapreduce_cpu_*.md")
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert "| all | parallel | 6 | 83.33 | 100 |" in text and "\n\nA note.\n\n" in text
    assert "Validation over the training:" in text and "<Think><Parallel>" in text
    record = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert record["recipe"]["corpus"] == "mapreduce-easy"
    assert record["curves"][-1]["step"] == 2 and record["curves"][-1]["parallel loss"] > 0

    swapped = ["--out", tmp_path / "again", "--runs", first / "sequential", first / "parallel"]
    assert call(script, *swapped) == 2
    assert "expected generated problems with packing='branches'" in capsys.readouterr().err
    assert call(script, *again, *again[2:]) == 2
    assert "two pairs of seed 0; expected another seed for each" in capsys.readouterr().err
    # Outcomes are of one limit, and of these runs.
    assert call(script, *again, "--max-new-tokens", 10) == 2
    assert "holds outcomes of other runs or limits" in capsys.readouterr().err

    # A second pair: the first is not trained again, and the table has both.
    trained = (first / "parallel" / "summary.json").read_bytes()
    assert call(script, *command, "--seeds", 2) == 0
    printed = capsys.readouterr().out
    assert "| all | parallel | 12 | 83.33 | 100 |" in printed
    assert "| seed 1 | parallel | 6 | 83.33 | 100 |" in printed
    assert "means over the seeds, on 6 problems that both were given: -16.67 % (" in printed
    assert len((out / "seed-1" / "sequential.jsonl").read_text().splitlines()) == 6
    assert (first / "parallel" / "summary.json").read_bytes() == trained

    # A run that stopped before its end is none to compare.
    saved = RunFolder.identity

    def longer(self, step):
        found = saved(self, step)
        return found | {"recipe": found["recipe"] | {"steps": 3}}

    monkeypatch.setattr(RunFolder, "identity", longer)
    assert call(script, *again) == 2
    assert "stopped at step 2; expected a run of all 3 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--problems", "0"], "problems=0; expected at least 1"),
        (["--seeds", "0"], "seeds=0; expected at least 1"),
        (["--seconds", "-5"], "seconds=-5; expected at least 0"),
        (["--max-new-tokens", "2048"], "max_new_tokens=2048; expected at most 20"),
        (["--recipe", "multiverse-smal"], "unknown recipe 'multiverse-smal'; did you mean"),
        (["--runs", "a", "b"], "a holds no checkpoint of a run"),
        (["--set", "corpus=python"], "corpus='python' with packing='branches'; expected one of ma"),
        (
            ["--recipe", "multiverse-tiny-sequential"],
            "with packing='documents'; expected one of mapreduce, mapreduce-easy, ",
        ),
        (["--recipe", "multiverse-tiny", "--runs", "a", "b"], "--recipe is for training; expected"),
        (
            ["--seeds", "2", "--runs", "a", "b"],
            "--seeds is for training; expected none with --runs",
        ),
    ],
)
def test_bad_options_end_with_one_line(script, tmp_path, extra, message, capsys):
    assert call(script, "--out", tmp_path / "out", *extra) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
