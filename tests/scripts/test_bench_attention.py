"""scripts/bench_attention.py: a speed only after its check, areas, the mask of the rival."""

import json

import numpy as np
import pytest
import torch

import hackle.layers
from tests.scripts.running import call, load

TINY = "--sizes 2x300 --heads 2x1x8 --dtype float32 --implementations xla".split()


@pytest.fixture(scope="module")
def script():
    return load("bench_attention")


@pytest.fixture(scope="module")
def rows(script):
    import attention_rows

    return attention_rows


@pytest.fixture(autouse=True)
def quick(script, tmp_path, monkeypatch):
    import attention_rival
    import clock
    import report

    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")  # the script would leave its own
    monkeypatch.setattr(clock, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(clock, "ROUNDS", 1)
    monkeypatch.setattr(attention_rival, "load", lambda: None)
    write = report.write
    monkeypatch.setattr(report, "write", lambda *a, **k: write(*a, **k, folder=tmp_path))


def rows_in(output):
    return [json.loads(x) for x in output.splitlines() if x.startswith('{"kind"')]


@pytest.mark.parametrize("length", [1, 7, 700])
@pytest.mark.parametrize("kind", ["causal", "branch", "quarter", "packed"])
def test_visible_pairs_are_counted(rows, kind, length):
    tokens = rows.Tokens.of(kind, length)
    assert tokens.pairs == np.asarray(tokens.mask().dense(length, length)).sum()


def test_areas_are_what_they_say(rows):
    area = lambda kind: rows.Tokens.of(kind, 32768).pairs / (32768 * 32769 / 2)
    assert area("causal") == 1 and abs(area("quarter") - 0.25) < 1e-3
    assert 0.9 < area("branch") < 1 and area("packed") < 0.5


def test_rows_have_errors_and_speeds(script, capsys, tmp_path):
    assert call(script, *TINY, "--kinds", "causal", "branch", "--report", "small") == 0
    output = capsys.readouterr().out
    found = rows_in(output)
    assert [row["kind"] for row in found] == ["causal", "branch"]
    for row in found:
        assert row["error"] < 1e-5 and row["gradient error"] < 1e-5
        assert row["forward ms"] > 0 and row["both TFLOP/s"] > 0 and row["both MiB"] >= 0
        flops = 2 * 2 * 2 * 2 * 8 * script.Tokens.of(row["kind"], 300).pairs  # 2 rows, 2 heads
        rate = flops / row["forward ms"] / 1e9
        np.testing.assert_allclose(row["forward TFLOP/s"], rate, rtol=1e-3)
    (path,) = tmp_path.glob("attention-small_*.md")
    assert "| branch | 2 | 300 | xla |" in path.read_text()


@pytest.mark.parametrize("wrong", ["output", "dkey"])
def test_a_wrong_result_has_no_speed(script, monkeypatch, capsys, wrong):
    import jax

    right = hackle.layers.attention

    def attention(query, key, value, **how):
        if wrong == "dkey":
            return right(query, jax.lax.stop_gradient(key), value, **how)
        return 1.1 * right(query, key, value, **how)

    monkeypatch.setattr(hackle.layers, "attention", attention)
    assert call(script, *TINY, "--kinds", "causal") == 1
    (row,) = rows_in(capsys.readouterr().out)
    assert f"{wrong} 1" in row["failed"] and "both ms" not in row
    assert ("forward ms" in row) == (wrong == "dkey")


def test_what_cannot_run_is_said(script, capsys):
    given = [*TINY[:-1], "pallas_tpu", "--kinds", "branch"]
    assert call(script, *given) == 0
    (row,) = rows_in(capsys.readouterr().out)
    assert "need a TPU" in row["skipped"] and "forward ms" not in row


@pytest.mark.parametrize(
    "change, message",
    [
        (["--heads", "3x2x8"], "3 query heads are no multiple of 2"),
        (["--implementations", "torch-flex"], "torch-flex needs PyTorch with a GPU"),
    ],
)
def test_bad_options(script, capsys, change, message):
    assert call(script, *TINY, *change) == 2
    assert message in capsys.readouterr().err


def test_time_runs_out(script, capsys):
    assert call(script, *TINY, "--seconds", "-1") == 0
    assert "4 rows were not started" in capsys.readouterr().out


def test_the_baseline_comes_first_and_is_divided_by(script):
    args = script.parser().parse_args(["--kinds", "branch", "causal"])
    args.implementations, args.heads, args.dtype = ["pallas_gpu", "cudnn"], (2, 1, 8), "bfloat16"
    cases = script.cases(args, (1, 64))
    assert [(c.kind, c.implementation) for c in cases] == [
        ("causal", "cudnn"), ("branch", "pallas_gpu"), ("causal", "pallas_gpu"),
    ]  # fmt: skip
    size = {"batch": 1, "length": 64, "failed": ""}
    times = [("causal", "cudnn", 2.0), ("branch", "pallas_gpu", 3.0), ("branch", "torch-flex", 4.0)]
    given = [size | {"kind": k, "implementation": i, "both ms": t} for k, i, t in times]
    found = script.with_ratios(given, "both")
    assert [row["over baseline"] for row in found] == [1.0, 1.5, 2.0]
    assert [row["over flex"] for row in found] == [None, 0.75, 1.0]
    assert script.with_ratios(given, "forward") == []


@pytest.mark.parametrize("kind", ["branch", "packed"])
def test_the_rival_has_the_same_mask_and_the_same_oracle(rows, kind):
    """Its mask is the dense one; its float32 attention of some rows, and gradients, are ours."""
    import attention_rival

    rival = attention_rival.Rival(torch, "cpu")
    tokens, length = rows.Tokens.of(kind, 700), 700
    index = torch.arange(length)
    visible = rival.visible(tokens)(index[:, None], index)
    np.testing.assert_array_equal(visible, tokens.mask().dense(length, length)[0])

    case = rows.Case(kind, 1, length, 4, 2, 8, "float32", "torch-flex")
    given = rows.arrays(case)
    at = rows.sampled_rows(length)
    query, key, value, dout = given
    want = rows.sampled_attention(query[:, at], key, value, tokens.mask(), at, dout[:, at])
    theirs = [torch.from_numpy(np.array(x).swapaxes(1, 2)) for x in given]
    out, gradients = rival.sampled(tokens, theirs[:3], theirs[3], torch.from_numpy(at))
    for x, y in zip((out, *gradients), want, strict=True):
        np.testing.assert_allclose(x.detach().numpy().swapaxes(1, 2), y, atol=5e-6)
