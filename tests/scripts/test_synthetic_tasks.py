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
    assert record["results"][0]["settings"]["epochs"] == 100
    assert "Rows of 2 tokens. Bound of the state matrices: none. The learning rate" in text
    assert record["results"][0]["checks"] == kept["checks"]

    assert call(script, *command, "--seed", 1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "parity-gru.json was made with seed=0; choose another --out" in error
    (out / "parity-gru.json").write_text(json.dumps(kept | {"parameters": 7}))
    assert call(script, *command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "parity-gru.json was made with parameters=7; choose another --out" in error


def test_settings_are_the_tasks_unless_given(script, tmp_path, monkeypatch):
    seen = []

    def result(name, setup, model, method, seconds):
        seen.append((name, setup.training.state_clip, setup.training.learning_rate))
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "result", result)
    for task, extra in [
        ("parity", []),
        ("1-hop", []),
        ("parity", ["--state-clip", "0.5", "--learning-rate", "0.1"]),
    ]:
        assert script.main(["--out", str(tmp_path), "--tasks", task, *extra]) == 130
    assert seen == [("parity", None, 5e-4), ("1-hop", 0.9, 3e-3), ("parity", 0.5, 0.1)]


def stub(script, monkeypatch, takes):
    """Trainings that take `takes` seconds of a clock of their own; returns what each was given."""
    clock, shares = [0.0], {}

    def result(name, setup, model, method, seconds):
        if takes is KeyboardInterrupt and len(shares) == 2:
            raise KeyboardInterrupt
        shares[name, model] = seconds
        clock[0] += takes[len(shares) - 1] if takes is not KeyboardInterrupt else 0
        check = {"epoch": 1, "loss": [0.5], "accuracy": [0.75]}
        return {"task": name, "model": model, "parameters": 1, "accuracy": [0.75], "seconds": 1,
                "checks": [check]}  # fmt: skip

    monkeypatch.setattr(script, "result", result)
    monkeypatch.setattr(script, "size", lambda *model: 1)
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    return shares


def test_time_is_shared_by_what_is_missing(script, tmp_path, monkeypatch, capsys):
    command = ["--out", str(tmp_path), "--tasks", "parity", "1-hop", "--models", "gru", "lstm"]
    shares = stub(script, monkeypatch, [5, 30, 70])
    assert script.main([*command, "--seconds", "100"]) == 0
    assert list(shares.values()) == [25, pytest.approx(95 / 3), 32.5]
    printed = capsys.readouterr()
    assert (
        "1-hop, lstm: no time left" in printed.err and "| 1-hop | gru | 1 | 75.00 |" in printed.out
    )
    shares = stub(script, monkeypatch, [1])
    assert script.main([*command, "--seconds", "100"]) == 0
    assert shares == {("1-hop", "lstm"): 100}


def test_an_interruption_keeps_what_is_done(script, tmp_path, monkeypatch, capsys):
    stub(script, monkeypatch, KeyboardInterrupt)
    command = ["--out", str(tmp_path), "--tasks", "parity", "--report"]
    monkeypatch.setattr(script.report.write, "__kwdefaults__", {"folder": tmp_path / "reports"})
    assert script.main(command) == 130
    printed = capsys.readouterr()
    assert "stopped; the same command goes on" in printed.err
    (page,) = (tmp_path / "reports").glob("*.md")
    for text in (printed.out, page.read_text()):
        assert "| parity | lstm | 1 |" in text and "| parity | transformer |" not in text
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "parity-gru.json",
        "parity-lstm.json",
    }


def test_a_training_ends_before_its_time_does(script, tmp_path, monkeypatch):
    """Checks at 30 s, with compilation, then every 10 s: the one at 70 s would be too late."""
    from hackle.zoo.tasks import training
    from hackle.zoo.tasks.setups import setup

    clock, ends = [0.0], []

    def train(make, task, settings, *, tell):
        for epoch, clock[0] in enumerate((30, 40, 50, 60, 70), 1):
            check = training.Check(epoch, [0.5], [0.5])
            if tell(check):
                ends.append(clock[0])
                break
        return training.Outcome([0.5], [check], None, clock[0])

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    for seconds in (65, 45, 20):
        clock[0] = 0.0
        script.result("parity", setup("parity"), "gru", None, seconds)
    assert ends == [60, 40, 30]


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
        (["--seconds", "0"], "--seconds 0; expected more than 0"),
        (["--method", "guess"], "method 'guess' is not one of"),
        (["--method", "fused"], "method 'fused' of a recurrence"),
    ],
)
def test_bad_options_end_with_one_line(script, tmp_path, extra, message, capsys):
    assert call(script, "--out", tmp_path / "out", *extra) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
