"""scripts/bench_branches.py: a speed only after a green check, one line for a bad option."""

import json

import pytest

from tests.scripts.running import call, load

SMALL = "--model dense-tiny --dtype float32 --prompt 5 --tokens 4 --paths 2".split()


@pytest.fixture(scope="module")
def script():
    return load("bench_branches")


def test_speed_and_report(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.report.write, "__kwdefaults__", {"folder": tmp_path})
    assert call(script, *SMALL, "--report") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    # The tag, the index and its colon are the decoder's; the last tokens are no step's input.
    assert row["new tokens"] == 2 * (4 + 3) and row["steps"] == 4
    assert row["side by side / one by one"] > 0
    assert row["side by side ms"] > 0 and row["one by one ms"] > 0 and row["short"] < 1e-3
    (page,) = tmp_path.glob("branches_*.md")
    assert "| paths | tokens |" in page.read_text()


def test_no_speed_for_paths_that_see_each_other(script, monkeypatch, capsys):
    from hackle.zoo.generate.draft import Draft

    right = Draft.structure

    def leaking(draft, depth):
        found = right(draft, depth)
        return found._replace(path=found.path * 0 + 1)

    monkeypatch.setattr(Draft, "structure", leaking)
    assert call(script, *SMALL, "--tokens", 12) == 1
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert "falls short" in row["failed"] and "one by one ms" not in row


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "dense-tin"], "dense-tiny"),
        (["--model", "pararnn-tiny-gru"], "no cache for branches"),
        (["--paths", "1"], "--paths"),
        (["--tokens", "0"], "--tokens"),
        (["--paths", "30", "--tokens", "100"], "--paths 30, --tokens 100 and --prompt 5 are"),
    ],
)
def test_bad_options(script, extra, message, capsys):
    assert call(script, *SMALL, *extra) == 2
    assert message in capsys.readouterr().err
