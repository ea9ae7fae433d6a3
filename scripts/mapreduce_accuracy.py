"""Trains a Multiverse model and its sequential twin on generated problems, and compares them.

Both see the same problems, the twin without tags and branches. Then both solve held-out problems:
accuracy, share of well-formed outputs, and the critical path. Everything is kept in OUT; the same
command again goes on where it stopped.
"""

import argparse
import functools
import logging
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from cli import run

if TYPE_CHECKING:
    from hackle.zoo.mapreduce.evaluation import Outcome

EXAMPLES = """examples:
  python scripts/mapreduce_accuracy.py --recipe multiverse-tiny --out runs/mapreduce-tiny
  python scripts/mapreduce_accuracy.py --recipe multiverse-small --out runs/mapreduce \\
      --seconds 550 --problems 600 --report
  python scripts/mapreduce_accuracy.py --runs runs/a/parallel runs/a/sequential --out runs/again
"""

MODELS = ("parallel", "sequential")
# Problems that one model solves before the other takes its turn.
TURN = 48


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder of runs and outputs")
    p.add_argument("--recipe", default="multiverse-tiny", help="of the first; default %(default)s")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train.py")
    p.add_argument(
        "--runs", type=Path, nargs=2, metavar=("PARALLEL", "SEQUENTIAL"),
        help="finished runs to take instead of training",
    )  # fmt: skip
    p.add_argument("--problems", type=int, default=300, help="held out, of all kinds; default 300")
    p.add_argument("--max-new-tokens", type=int, default=1200, help="default %(default)s")
    p.add_argument("--seconds", type=float, help="stop after so long; default no limit")
    p.add_argument(
        "--report", action="store_true", help="write reports/mapreduce_<hardware>_<date>"
    )
    p.add_argument("--note", default="", help="a paragraph for the report")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.errors import UserError

    until = time.monotonic() + (math.inf if args.seconds is None else args.seconds)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hackle").setLevel(logging.INFO)
    for name in ("problems", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)}; expected at least 1")
    if args.runs is None:
        folders = {name: args.out / name for name in MODELS}
        if not train(args, folders, until):
            print("stopped; the same command goes on")
            return 0
    else:
        folders = dict(zip(MODELS, args.runs, strict=True))
    outcomes = solve(args, folders, until)
    table = rows(outcomes)
    print(f"\n{report.table(table)}\n\n{gap(outcomes)}")
    if min(map(len, outcomes.values())) < args.problems:
        print("stopped before all problems were solved; the same command goes on")
    if args.report:
        write_report(args, folders, outcomes, table)
    return 0


def train(args: argparse.Namespace, folders: dict[str, Path], until: float) -> bool:
    """Trains both; whether both are finished."""
    from hackle.zoo.train.loop import run as train_one
    from hackle.zoo.train.recipes import recipe, sequential

    first = recipe(args.recipe).set(args.set)
    recipes = {"parallel": first, "sequential": sequential(first)}
    for name, one in recipes.items():
        print(f"\n=== {name} ===", flush=True)
        left = until - time.monotonic()
        found = train_one(one, folders[name], seconds=None if math.isinf(left) else left)
        if not found.finished:
            return False
    return True


def solve(
    args: argparse.Namespace, folders: dict[str, Path], until: float
) -> "dict[str, list[Outcome]]":
    """Lets both models solve problems in turns, so that both have the same ones at any time."""
    from hackle.zoo.mapreduce import evaluation, kinds_of
    from hackle.zoo.train.checkpoint import load_model
    from hackle.zoo.train.report import Progress

    kinds = kinds_of(trained_on(folders))
    decoders = {
        name: evaluation.DECODERS[name](load_model(folder), max_new_tokens=args.max_new_tokens)
        for name, folder in folders.items()
    }
    found: dict[str, list[Outcome]] = {name: [] for name in MODELS}
    progress = Progress(0, len(MODELS) * args.problems)

    def tell(name: str, done: "list[Outcome]") -> None:
        found[name] = done
        right = (f"{n} {sum(o.correct for o in found[n])}/{len(found[n])}" for n in MODELS)
        progress.update(sum(map(len, found.values())), ", ".join(right))

    for turn in range(TURN, args.problems + TURN, TURN):
        for name in MODELS:
            found[name] = evaluation.evaluate(
                decoders[name],
                kinds,
                args.out / f"{name}.jsonl",
                problems=min(turn, args.problems),
                tagged=name == "parallel",
                until=until,
                tell=functools.partial(tell, name),
            )
    progress.close()
    return found


