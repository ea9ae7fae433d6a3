"""Whole runs in seconds: resuming, stopping, aborting, two stages, what is written."""

import json
import logging
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from hackle import zoo
from hackle.zoo.errors import UserError
from hackle.zoo.parscale import is_stream_parameter
from hackle.zoo.train import corpora, loop, source
from hackle.zoo.train.checkpoint import RunFolder, load_model
from hackle.zoo.train.loop import NonFiniteError, Rate, run
from hackle.zoo.train.plan import Plan
from hackle.zoo.train.report import read_metrics
from hackle.zoo.train.step import Program
from tests.zoo.train.small import VOCAB, recipe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Fields of a recipe on a folder of small Python files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        lines = [
            f"def f{index}_{k}(x):\n    return x * {k * index}\n" for k in range(index % 7 + 3)
        ]
        (folder / f"m{index}.py").write_text("\n".join(lines), encoding="utf-8")
    data = tmp_path_factory.mktemp("data")
    return {"corpus": str(folder), "data_dir": str(data), "vocab_size": 300, "length": 32}


@pytest.fixture
def lines():
    return []


def stop_at(monkeypatch, step):
    monkeypatch.setattr(loop.Stop, "agreed", lambda self, at: at >= step)


def watch_batches(monkeypatch):
    """The tokens of every training step, as they reach it."""
    seen = []
    step = Program.step

    def watched(self, state, batch):
        seen.append(np.array(batch["tokens"]))
        return step(self, state, batch)

    monkeypatch.setattr(Program, "step", watched)
    return seen


def state_of(folder, it):
    from hackle.zoo.train.checkpoint import Checkpoints
    from hackle.zoo.train.plan import Plan

    program = Plan(it).program
    reader = Checkpoints(RunFolder(folder), {}, keep=2)
    state = reader.restore(it.steps, program.abstract, program.shardings)
    reader.close()
    return jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))


def test_twenty_steps_equal_ten_and_resume_and_ten(corpus, tmp_path, monkeypatch, lines):
    it = recipe(**corpus, steps=20, save_every=7, accumulate=2, eval_every=5)
    batches = watch_batches(monkeypatch)
    whole = run(it, tmp_path / "whole", say=lines.append)
    together = batches.copy()
    batches.clear()
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        stopped = run(it, tmp_path / "parts", say=lines.append)
    assert (stopped.step, stopped.stopped, stopped.finished) == (10, True, False)
    rest = run(it, tmp_path / "parts", say=lines.append, resume="must")
    assert "resuming at step 10 of 20" in lines
    assert len(batches) == len(together) == 20
    np.testing.assert_array_equal(batches, together)
    assert len({batch.tobytes() for batch in batches}) == 20
    parts, all_at_once = (state_of(tmp_path / name, it) for name in ("parts", "whole"))
    if jax.default_backend() != "cpu":
        # A GPU adds the gradients of the table in no fixed order: equal only up to rounding.
        chex.assert_trees_all_close(parts, all_at_once, rtol=1e-3, atol=1e-4)
        return
    chex.assert_trees_all_equal(parts, all_at_once)
    assert (rest.loss, rest.validation_loss) == (whole.loss, whole.validation_loss)

    def numbers(folder):
        keep = ("step", "loss", "grad_norm", "learning_rate", "validation_loss")
        return [{k: e[k] for k in keep if k in e} for e in read_metrics(folder)]

    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_a_finished_run_is_left_alone(tmp_path, monkeypatch, lines):
    first = run(recipe(steps=2), tmp_path, say=lines.append)
    assert first.finished and not first.already
    monkeypatch.setattr(Program, "step", None)
    again = run(recipe(steps=2), tmp_path, say=lines.append)
    assert again.already
    assert again.loss == first.loss
    assert lines[-1].startswith("finished before:")


