"""scripts/compare_runs.py: tables of finished runs."""

import json

import pytest

from tests.scripts.running import call, load


@pytest.fixture
def script(tmp_path, monkeypatch):
    loaded = load("compare_runs")
    import report

    write = report.write
    monkeypatch.setattr(report, "write", lambda *a, **k: write(*a, **k, folder=tmp_path))
    return loaded


def made(folder, losses, **summary):
    folder.mkdir()
    lines = [{"step": s, "tokens": 8 * s, "loss": x} for s, x in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_table_and_report(script, tmp_path, capsys):
    one = made(tmp_path / "one", {1: 5.0, 2: 4.0, 3: 3.0}, tokens_per_second=1234.4, mfu=0.5)
    two = made(tmp_path / "two", {1: 5.0, 2: 4.25, 4: 9.0})
    assert call(script, one, two, "--report", "pair") == 0
    out = capsys.readouterr().out
    assert "| one | 3 | 5 | 3 | - | 1,234 | 50 | 0.0e+00 |" in out
    assert "| two | 4 | 5 | 9 | - | - | - | 2.5e-01 |" in out
    assert (one / "compared.png").exists()
    (page,) = tmp_path.glob("pair_*.md")
    assert "| 2 | 4.00000 | 4.25000 |" in page.read_text()


def test_first_steps_alone(script, tmp_path, capsys):
    one = made(tmp_path / "one", {1: 5.0, 2: 4.0})
    two = made(tmp_path / "two", {1: 5.0, 2: 4.25})
    assert call(script, one, two, "--steps", 1) == 0
    assert "| two | 1 | 5 | 5 | - | - | - | 0.0e+00 |" in capsys.readouterr().out


def test_what_is_no_run_is_refused(script, tmp_path, capsys):
    one = made(tmp_path / "one", {1: 5.0})
    (tmp_path / "sub").mkdir()
    same = made(tmp_path / "sub" / "one", {1: 5.0})
    for arguments, message in (
        ((one, tmp_path / "none"), "none holds no losses"),
        ((one, same), "told apart by the names"),
        ((one, "--steps", 0), "--steps 0; expected at least 1"),
    ):
        assert call(script, *arguments) == 2
        assert message in capsys.readouterr().err
