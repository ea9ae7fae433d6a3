"""The demo and the scripts behind it, with a few steps."""

import json

import pytest

from tests.scripts.running import call, load


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The demo's folder, and what it printed the first time."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert (
            call(load("demo"), "--out", out / "runs", "--data-dir", out / "data", "--steps", 2) == 0
        )
    return out, text.getvalue()


def test_the_demo_trains_both_compares_and_writes(made):
    out, text = made
    for streams in (1, 4):
        assert f"validation loss P={streams}: " in text
        assert f"what P = {streams} writes" in text
        assert (out / "runs" / f"p{streams}" / "model" / "model.safetensors").is_file()
        assert f"checkpoint P={streams}: {out}" in text
    assert "tokens/s" in text and "def read_lines(path):" in text
    assert (out / "runs" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "reused" not in text.split("=== comparison")[1]


def test_the_demo_reuses_what_is_finished(made, capsys):
    out, before = made
    args = ["--out", out / "runs", "--data-dir", out / "data", "--steps", 2]
    assert call(load("demo"), *args) == 0
    again = capsys.readouterr().out
    assert "reused: both models were trained by an earlier run" in again
    assert again.count("finished before") == 2
    same = [line for line in before.splitlines() if line.startswith("validation loss")]
    assert same == [line for line in again.splitlines() if line.startswith("validation loss")]


def test_the_demo_refuses_another_recipe_in_the_same_folder(made, capsys):
    out, _ = made
    args = ["--out", out / "runs", "--data-dir", out / "data", "--steps", 3]
    assert call(load("demo"), *args) == 2
    assert "steps" in capsys.readouterr().err


TINY = ["--set", "corpus=random", "--set", "steps=2", "--set", "warmup=1", "--set", "batch=8"]
TINY += ["--set", "length=16", "--set", "vocab_size=64", "--set", "model.depth=1"]


def test_comparison_writes_a_report(tmp_path, monkeypatch, capsys):
    script = load("compare_streams")
    monkeypatch.setattr(script.report.write, "__kwdefaults__", {"folder": tmp_path / "reports"})
    args = ["--recipe", "parscale-tiny", "--streams", 1, 2, *TINY, "--out", tmp_path / "runs"]
    assert call(script, *args, "--control", "--report", "--note", "Said so.") == 0
    (path,) = (tmp_path / "reports").glob("streams_*.md")
    text = path.read_text()
    record = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert [row["P"] for row in record["rows"]] == ["1", "2", "2-without-prefix"]
    one, two, control = (row["validation loss"] for row in record["rows"])
    assert control == pytest.approx(one, abs=1e-5) and two != pytest.approx(one, abs=1e-5)
    assert "Said so." in text
    assert record["rows"][1]["validation loss"] > 0 and record["versions"]["jax"]
    assert "| P | parameters | validation loss |" in text
    assert json.loads(capsys.readouterr().out.splitlines()[-2])["subject"] == "streams"


def test_comparison_wants_the_same_tokens():
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.recipes import tiny

    script = load("compare_streams")
    with pytest.raises(UserError, match="do not see the same tokens"):
        script.compare({"1": tiny(1), "2": tiny(2).replace(seed=1)}, None)
