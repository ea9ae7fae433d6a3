"""scripts/bench_train.py: a speed only after its check, models of every family, bad input."""

import json

import jax
import pytest

from tests.scripts.running import call, load


@pytest.fixture(scope="module")
def script():
    return load("bench_train")


def rows_in(output):
    return [json.loads(x) for x in output.splitlines() if x.startswith('{"model"')]


def test_measures_and_checks(script, capsys):
    case = "parscale-tiny-p2,batch=8,length=16,remat=none"
    assert call(script, "--preset", "any_data", "--steps", 1, "--case", case) == 0
    (row,) = rows_in(capsys.readouterr().out)
    assert row["tokens/s"] > 0
    assert (row["MFU %"] is None) == (jax.default_backend() == "cpu"), "a CPU has no known peak"


def test_a_recurrence_is_measured_and_its_row_says_in_how_many_parts(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script.report.write, "__kwdefaults__", {"folder": tmp_path})
    case = "pararnn-tiny-gru,batch=16,length=8,accumulate=2"
    assert call(script, "--preset", "any_data", "--steps", 1, "--case", case, "--report") == 0
    (row,) = rows_in(capsys.readouterr().out)
    assert row["tokens/s"] > 0 and 0 < float(row["check"]) < 2e-3 and row["accumulate"] == 2
    (page,) = tmp_path.glob("train_*.md")
    assert "| pararnn-tiny-gru | 16 | 8 | dots | 2 |" in page.read_text()


def test_no_speed_while_the_check_is_red(script, monkeypatch, capsys):
    from hackle.layers.attention import cudnn, xla

    for implementation in (xla, cudnn):

        def wrong(query, *args, right=implementation.attend):
            # Only the fast side of the check computes in bf16.
            factor = 30 if query.dtype == "bfloat16" else 1
            return jax.tree.map(lambda out: out * factor, right(query, *args))

        monkeypatch.setattr(implementation, "attend", wrong)
    with pytest.raises(SystemExit, match="no timing"):
        script.main(["--preset", "any_data", "--case", "parscale-tiny-p2,batch=8,length=16"])
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.parametrize("model", ["dense-tiny", "pararnn-tiny-gru"])
def test_the_check_computes_in_float32_where_parameters_are_bfloat16(script, monkeypatch, model):
    from hackle import pjit_configs
    from hackle.layers.language_model import LanguageModel
    from hackle.pjit_configs.precision import PRECISIONS

    right, seen = LanguageModel.logits, []

    def logits(self, features):
        kept = self.embedding.weight[...].dtype
        seen.append((str(features.dtype), str(kept), jax.config.jax_default_matmul_precision))
        return right(self, features)

    monkeypatch.setattr(LanguageModel, "logits", logits)
    preset = pjit_configs.preset("any_data").replace(precision=PRECISIONS["bfloat16"])
    case = script.Case(model, batch=8, length=16)
    with jax.default_matmul_precision("default"):
        assert 0 < script.gate(case, preset, preset.mesh(), None) < 2e-3
    assert list(dict.fromkeys(seen)) == [
        ("bfloat16", "bfloat16", "default"),
        ("float32", "bfloat16", "highest"),
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "parscale-tiny-p2,rows=3"], "--case field 'rows=3'"),
        (["--case", "parscale-tiny-p2,batch=x"], "batch='x' is not a number"),
        (["--case", "parscale-tiny-p2,length=16,remat=some"], "remat='some' is not one of"),
        (["--case", "no-such-model"], "no-such-model"),
        (["--case", "parscale-tiny-p2,length=9999"], "rotary range"),
        (["--case", "parscale-tiny-p2", "--preset", "h100"], "unknown preset"),
        (["--case", "parscale-tiny-p2", "--steps", "0"], "--steps must be >= 1"),
        (["--case", "dense-tiny,length=16", "--attention", "best"], "implementation 'best'"),
        (["--case", "dense-tiny,length=16", "--attention", "pallas_tpu"], "need a TPU"),
        (
            ["--attention", "xla", "--case", "dense-tiny,length=16", "--case", "pararnn-tiny-gru"],
            "pararnn-tiny-gru: attention='xla': ParaRNNConfig has no attention",
        ),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_bad_input_is_refused_before_anything_runs(script, monkeypatch, args, message, capsys):
    monkeypatch.setattr(script, "gate", lambda *_: pytest.fail("it ran"))
    assert call(script, *args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