def trained_on(folders: dict[str, Path]) -> str:
    """The set of problems that both runs were trained on.

    Raises:
      UserError: they are no such pair.
    """
    from hackle.zoo.errors import UserError
    from hackle.zoo.mapreduce import SETS

    recipes = {name: recipe_of(folder) for name, folder in folders.items()}
    expected = {"parallel": "branches", "sequential": "documents"}
    for name, one in recipes.items():
        if one["corpus"] not in SETS or one["packing"] != expected[name]:
            raise UserError(
                f"{folders[name]}: corpus={one['corpus']!r} with packing={one['packing']!r}; "
                f"expected generated problems with packing={expected[name]!r}"
            )
    other = [k for k, v in recipes["parallel"].items() if recipes["sequential"][k] != v]
    if allowed := set(other) - {"packing", "workers", "data_dir", "attention"}:
        raise UserError(f"{' and '.join(map(str, folders.values()))} differ in {sorted(allowed)}")
    return recipes["parallel"]["corpus"]


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder, as JSON has it."""
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.checkpoint import RunFolder

    run = RunFolder(folder)
    step = run.latest()
    if step is None:
        raise UserError(f"{folder} holds no checkpoint of a run")
    return run.identity(step)["recipe"]


def rows(outcomes: "dict[str, list[Outcome]]") -> list[dict[str, Any]]:
    """The table: each model on all problems, and on those of every kind."""
    from hackle.zoo.mapreduce.evaluation import summary

    table = []
    for kind in ["all", *dict.fromkeys(one.kind for found in outcomes.values() for one in found)]:
        for name, found in outcomes.items():
            these = [one for one in found if kind in ("all", one.kind)]
            table.append({"problems of": kind, "model": name, **summary(these)})
    return table


def gap(outcomes: "dict[str, list[Outcome]]") -> str:
    """The difference in accuracy, in words."""
    from hackle.zoo.mapreduce.evaluation import difference

    count, mean, error = difference(outcomes["parallel"], outcomes["sequential"])
    return (
        f"Accuracy of the parallel model less that of its twin, on {count} problems that both "
        f"were given: {mean:+.2f} % (standard error {error:.2f})."
    )


def faults(found: "list[Outcome]") -> list[dict[str, Any]]:
    """What is wrong with outputs that are not well formed, and how often."""
    counts = Counter(one.fault for one in found if not one.well_formed)
    return [{"fault": fault, "outputs": count} for fault, count in counts.most_common(8)]


def curves(folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Validation over the training of both: one row a check."""
    from hackle.zoo.train.report import read_metrics

    checks = {
        name: {e["step"]: e for e in read_metrics(folder) if "validation_loss" in e}
        for name, folder in folders.items()
    }
    steps = sorted(set().union(*checks.values()))
    return [
        {"step": step}
        | {
            f"{name} {what}": checks[name].get(step, {}).get(f"validation_{what}")
            for what in ("loss", "accuracy")
            for name in folders
        }
        for step in steps
    ]


def write_report(
    args: argparse.Namespace,
    folders: dict[str, Path],
    outcomes: "dict[str, list[Outcome]]",
    table: list[dict[str, Any]],
) -> None:
    import jax

    from hackle.zoo.train.report import plot_losses

    recipe = recipe_of(folders["parallel"])
    checks, wrong = curves(folders), faults(outcomes["parallel"])
    example = next((one for one in outcomes["parallel"] if one.correct), None)
    text = (
        f"Model `{recipe['model']}` with {recipe['overrides']}, {recipe['steps']:,} steps of "
        f"{recipe['batch']} x {recipe['length']} tokens of `{recipe['corpus']}`. The parallel "
        "model is trained on problems in Multiverse's form with branches, its twin on the same "
        "problems without tags, from the same first weights. Both decode greedily: the parallel "
        "model forks at the end of each goal and joins at the conclusion. Problems are held out by "
        "their hash. Tokens are new ones, and the critical path is how many of them had to wait "
        "for one another. The losses of the two are of other texts: tags are easy to foresee."
    )
    sections = [text, report.table(table), gap(outcomes)]
    if args.note:
        sections.append(args.note)
    if wrong:
        sections += ["Outputs of the parallel model that are not well formed:", report.table(wrong)]
    if checks:
        sections += ["Validation over the training:", report.table(checks)]
    if example is not None:
        sections += ["An output of the parallel model:", f"```\n{example.text}\n```"]
    path = report.write(
        "mapreduce",
        jax.devices()[0].device_kind,
        title="Multiverse and its sequential twin on generated problems",
        sections=sections,
        record={"recipe": recipe, "rows": table, "curves": checks},
    )
    plot = plot_losses(folders, path.with_suffix(".png"))
    print(f"report: {path}\nplot: {plot}")


if __name__ == "__main__":
    run(main)
