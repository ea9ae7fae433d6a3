"""The loop around the step: data, validation, checkpoints, metrics, signals."""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from hackle.zoo.errors import UserError
from hackle.zoo.local_path import local_path
from hackle.zoo.train.checkpoint import Checkpoints, RunFolder, check_identity, with_shardings
from hackle.zoo.train.lock import locked
from hackle.zoo.train.metrics import mfu
from hackle.zoo.train.plan import Plan
from hackle.zoo.train.recipe import Recipe
from hackle.zoo.train.report import (
    PLOT,
    MetricsLog,
    Progress,
    Silent,
    as_json,
    plot_losses,
    progress_text,
    read_metrics,
)
from hackle.zoo.train.source import Prefetch, Source, place
from hackle.zoo.train.step import Metrics, TrainState

RESUME = ("auto", "must", "never")


class NonFiniteError(RuntimeError):
    """The loss or the gradient was not finite for too many steps in a row."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended; also OUT/summary.json.

    Attributes:
      step: steps done, of `steps`.
      stopped: by a signal, before the end; the same call goes on.
      already: it was finished before this call, which did nothing.
      loss: of the last training step, mean nats a token.
      validation_loss: at the end, or None.
      tokens: seen so far, padding too.
      tokens_per_second: of this call, without compilation, validation and saving.
      mfu: share of the peak; None where the peak is not known.
      input_wait: share of the time of steps that the loop waited for data.
      skipped: steps without a finite loss and gradient.
      seconds: of this call.
      model, plot, checkpoint: paths, or None where there is none.
    """

    step: int
    steps: int
    stopped: bool
    already: bool
    loss: float | None
    validation_loss: float | None
    tokens: int
    tokens_per_second: float | None
    mfu: float | None
    input_wait: float | None
    skipped: int
    seconds: float
    model: str | None
    plot: str | None
    checkpoint: str | None

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: str = "auto",
    say: Callable[[str], None] | None = None,
    progress_every: float = 10.0,
    seconds: float | None = None,
) -> Summary:
    """Trains, or goes on where an earlier call with the same `out` stopped.

    SIGTERM and Ctrl-C save and return; a second one ends at once, without saving.

    Args:
      out: folder of the run; made if it is not there.
      resume: "auto" goes on if there is a checkpoint, "must" wants one, "never" wants none.
      say: takes lines for people; None prints them. Only process 0 calls it.
      progress_every: seconds between progress lines where there is no terminal.
      seconds: after which to save and return as on a signal; None is no limit. A step that has
        begun is finished, and so is a validation.

    Raises:
      UserError: the recipe cannot be run, `out` cannot be written or another process trains
        there, or its checkpoint is of another recipe; always before any compute.
      NonFiniteError: see `Recipe.max_nonfinite`; the last checkpoint stays as it is.
    """
    begun = time.monotonic()
    first = jax.process_index() == 0
    # Flushed, so that lines keep their place among the progress on stderr.
    say = (say or functools.partial(print, flush=True)) if first else (lambda _: None)
    if resume not in RESUME:
        raise UserError(f"resume={resume!r}; expected one of {', '.join(RESUME)}")
    if seconds is not None and jax.process_count() > 1:
        raise UserError(f"seconds={seconds}: several processes have no common clock; expected None")
    plan = Plan(recipe)
    out = local_path(out, "out")
    _require_writable(out)
    with locked(out):
        folder = RunFolder(out)
        last = folder.latest()
        if resume == "must" and last is None:
            raise UserError(f"resume=must, but {out} holds no checkpoint")
        if resume == "never" and last is not None:
            raise UserError(f"resume=never, but {out} holds a checkpoint of step {last}")
        source = Source(recipe)
        plan.check_tags(source.corpus.tags)
        if last is None:
            plan.check_data(source.fingerprint)
        identity = plan.identity(source.fingerprint)
        saved = None if last is None else folder.metadata(last)
        if last is not None and saved is not None:
            check_identity(saved["identity"], identity, folder.checkpoints / str(last))
            if last >= recipe.steps and (done := _finished(out)) is not None:
                say(f"finished before: {out} holds all {recipe.steps} steps; nothing to do")
                return done
        for line in [source.description, *plan.describe()]:
            say(line)
        if first and source.corpus.tokenizer_file is not None:
            # So that what becomes of the run can be read, however it ends.
            shutil.copyfile(source.corpus.tokenizer_file, out / "tokenizer.json")
        with (
            stop_signals(math.inf if seconds is None else begun + seconds) as stop,
            Run(plan, source, folder, identity, say, begun, progress_every) as it,
        ):
            return it.train(last, saved, stop)


