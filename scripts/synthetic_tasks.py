"""Trains small recurrent models and a transformer on synthetic tasks; a table of accuracies.

The defaults are the settings of ParaRNN (arXiv 2510.21450): up to 3000 epochs, and the best of
three seeds. A training ends when a seed answers all held-out rows. Each result goes to
OUT/<task>-<model>.json; the same command again goes on with those that are missing.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from cli import run

if TYPE_CHECKING:
    from hackle.zoo.tasks.setups import Setup
    from hackle.zoo.tasks.training import Settings

EXAMPLES = """examples:
  python scripts/synthetic_tasks.py --out runs/tasks --tasks parity --models gru lstm
  python scripts/synthetic_tasks.py --out runs/tasks --stop-after 300 --report
  python scripts/synthetic_tasks.py --out runs/quick --learning-rate 3e-3 --epochs 100
"""

TASKS = ("parity", "keep-nth", "recall", "1-hop", "2-hop")
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


def result(name: str, setup: "Setup", model: str, settings: "Settings", method: str | None) -> dict:
    """Trains one model on one task; what is kept of it, as JSON takes it."""
    from hackle.zoo.tasks.model import make_model
    from hackle.zoo.tasks.training import Check, train
    from hackle.zoo.train.report import Progress

    parameters = size(setup, model, method)
    progress = Progress(0, settings.stop_after or settings.epochs)

    def tell(check: Check) -> None:
        best = max(check.accuracy)
        progress.update(check.epoch, f"loss {min(check.loss):.4f}  held out {100 * best:.2f} %")

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


def kept(path: Path, asked: dict[str, Any]) -> dict | None:
    """The result at `path`, if there is one.

    Raises:
      UserError: it is of other settings than `asked`.
    """
    from hackle.zoo.errors import UserError

    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = found.pop("settings")
    other = [key for key in asked if settings.get(key) != asked[key]]
    if other:
        there = ", ".join(f"{key}={settings.get(key)}" for key in other)
        raise UserError(f"{path} was made with {there}; choose another --out, or remove it")
    return found


def percent(share: float) -> str:
    """Two digits, rounded down, so that 100 is said of all alone."""
    return "100" if share == 1 else f"{math.floor(10_000 * share) / 100:.2f}"


def row(found: dict, epochs: int, length: int) -> dict[str, Any]:
    """A line of the table."""
    paper = PAPER[found["model"]].get(found["task"]) if length == 100 else None
    return {
        "task": found["task"],
        "model": found["model"],
        "parameters": found["parameters"],
        "accuracy %": percent(max(found["accuracy"])),
        "paper %": paper,
        "by seed %": " / ".join(percent(one) for one in found["accuracy"]),
        "epochs": f"{found['checks'][-1]['epoch']} of {epochs}",
        "seconds": found["seconds"],
    }


def plot(results: list[dict], path: Path) -> Path:
    """Held-out accuracy of the best seed over the epochs, a panel a task, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    tasks = list(dict.fromkeys(found["task"] for found in results))
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(1 + 3 * len(tasks), 3.2), dpi=120, sharey=True, squeeze=False
    )
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
    pyplot.close(figure)
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
    p.add_argument("--epochs", type=int, default=3000, help="of the schedule; default 3000")
    p.add_argument("--stop-after", type=int, help="epochs after which to give up; default all")
    p.add_argument("--check-every", type=int, default=1, help="epochs; default 1")
    p.add_argument("--batch", type=int, default=16, help="rows of a step; default 16")
    p.add_argument("--learning-rate", type=float, default=5e-4, help="at first; default 5e-4")
    p.add_argument("--weight-decay", type=float, default=1e-6, help="default 1e-6")
    p.add_argument("--state-clip", type=float, help="bound of the state matrices; default 0.9, and "
                   "none for parity and other state tracking")  # fmt: skip
    p.add_argument("--train-rows", type=int, default=10_000, help="default 10000")
    p.add_argument("--held-out-rows", type=int, default=10_000, help="default 10000")
    p.add_argument("--test-rows", type=int, default=100_000, help="default 100000")
    p.add_argument("--seeds", type=int, default=3, help="models of a kind; default 3")
    p.add_argument("--seed", type=int, default=0, help="of the rows and the first model; default 0")
    p.add_argument("--method", help="of the recurrences: scan, newton, shooting, fused")
    p.add_argument("--report", action="store_true",
                   help="write reports/synthetic_<hardware>_<date>")  # fmt: skip
    p.add_argument("--note", default="", help="a paragraph for the report")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.tasks.setups import setup
    from hackle.zoo.tasks.training import Settings

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(args, name) for name in names})
    setups = {name: setup(name, length=args.length) for name in args.tasks}
    asked = dataclasses.asdict(settings) | {"length": args.length, "method": args.method}
    paths = {
        (name, model): args.out / f"{name}-{model}.json"
        for name in args.tasks
        for model in args.models
    }
    # All are looked at before the first is trained.
    for name, model in paths:
        size(setups[name], model, args.method)
    results = {key: kept(path, asked) for key, path in paths.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    for (name, model), path in paths.items():
        if results[name, model] is not None:
            print(f"{name}, {model}: reused {path}", file=sys.stderr)
            continue
        clip = setups[name].state_clip if settings.state_clip is None else settings.state_clip
        own = dataclasses.replace(settings, state_clip=clip)
        found = result(name, setups[name], model, own, args.method)
        results[name, model] = found
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps({"settings": asked, **found}), encoding="utf-8")
        scratch.replace(path)
    done = [found for found in results.values() if found is not None]
    table = [row(found, settings.epochs, args.length) for found in done]
    print(f"\n{report.table(table)}\nplot: {plot(done, args.out / 'accuracy.png')}")
    if args.report:
        write_report(asked, done, table, args.note)
    return 0


def few(found: dict, count: int = 50) -> list[dict]:
    """Some `count` of the checks, evenly spaced, and the last."""
    checks = found["checks"]
    return checks[: -1 : -(-len(checks) // count)] + checks[-1:]


def write_report(asked: dict[str, Any], results: list[dict], table: list[dict], note: str) -> None:
    import jax

    bound = asked["state_clip"]
    clip = f"{bound:g}" if bound else "0.9, but not in parity and other state tracking"
    text = (
        f"{asked['train_rows']:,} training rows of {asked['length']} tokens, {asked['batch']} a "
        f"step; learning rate {asked['learning_rate']:g}, falling to 0 over {asked['epochs']:,} "
        f"epochs; state matrices bounded by {clip}; the best of {asked['seeds']} seeds. "
        f"A training ends when a seed answers all of {asked['held_out_rows']:,} held-out rows"
        + (f", or after {asked['stop_after']:,} epochs" if asked["stop_after"] else "")
        + f". Accuracy is the share of right answers in {asked['test_rows']:,} test rows. Seconds "
        "are of all seeds, with compilation. Held-out accuracy over the epochs is drawn in the "
        "picture of this page's name. Percentages are rounded down."
    )
    path = report.write(
        "synthetic",
        jax.devices()[0].device_kind,
        title="Synthetic tasks: what a recurrent layer and a transformer layer learn",
        sections=[text, report.table(table), *([note] if note else [])],
        record={
            "settings": asked,
            "results": [found | {"checks": few(found)} for found in results],
        },
    )
    print(f"report: {path}\nplot: {plot(results, path.with_suffix('.png'))}")


if __name__ == "__main__":
    run(main)
