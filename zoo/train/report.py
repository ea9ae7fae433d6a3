"""What a run tells: progress in the terminal, metrics.jsonl, TensorBoard, and a plot at the end."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from hackle.zoo.train.events import EventWriter

METRICS = "metrics.jsonl"
PLOT = "loss.png"

Scalar = float | int | None


class MetricsLog:
    """metrics.jsonl and a TensorBoard file; one line is `{"step": ..., name: value, ...}`.

    Continuing at `step` removes the lines after it: those steps are made again.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / METRICS
        kept = [line for line in read_metrics(folder) if line["step"] <= step] if step else []
        scratch = self.path.with_suffix(".partial")
        scratch.write_text("".join(as_json(entry) for entry in kept), encoding="utf-8")
        scratch.replace(self.path)
        self._file = open(self.path, "a", encoding="utf-8")
        self._events = EventWriter(folder, step)

    def write(self, step: int, values: Mapping[str, Scalar]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        self._file.write(as_json({"step": step, **known}))
        self._file.flush()
        self._events.scalars(step, known)
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def as_json(entry: Mapping[str, Any], indent: int | None = None) -> str:
    """A line, or lines; JSON has no NaN: null stands for a number that is not finite."""
    clean = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }
    return json.dumps(clean, indent=indent) + "\n"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off is left out."""
    try:
        text = (Path(folder) / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


class Progress:
    """A bar in a terminal; elsewhere a line now and then.

    Args:
      every: seconds between lines where there is no terminal.
    """

    def __init__(self, start: int, total: int, stream: TextIO | None = None, every: float = 10.0):
        self._stream = sys.stderr if stream is None else stream
        self._total, self._every = total, every
        self._begun = self._last = time.monotonic()
        self._start = start
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
                "{postfix}",
            )  # fmt: skip

    def update(self, step: int, text: str) -> None:
        """`step` steps are done; `text` says how it goes."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last < self._every and step < self._total:
            return
        self._last = now
        done = step - self._start
        left = (now - self._begun) / done * (self._total - step) if done else 0
        self.say(f"step {step}/{self._total}  {text}  {_clock(left)} left")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Silent(Progress):
    """Says nothing: for processes other than the first."""

    def __init__(self):
        super().__init__(0, 1, open(os.devnull, "w"))

    def close(self) -> None:
        self._stream.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def progress_text(loss: float, tokens_per_second: float | None, mfu: float | None) -> str:
    """E.g. "loss 2.3456  12,345 tokens/s  MFU 41.2 %"."""
    parts = [f"loss {loss:.4f}"]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if mfu is not None:
        parts.append(f"MFU {100 * mfu:.1f} %")
    return "  ".join(parts)


def plot_losses(runs: Mapping[str, str | Path], path: str | Path) -> Path:
    """Draws training loss (smoothed) and validation loss of run folders into one PNG.

    Losses that fall to less than a tenth are drawn on a logarithmic axis.

    Args:
      runs: label -> folder with metrics.jsonl.
      path: of the PNG.
    """
    from matplotlib.figure import Figure  # not pyplot, whose backend is a notebook's own

    figure = Figure(figsize=(8, 5), dpi=120)
    axes = figure.subplots()
    for index, (label, folder) in enumerate(runs.items()):
        entries = read_metrics(folder)
        color = f"C{index}"
        train = [(e["tokens"], e["loss"]) for e in entries if e.get("loss") is not None]
        if train:
            xs, ys = zip(*train, strict=True)
            axes.plot(xs, ys, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(xs, _smooth(ys), color=color, label=f"{label}: training, smoothed")
        checks = [
            (e["tokens"], e["validation_loss"])
            for e in entries
            if e.get("validation_loss") is not None
        ]
        if checks:
            xs, ys = zip(*checks, strict=True)
            axes.plot(xs, ys, "o--", color=color, label=f"{label}: validation")
    least, most = axes.dataLim.intervaly  # of what is finite
    if 0 < 10 * least < most:
        axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    return Path(path)


def _smooth(values: Iterable[float], weight: float = 0.95) -> list[float]:
    """Exponential mean, without the pull of its start."""
    mean, share, out = 0.0, 0.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        share = weight * share + (1 - weight)
        out.append(mean / share)
    return out