class Run:
    """One call of `run`, after its checks."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        folder: RunFolder,
        identity: dict[str, Any],
        say: Callable[[str], None],
        begun: float,
        progress_every: float,
    ):
        self.plan, self.recipe, self.program = plan, plan.recipe, plan.program
        self.source, self.folder, self.say = source, folder, say
        self.begun, self.progress_every = begun, progress_every
        self.first = jax.process_index() == 0
        self.checkpoints = Checkpoints(folder, identity, max(self.recipe.keep, 1))
        self.tokens_per_step = self.recipe.batch * self.recipe.length
        self.validation: list[dict] | None = None
        self.loss: float | None = None
        self.validation_loss: float | None = None
        self.skipped = 0
        self.rate = Rate()
        self.log: MetricsLog | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        # Also after an error: a save under way is completed.
        self.checkpoints.close()
        if self.log is not None:
            self.log.close()

    def train(self, last: int | None, saved: dict[str, Any] | None, stop: "Stop") -> Summary:
        recipe, program = self.recipe, self.program
        iterator = self.source.train()
        if last is not None:
            assert saved is not None
            self.say(f"resuming at step {last} of {recipe.steps}")
            state = self.checkpoints.restore(last, program.abstract, program.shardings)
            iterator.set_state(saved["data"])
        else:
            state = self._fresh(iterator)
        start = last or 0
        if self.first:
            self.log = MetricsLog(self.folder.path, start)
        progress: Progress = Silent()
        if self.first:
            progress = Progress(start, recipe.steps, every=self.progress_every)
        batches = Prefetch(iterator, lambda batch: place(batch, program.batch_sharding))
        try:
            step, state = self._steps(start, state, batches, progress, stop)
        finally:
            batches.close()
            progress.close()
        stopped = step < recipe.steps
        self._save(step, state, batches.state)
        self.checkpoints.wait()
        if stopped:
            saved_or_not = "saved; the same command goes on" if recipe.keep else "nothing saved"
            self.say(f"stopped at step {step} of {recipe.steps}, {saved_or_not}")
        return self._end(step, state, stopped, batches.waited)

    def _fresh(self, iterator: Any) -> TrainState:
        recipe, trunk = self.recipe, self.plan.trunk
        if trunk is None:
            return self.program.init(recipe.seed)
        placed = self.plan.preset.shardings(trunk.abstract, self.plan.mesh)
        weights = trunk.folder.parameters(trunk.step, with_shardings(trunk.abstract, placed))
        state = self.program.init(recipe.seed, weights)
        if recipe.continue_data:
            iterator.set_state(trunk.folder.metadata(trunk.step)["data"])
        return state

    def _steps(
        self,
        step: int,
        state: TrainState,
        batches: Prefetch,
        progress: Progress,
        stop: "Stop",
    ) -> tuple[int, TrainState]:
        """Steps until the end or a signal. Metrics of a step are read after the next one is on
        its way, so that the device never waits for the host to look."""
        recipe = self.recipe
        pending: tuple[int, Metrics] | None = None
        due_save = False
        self.rate.restart(batches.waited)
        while step < recipe.steps and not stop.agreed(step):
            state, metrics = self.program.step(state, next(batches))
            step += 1
            if pending is not None:
                self._report(*pending, progress, batches)
            pending = (step, metrics)
            due_save |= bool(recipe.save_every) and step % recipe.save_every == 0
            due_eval = bool(recipe.eval_every) and step % recipe.eval_every == 0
            due_save &= step < recipe.steps
            if not (due_save or due_eval or step == recipe.steps):
                continue
            self._report(*pending, progress, batches)
            good, pending = int(metrics.skipped_in_row) == 0, None
            if due_save and good:  # else at the next good step
                self._save(step, state, batches.state)
                due_save = False
            if due_eval or step == recipe.steps:
                self._validate(step, state, progress)
            self.rate.restart(batches.waited)
        if pending is not None:
            self._report(*pending, progress, batches)
        return step, state

    def _save(self, step: int, state: TrainState, data: Any) -> None:
        if self.recipe.keep:
            self.checkpoints.save(step, state, data)

    def _report(self, step: int, metrics: Metrics, progress: Progress, batches: Prefetch) -> None:
        """Waits for the step, and tells of it."""
        values = {name: x.item() for name, x in jax.device_get(metrics)._asdict().items()}
        self.rate.step(self.tokens_per_step, batches.waited)
        self.loss, self.skipped = values["loss"], values["skipped"]
        speed = self.rate.recent()
        share = mfu(speed, self.plan.flops_per_token, self.plan.peak) if speed else None
        if self.log is not None and step % self.recipe.log_every == 0:
            self.log.write(
                step,
                {
                    "tokens": step * self.tokens_per_step,
                    **values,
                    "tokens_per_second": speed,
                    "mfu": share,
                },
            )
        progress.update(step, progress_text(self.loss, speed, share))
        in_row = values["skipped_in_row"]
        if in_row:
            progress.say(f"step {step}: loss or gradient not finite, skipped ({in_row} in a row)")
        if in_row >= self.recipe.max_nonfinite:
            self.checkpoints.wait()
            last = self.folder.latest()
            kept = "no checkpoint yet" if last is None else f"last good checkpoint: step {last}"
            raise NonFiniteError(
                f"loss or gradient not finite for {in_row} steps in a row, up to step {step}; "
                f"{kept}"
            )

    def _validate(self, step: int, state: TrainState, progress: Progress) -> None:
        if self.validation is None:
            self.validation = self.source.validation()
        if not self.validation:
            return
        sums = [
            self.program.evaluate(state, place(batch, self.program.batch_sharding))
            for batch in self.validation
        ]
        nll, correct, targets = (sum(map(float, column)) for column in zip(*sums, strict=True))
        targets = max(targets, 1.0)
        self.validation_loss = nll / targets
        if self.log is not None:
            self.log.write(step, {
                "tokens": step * self.tokens_per_step,
                "validation_loss": self.validation_loss,
                "validation_accuracy": correct / targets,
            })  # fmt: skip
        progress.say(f"step {step}: validation loss {self.validation_loss:.4f}")

    def _end(self, step: int, state: TrainState, stopped: bool, waited: float) -> Summary:
        recipe, out = self.recipe, self.folder.path
        plot = model = None
        if self.validation_loss is None and not stopped:
            self._validate(step, state, Silent())  # resumed at the very end
        if self.first:
            plot = plot_losses({recipe.model: out}, out / PLOT)
            if recipe.export and not stopped:
                model = self._export(state)
        if self.loss is None:  # no step was made in this call
            losses = [entry["loss"] for entry in read_metrics(out) if "loss" in entry]
            self.loss = losses[-1] if losses else None
        speed = self.rate.mean()
        summary = Summary(
            step=step,
            steps=recipe.steps,
            stopped=stopped,
            already=False,
            loss=self.loss,
            validation_loss=self.validation_loss,
            tokens=step * self.tokens_per_step,
            tokens_per_second=speed,
            mfu=mfu(speed, self.plan.flops_per_token, self.plan.peak) if speed else None,
            input_wait=self.rate.wait_share(),
            skipped=int(self.skipped),
            seconds=time.monotonic() - self.begun,
            model=None if model is None else str(model),
            plot=None if plot is None else str(plot),
            checkpoint=str(self.folder.checkpoints / str(step)) if recipe.keep else None,
        )
        if self.first:
            text = as_json(dataclasses.asdict(summary), indent=1)
            (out / "summary.json").write_text(text, encoding="utf-8")
        return summary

    def _export(self, state: TrainState) -> Path | None:
        if jax.process_count() > 1:
            self.say("no export: parameters lie on several hosts; convert the checkpoint instead")
            return None
        from hackle.zoo import save_pretrained

        folder, corpus = self.folder.path / "model", self.source.corpus
        save_pretrained(
            self.program.model(state),
            folder,
            overwrite=True,
            extra=None if corpus.eos_id is None else {"eos_token_id": corpus.eos_id},
            files=() if corpus.tokenizer_file is None else (corpus.tokenizer_file,),
        )
        return folder


class Rate:
    """Tokens per second and the share of time spent waiting for data, over plain steps only.

    `restart` marks where something else took time; the step after it is not counted either, since
    it may have been compiled or have waited for the device to drain.
    """

    def __init__(self):
        self._mark: float | None = None
        self._skip = True
        self._waited = 0.0
        self._tokens = self._seconds = self._waiting = 0.0
        self._recent: float | None = None

    def restart(self, waited: float) -> None:
        self._mark, self._waited, self._skip = time.perf_counter(), waited, True

    def step(self, tokens: int, waited: float) -> None:
        """A step is done; `waited` is all time spent waiting for data so far."""
        now = time.perf_counter()
        assert self._mark is not None
        seconds, waiting = now - self._mark, waited - self._waited
        self._mark, self._waited = now, waited
        if self._skip:
            self._skip = False
            return
        self._tokens += tokens
        self._seconds += seconds
        self._waiting += waiting
        speed = tokens / max(seconds, 1e-9)
        self._recent = speed if self._recent is None else 0.9 * self._recent + 0.1 * speed

    def recent(self) -> float | None:
        """Tokens per second, smoothed over some ten steps."""
        return self._recent

    def mean(self) -> float | None:
        return self._tokens / self._seconds if self._seconds else None

    def wait_share(self) -> float | None:
        return min(self._waiting / self._seconds, 1.0) if self._seconds else None


class Stop:
    """Whether the run was told to stop, or its time is over.

    Args:
      until: `time.monotonic()` of the latter.
    """

    def __init__(self, until: float = math.inf):
        self.told = False
        self.until = until

    def agreed(self, step: int) -> bool:
        """All processes get the same answer for the same step."""
        if jax.process_count() > 1:
            # The coordinator tells every process the step at which all of them stop.
            return multihost_utils.reached_preemption_sync_point(step)
        return self.told or time.monotonic() > self.until


@contextlib.contextmanager
def stop_signals(until: float = math.inf) -> Iterator[Stop]:
    """Inside, the first SIGTERM or Ctrl-C is noted; the second acts as it always does.

    With several processes SIGTERM belongs to JAX's preemption service, which noted it already.
    """
    stop = Stop(until)
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    caught = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: Any) -> None:
        stop.told = True
        for each in caught:
            signal.signal(each, before[each])

    for number in caught:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number in caught:
            signal.signal(number, before[number])


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"cannot write output folder {out}: {error.strerror or error}") from None


def _finished(out: Path) -> Summary | None:
    """The summary of a finished run, if it was written to the end."""
    try:
        found = Summary(**json.loads((out / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return dataclasses.replace(found, already=True) if found.finished else None
