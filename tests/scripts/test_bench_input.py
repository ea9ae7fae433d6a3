"""scripts/bench_input.py: a speed only after a green gate, one line for a bad option."""

import json

import pytest

from hackle.zoo.data import reference
from tests.scripts.running import load


@pytest.fixture(scope="module")
def script():
    return load("bench_input")


@pytest.fixture
def options(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.py").write_text(f"value_{i} = {i}\n" * (3 * i + 1))
    return (
        f"--corpus {folder} --data-dir {tmp_path / 'data'} --vocab-size 270 --batch 2 --length 8 "
        "--windows 2 --seconds 0.05 --hardware testbox"
    ).split()


@pytest.fixture(autouse=True)
def root(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    return tmp_path


def test_speed_report_and_json(script, options, root, capsys):
    assert script.main([*options, "--packing", "stream", "--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["tokens_per_second"] > 0 and result["packing"] == "stream"
    assert any(line.startswith("gate: ") for line in lines)
    (page,) = (root / "reports").glob("input_testbox_*.md")
    assert f"| tokens per second | {result['tokens_per_second']:,} |" in page.read_text()


def test_no_speed_when_rows_are_wrong(script, options, monkeypatch, capsys):
    right = reference.pack

    def wrong(documents, length, packing="documents"):
        rows = right(documents, length, packing)
        rows[-1][1][0] += 1
        return rows

    monkeypatch.setattr(reference, "pack", wrong)
    with pytest.raises(AssertionError, match="is not the reference packer's"):
        script.main(options)
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--corpus nowhere", "data folder nowhere does not exist"),
        ("--length 1", "length 1 is too small"),
        ("--packing best", "unknown packing 'best'"),
        ("--cores 9999", "--cores 9999: expected 1 to"),
        ("--windows 0", "--windows 0 is too small"),
    ],
)
def test_bad_options_end_with_one_line(script, options, extra, message, capsys):
    import cli

    assert cli.call(lambda: script.main([*options, *extra.split()])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
