"""Trains small recurrent models and a transformer on synthetic tasks; a table of accuracies.

What is trained on each task, and how, is in zoo/tasks/setups.py: the settings of ParaRNN (arXiv
2510.21450), up to 3000 epochs and the best of three seeds, or others where the paper's are slow. A
training ends when a seed answers all held-out rows. Each result goes to OUT/<task>-<model>.json;
the same command again goes on with those that are missing. With --seconds, or Ctrl-C, what is done
by then makes the table and the report.
"""

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from cli import report_option, run

if TYPE_CHECKING:
    from hackle.zoo.tasks.setups import Setup

EXAMPLES = """examples:
  python scripts/synthetic_tasks.py --out runs/tasks --tasks parity --models gru lstm
  python scripts/synthetic_tasks.py --out runs/tasks --seconds 600 --report
  python scripts/synthetic_tasks.py --out runs/paper --epochs 3000 --batch 16 \\
      --train-rows 10000 --learning-rate 5e-4
"""

TASKS = ("parity", "keep-nth", "1-hop", "recall", "2-hop")
MODELS = ("gru", "lstm", "transformer")
# Accuracy in per cent, of the paper's table.
PAPER = {
    "gru": dict.fromkeys(TASKS, 100),
    "lstm": dict.fromkeys(TASKS, 100),
    "transformer": {"keep-nth": 100, "parity": 53, "recall": 100, "1-hop": 82, "2-hop": 78},
}


def size(setup: "Setup", model: str, method: str | None) -> int:
    """Parameters of a model, which is traced and not run.

    Raises:
      UserError: there is no such model or method, or it does not run here.
    """
    import jax
    from flax import nnx

    from hackle.zoo.errors import UserError
    from hackle.zoo.tasks.model import make_model

    def state():
        made = make_model(model, setup, method=method, rngs=nnx.Rngs(0))
        made(jax.numpy.zeros((1, setup.task.length), int))
        return nnx.state(made)

    try:
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(state)))
    except (ValueError, NotImplementedError) as error:
        raise UserError(str(error)) from error


def result(name: str, setup: "Setup", model: str, method: str | None, seconds: float) -> dict:
    """Trains one model on one task, for some seconds; what is kept of it, as JSON takes it."""
    from hackle.zoo.tasks.model import make_model
    from hackle.zoo.tasks.training import Check, train
    from hackle.zoo.train.report import Progress

    parameters = size(setup, model, method)
    settings = setup.training
    progress = Progress(0, settings.stop_after or settings.epochs)
    times = [time.monotonic()]

    def tell(check: Check) -> bool:
        best = max(check.accuracy)
        progress.update(check.epoch, f"loss {min(check.loss):.4f}  held out {100 * best:.2f} %")
        times.append(time.monotonic())
        # What comes before the first check is mostly compilation; the others take equally long.
        ahead = times[-1] - times[-2] if len(times) > 2 else 0
        return times[-1] + ahead > times[0] + seconds

    progress.say(f"{name}, {model}: {parameters:,} parameters")
    make = lambda rngs: make_model(model, setup, method=method, rngs=rngs)
    outcome = train(make, setup.task, settings, tell=tell)
    progress.close()
    return {
        "task": name,
        "model": model,
        "parameters": parameters,
        "accuracy": outcome.accuracy,
        "seconds": round(outcome.seconds, 1),
        "checks": [dataclasses.asdict(check) for check in outcome.checks],
    }


def kept(path: Path, asked: dict[str, Any], parameters: int) -> dict | None:
    """The result at `path`, if there is one.

    Raises:
      UserError: it is of other settings than `asked`, or of a model of another size.
    """
    from hackle.zoo.errors import UserError

    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    made = found["settings"] | {"parameters": found["parameters"]}
    asked = asked | {"parameters": parameters}
    other = [key for key in asked if made.get(key) != asked[key]]
    if other:
        there = ", ".join(f"{key}={made.get(key)}" for key in other)
        raise UserError(f"{path} was made with {there}; choose another --out, or remove it")
    return found


def percent(share: float) -> str:
    """Two digits, rounded down, so that 100 is said of all alone."""
    return "100" if share == 1 else f"{math.floor(10_000 * share) / 100:.2f}"


def row(found: dict) -> dict[str, Any]:
    """A line of the table."""
    settings = found["settings"]
    paper = PAPER[found["model"]].get(found["task"]) if settings["length"] == 100 else None
    return {
        "task": found["task"],
        "model": found["model"],
        "parameters": found["parameters"],
        "accuracy %": percent(max(found["accuracy"])),
        "paper %": paper,
        "by seed %": " / ".join(percent(one) for one in found["accuracy"]),
        "rows": settings["train_rows"],
        "batch": settings["batch"],
        "rate": f"{settings['learning_rate']:g}",
        "epochs": f"{found['checks'][-1]['epoch']} of {settings['epochs']}",
        "seconds": found["seconds"],
    }