def test_what_a_run_leaves(corpus, tmp_path, lines):
    it = recipe(**corpus, steps=4, eval_every=2, eval_batches=2, export=True)
    summary = run(it, tmp_path, say=lines.append)
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 4
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    entries = read_metrics(tmp_path)
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in entries if "validation_loss" in e] == [2, 4]
    assert entries[-1]["validation_loss"] == summary.validation_loss
    # The model is that of the checkpoint, in the published layout, with its tokenizer.
    exported = zoo.from_pretrained(tmp_path / "model")
    chex.assert_trees_all_equal(nnx.state(exported), nnx.state(load_model(tmp_path)))
    tokenizer = (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert tokenizer == (tmp_path / "tokenizer.json").read_bytes()  # for what is exported later
    for said in (
        "data: ",
        "model: parscale-tiny-p2 (2 streams)",
        "mesh: cpu1",
        "dtypes: ",
        "plan: 4 steps",
    ):
        assert any(line.startswith(said) for line in lines), said


def test_validation_is_the_mean_over_targets(corpus, tmp_path, lines):
    it = recipe(**corpus, steps=1, warmup=0, eval_batches=3)
    summary = run(it, tmp_path, say=lines.append)
    model = load_model(tmp_path)
    nll = count = 0.0
    for batch in source.Source(it).validation():
        scores = jax.nn.log_softmax(
            model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        )
        ids = batch["segment_ids"]
        counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
        chosen = np.take_along_axis(np.asarray(scores)[:, :-1], batch["tokens"][:, 1:, None], -1)
        nll -= (chosen[..., 0] * counts).sum()
        count += counts.sum()
    assert summary.validation_loss == pytest.approx(nll / count, rel=1e-5)


def spoil(monkeypatch, steps):
    """Random batches of these steps (from 0) get a token that the model does not have."""
    following = corpora.RandomBatches.__next__

    def spoiled(self):
        index = self._index
        batch = following(self)
        if index in steps and self._salt == 0:
            batch["tokens"][0, 0] = VOCAB
        return batch

    monkeypatch.setattr(corpora.RandomBatches, "__next__", spoiled)


def test_too_many_bad_steps_end_the_run_and_leave_the_checkpoint(tmp_path, monkeypatch, lines):
    spoil(monkeypatch, range(3, 99))
    it = recipe(steps=20, max_nonfinite=3, save_every=2, eval_batches=0)
    with pytest.raises(NonFiniteError, match="3 steps in a row, up to step 6; last good .* step 2"):
        run(it, tmp_path, say=lines.append)
    # Step 4 was due for saving, but was already in the bad stretch.
    assert RunFolder(tmp_path).steps() == [2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(load_model(tmp_path))))
    # Once the data are good, it goes on from there.
    monkeypatch.undo()
    assert run(it, tmp_path, say=lines.append).finished


def test_a_summary_is_json_whatever_the_last_loss(tmp_path, monkeypatch, lines):
    spoil(monkeypatch, {5})
    summary = run(recipe(max_nonfinite=3), tmp_path, say=lines.append)
    assert np.isnan(summary.loss)
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_a_few_bad_steps_are_skipped(tmp_path, monkeypatch, lines, capsys):
    spoil(monkeypatch, {1, 2})
    summary = run(recipe(max_nonfinite=3, save_every=2), tmp_path, say=lines.append)
    assert summary.finished and summary.skipped == 2
    assert np.isfinite(summary.loss)
    assert "step 3: loss or gradient not finite, skipped (2 in a row)" in capsys.readouterr().err
    # A save that falls on a bad step waits for the next good one.
    assert RunFolder(tmp_path).steps() == [4, 6]


def test_two_stages(corpus, tmp_path, monkeypatch, lines):
    common = {**corpus, "eval_batches": 0}
    one = recipe(**common, model="parscale-tiny-p1", schedule="wsd", steps=4)
    run(one, tmp_path / "trunk", say=lines.append)
    trunk = dict(nnx.to_flat_state(nnx.state(load_model(tmp_path / "trunk"))))
    batches = watch_batches(monkeypatch)
    two = recipe(
        **common, start_from=str(tmp_path / "trunk"), steps=2, warmup=0, mode="frozen_trunk"
    )
    run(two, tmp_path / "streams", say=lines.append)
    for path, value in nnx.to_flat_state(nnx.state(load_model(tmp_path / "streams"))):
        if is_stream_parameter(path):
            assert path not in trunk
        else:
            np.testing.assert_array_equal(value[...], trunk[path][...])
    # The data go on after those of stage 1.
    after = source.Source(one).train()
    for _ in range(4):
        next(after)
    for batch in batches:
        np.testing.assert_array_equal(batch, next(after)["tokens"])
    with pytest.raises(UserError, match="data cannot go on from .*: batch: saved 8, now 16"):
        run(two.replace(batch=16), tmp_path / "other", say=lines.append)
    more = Path(corpus["corpus"]) / "more.py"
    more.write_text("x = 1\n")
    with monkeypatch.context() as patch:
        patch.setattr(Program, "init", None)  # nothing is computed before
        with pytest.raises(UserError, match="data cannot go on from .*: the corpus has changed"):
            run(two, tmp_path / "other", say=lines.append)
    more.unlink()
    with pytest.raises(UserError, match="is no trunk of this model: width: saved 16, now 32"):
        run(two.replace(overrides={"width": 32}), tmp_path / "other", say=lines.append)
    with pytest.raises(UserError, match="has 2 streams; expected 1"):
        run(two.replace(start_from=str(tmp_path / "streams")), tmp_path / "other", say=lines.append)
    plan = Plan(two.replace(remat="full", attention="xla"))
    model = plan.program.model(plan.program.abstract)
    assert (model.remat, model.config.remat, model.config.attention) == ("full", "full", "xla")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        run(one, tmp_path / "half", say=lines.append)
    with pytest.raises(UserError, match="stopped at step 2 of 4; finish it first"):
        run(two.replace(start_from=str(tmp_path / "half")), tmp_path / "other", say=lines.append)
    anew = two.replace(batch=16, continue_data=False)
    assert run(anew, tmp_path / "anew", say=lines.append).finished


