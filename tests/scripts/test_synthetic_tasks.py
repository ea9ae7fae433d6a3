"""scripts/synthetic_tasks.py: results are kept and reused, a report with its picture."""

import json

import pytest

from tests.scripts.running import call, load

TINY = (
    "--length 2 --batch 8 --train-rows 64 --held-out-rows 50 --test-rows 100 --seeds 2 "
    "--epochs 100 --learning-rate 1e-2 --check-every 5"
).split()


@pytest.fixture(scope="module")
def script():
    return load("synthetic_tasks")


def test_table_report_and_picture(script, tmp_path, monkeypatch, capsys):
    import report

    monkeypatch.setattr(report.write, "__kwdefaults__", {"folder": tmp_path / "reports"})
    out = tmp_path / "out"
    command = ["--out", out, "--tasks", "parity", "--models", "gru", "transformer", *TINY]
    assert call(script, *command) == 0
    printed = capsys.readouterr().out
    assert "| parity | gru | 3,840 | 100 |" in printed
    assert (out / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((out / "parity-gru.json").read_text())
    assert max(kept["accuracy"]) == 1 and len(kept["accuracy"]) == 2
    assert kept["checks"][-1]["epoch"] % 5 == 0

    # The same again trains nothing, and can write the report.
    monkeypatch.setattr(script, "result", None)
    assert call(script, *command, "--report", "--note", "A note.") == 0
    (page,) = (tmp_path / "reports").glob("synthetic_cpu_*.md")
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    text = page.read_text()
    assert "| parity | gru | 3,840 | 100 |" in text and "\n\nA note.\n\n" in text
    record = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert [found["model"] for found in record["results"]] == ["gru", "transformer"]
    assert record["settings"]["epochs"] == 100
    assert record["results"][0]["checks"] == kept["checks"]

    assert call(script, *command, "--seed", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "parity-gru.json was made with seed=0; choose another --out" in error


def test_the_papers_clip_is_the_tasks_unless_given(script, tmp_path, monkeypatch):
    seen = []

    def result(name, setup, model, settings, method):
        seen.append((name, settings.state_clip))
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "result", result)
    for task, extra in [("parity", []), ("1-hop", []), ("parity", ["--state-clip", "0.5"])]:
        with pytest.raises(KeyboardInterrupt):
            script.main(["--out", str(tmp_path), "--tasks", task, *extra])
    assert seen == [("parity", None), ("1-hop", 0.9), ("parity", 0.5)]


def test_a_long_record_is_thinned_and_percents_are_rounded_down(script):
    checks = [{"epoch": epoch} for epoch in range(1, 203)]
    epochs = [check["epoch"] for check in script.few({"checks": checks})]
    assert epochs[:2] == [1, 6] and epochs[-2:] == [201, 202] and len(epochs) == 42
    assert script.percent(1.0) == "100" and script.percent(0.999999) == "99.99"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "parity", "pairity"], "unknown task 'pairity'; did you mean parity"),
        (["--models", "rnn"], "unknown model 'rnn'; expected one of gru, lstm, transformer"),
        (["--tasks", "recall", "--length", "7"], "recall: pairs=2; expected 1 to 1"),
        (["--epochs", "0"], "epochs=0; expected at least 1"),
        (["--method", "guess"], "method 'guess' is not one of"),
        (["--method", "fused"], "method 'fused' of a recurrence"),
    ],
)
def test_bad_options_end_with_one_line(script, tmp_path, extra, message, capsys):
    assert call(script, "--out", tmp_path / "out", *extra) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