def plot(results: list[dict], path: Path) -> Path:
    """Held-out accuracy of the best seed over the epochs, a panel a task, as one PNG."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(found["task"] for found in results))
    figure = Figure(figsize=(1 + 3 * len(tasks), 3.2), dpi=120)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        for found in results:
            if found["task"] == task:
                epochs = [check["epoch"] for check in found["checks"]]
                best = [100 * max(check["accuracy"]) for check in found["checks"]]
                color = f"C{MODELS.index(found['model'])}"
                axes.plot(epochs, best, marker=".", color=color, label=found["model"])
        axes.set_title(task)
        axes.set_xscale("log")
        axes.set_xlim(0.9, 1.1 * max(10, axes.get_xlim()[1]))
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("epochs")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    panels[0][0].set_ylim(0, 103)
    panels[0][0].set_ylabel("right answers, held out, %")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the results")
    p.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK",
                   help=f"default {' '.join(TASKS)}; also cycle-navigation, "
                   "modular-arithmetic, a5")  # fmt: skip
    p.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL",
                   help=f"default {' '.join(MODELS)}")  # fmt: skip
    p.add_argument("--length", type=int, default=100, help="tokens of a row; default 100")
    p.add_argument("--seconds", type=float, help="of all trainings; each gets an equal share of "
                   "what is left; default no bound")  # fmt: skip
    add = p.add_argument_group("training; the default of each is the task's").add_argument
    add("--epochs", type=int, help="of the schedule, over which the learning rate falls to 0")
    add("--stop-after", type=int, help="epochs after which to give up")
    add("--check-every", type=int, help="epochs")
    add("--batch", type=int, help="rows of a step")
    add("--learning-rate", type=float, help="at first")
    add("--weight-decay", type=float)
    add("--state-clip", type=float, help="bound of the state matrices")
    add("--train-rows", type=int)
    add("--held-out-rows", type=int, help="rows that tell when to stop")
    add("--test-rows", type=int)
    add("--seeds", type=int, help="models of a kind")
    add("--seed", type=int, help="of the rows and the first model")
    p.add_argument("--method", help="of the recurrences: scan, newton, shooting, fused")
    report_option(p, "synthetic")
    p.add_argument("--note", default="", help="a paragraph for the report")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.errors import UserError
    from hackle.zoo.local_path import local_path
    from hackle.zoo.tasks.settings import Settings
    from hackle.zoo.tasks.setups import setup

    args.out = local_path(args.out, "--out")
    if args.seconds is not None and args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g}; expected more than 0")
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    setups = {}
    for name in args.tasks:
        one = setup(name, length=args.length)
        setups[name] = dataclasses.replace(one, training=dataclasses.replace(one.training, **given))
    paths = {
        (name, model): args.out / f"{name}-{model}.json"
        for name in args.tasks
        for model in args.models
    }
    # All are looked at before the first is trained.
    sizes = {(name, model): size(setups[name], model, args.method) for name, model in paths}
    results = {
        key: kept(path, asked_of(setups[key[0]], args.method), sizes[key])
        for key, path in paths.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    code = 0
    try:
        train_missing(args, setups, paths, results)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is missing", file=sys.stderr)
        code = 130
    done = [found for found in results.values() if found is not None]
    if done:
        table = [row(found) for found in done]
        print(f"\n{report.table(table)}\nplot: {plot(done, args.out / 'accuracy.png')}")
        if args.report is not None:
            write_report(args.report, done, table, args.note)
    return code


def asked_of(setup: "Setup", method: str | None) -> dict[str, Any]:
    """What a result depends on, but for its task and model."""
    form = {
        "length": setup.task.length,
        "cell_only": setup.cell_only,
        "mlp_width": setup.mlp_width,
        "add_positions": setup.add_positions,
        "method": method,
    }
    return dataclasses.asdict(setup.training) | form


def train_missing(
    args: argparse.Namespace,
    setups: dict[str, "Setup"],
    paths: dict[tuple[str, str], Path],
    results: dict[tuple[str, str], dict | None],
) -> None:
    """Fills in `results`, and writes each to its path as soon as it is there."""
    end = time.monotonic() + (args.seconds or math.inf)
    for (name, model), path in paths.items():
        if results[name, model] is not None:
            print(f"{name}, {model}: reused {path}", file=sys.stderr)
            continue
        left, missing = end - time.monotonic(), sum(one is None for one in results.values())
        if left <= 0:
            print(f"{name}, {model}: no time left", file=sys.stderr)
            continue
        trained = result(name, setups[name], model, args.method, left / missing)
        found = {"settings": asked_of(setups[name], args.method), **trained}
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(found), encoding="utf-8")
        scratch.replace(path)
        results[name, model] = found


def few(found: dict, count: int = 50) -> list[dict]:
    """Some `count` of the checks, evenly spaced, and the last."""
    checks = found["checks"]
    return checks[: -1 : -(-len(checks) // count)] + checks[-1:]


def write_report(label: str, results: list[dict], table: list[dict], note: str) -> None:
    import jax

    def each(name: str) -> str:
        """A setting that the tasks may have in common, or not."""
        values = dict.fromkeys(found["settings"][name] for found in results)
        return " or ".join("none" if value is None else f"{value:,}" for value in values)

    text = (
        f"Rows of {each('length')} tokens. Bound of the state matrices: {each('state_clip')}. The "
        "learning rate (rate) falls to 0 over the second number of epochs; the first is where the "
        f"best of {each('seeds')} seeds answered all of {each('held_out_rows')} held-out rows, or "
        "where the time of its training ended. Accuracy is the share of right answers in "
        f"{each('test_rows')} test rows. Seconds are of all seeds, with compilation. Held-out "
        "accuracy over the epochs is drawn in the picture of this page's name. Percentages are "
        "rounded down."
    )
    path = report.write(
        "synthetic",
        jax.devices()[0].device_kind,
        name=label,
        title="Synthetic tasks: what a recurrent layer and a transformer layer learn",
        sections=[text, report.table(table), *([note] if note else [])],
        record={"results": [found | {"checks": few(found)} for found in results]},
    )
    print(f"report: {path}\nplot: {plot(results, path.with_suffix('.png'))}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run(main)