def test_a_run_stops_when_its_time_is_over_and_goes_on(tmp_path, lines):
    stopped = run(recipe(), tmp_path, say=lines.append, seconds=0.0)
    assert (stopped.step, stopped.stopped) == (0, True)
    assert run(recipe(), tmp_path, say=lines.append, seconds=1e6).finished
    assert "resuming at step 0 of 6" in lines


def test_resume_says_what_it_wants(tmp_path, lines):
    with pytest.raises(UserError, match="resume=must, but .* holds no checkpoint"):
        run(recipe(), tmp_path, resume="must")
    run(recipe(steps=2), tmp_path, say=lines.append)
    with pytest.raises(UserError, match="resume=never, but .* holds a checkpoint of step 2"):
        run(recipe(steps=2), tmp_path, resume="never")
    with pytest.raises(UserError, match="resume='maybe'; expected one of auto, must, never"):
        run(recipe(), tmp_path, resume="maybe")


def test_an_error_of_the_data_ends_the_run(tmp_path, monkeypatch, lines):
    def broken(self):
        raise OSError("disk is gone")

    monkeypatch.setattr(corpora.RandomBatches, "__next__", broken)
    with pytest.raises(OSError, match="disk is gone"):
        run(recipe(), tmp_path, say=lines.append)


def test_the_prefetched_state_is_that_of_the_batch_taken():
    batches = corpora.RandomBatches(recipe(), 0)
    prefetch = source.Prefetch(batches, lambda batch: batch, ahead=3)
    assert prefetch.state == {"next": 0}
    first = next(prefetch)
    assert prefetch.state == {"next": 1}
    again = corpora.RandomBatches(recipe(), 0)
    np.testing.assert_array_equal(next(again)["tokens"], first["tokens"])
    again.set_state(prefetch.state)
    np.testing.assert_array_equal(next(again)["tokens"], next(prefetch)["tokens"])
    prefetch.close()
    assert not prefetch._thread.is_alive()


def test_only_plain_steps_count_for_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    rate = Rate()
    rate.restart(0.0)
    waited = 0.0
    for seconds, waiting in ((50.0, 9.0), (2.0, 0.5), (2.0, 0.5)):
        now[0] += seconds
        waited += waiting
        rate.step(100, waited)
    now[0] += 1000.0
    rate.restart(waited)
    now[0] += 7.0
    rate.step(100, waited)
    assert rate.mean() == rate.recent() == 50.0
    assert rate.wait_share() == 0.25


def test_orbax_is_quiet(tmp_path, lines, caplog):
    with caplog.at_level(logging.INFO):
        run(recipe(steps=2), tmp_path, say=lines.append)
    assert not [record for record in caplog.records if record.name == "absl"]


def test_without_keeping_nothing_is_saved(tmp_path, monkeypatch, lines):
    stop_at(monkeypatch, 3)
    summary = run(recipe(keep=0), tmp_path, say=lines.append)
    assert summary.stopped and summary.checkpoint is None
    assert RunFolder(tmp_path).steps() == []
    assert lines[-1] == "stopped at step 3 of 6, nothing saved"
