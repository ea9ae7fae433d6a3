"""Trains a Multiverse model and its sequential twin on generated problems, and compares them.

Both see the same problems, the twin without tags and branches. Then both solve held-out problems:
accuracy, share of well-formed outputs, and the critical path. With --seeds, several such pairs,
each from other first weights and problems. Everything is kept in OUT; the same command again goes
on where it stopped.
"""

import argparse
import functools
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from cli import run

if TYPE_CHECKING:
    from hackle.zoo.mapreduce.evaluation import Outcome
    from hackle.zoo.mapreduce.problem import Kind

EXAMPLES = """examples:
  python scripts/mapreduce_accuracy.py --recipe multiverse-tiny --out runs/mapreduce-tiny
  python scripts/mapreduce_accuracy.py --recipe multiverse-small --out runs/mapreduce \\
      --seeds 2 --problems 1200 --report
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
    p.add_argument("--seeds", type=int, default=1, help="pairs to train; default %(default)s")
    p.add_argument(
        "--runs", type=Path, nargs=2, action="append", metavar=("PARALLEL", "SEQUENTIAL"),
        help="finished runs to take instead of training; once for every pair",
    )  # fmt: skip
    p.add_argument("--problems", type=int, default=300, help="held out; default 300")
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
    for name in ("problems", "max_new_tokens", "seeds"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)}; expected at least 1")
    if args.runs is None:
        pairs = train(args, until)
        if pairs is None:
            print("stopped; the same command goes on")
            return 0
    else:
        pairs = [dict(zip(MODELS, folders, strict=True)) for folders in args.runs]
    found = solve(args, pairs, until)
    table = rows(found)
    print(f"\n{report.table(table)}\n\n{gap(found)}")
    if min(len(one) for pair in found for one in pair.values()) < args.problems:
        print("stopped before all problems were solved; the same command goes on")
    if args.report:
        write_report(args, pairs, found, table)
    return 0


# The run folders of a pair, and what its models wrote, by `MODELS`.
Pair = dict[str, Path]
Outcomes = dict[str, "list[Outcome]"]


def train(args: argparse.Namespace, until: float) -> list[Pair] | None:
    """Trains all pairs; None when it was stopped before."""
    from hackle.zoo.train.loop import run as train_one
    from hackle.zoo.train.recipes import recipe, sequential

    first = recipe(args.recipe).set(args.set)
    pairs = []
    for seed in range(first.seed, first.seed + args.seeds):
        one = first.replace(seed=seed)
        pair = {name: args.out / place(seed) / name for name in MODELS}
        for name, wanted in zip(MODELS, (one, sequential(one)), strict=True):
            print(f"\n=== {name}, seed {seed} ===", flush=True)
            left = until - time.monotonic()
            done = train_one(wanted, pair[name], seconds=None if math.isinf(left) else left)
            if not done.finished:
                return None
        pairs.append(pair)
    return pairs


def place(seed: int) -> str:
    """The folder in OUT of the pair of a seed."""
    return f"seed-{seed}"


def solve(args: argparse.Namespace, pairs: list[Pair], until: float) -> list[Outcomes]:
    """Lets both models of a pair solve problems in turns, so that both have had the same ones."""
    from hackle.zoo.mapreduce import kinds_of
    from hackle.zoo.train.report import Progress

    recipes = [trained_on(pair) for pair in pairs]
    require_seeds(pairs, recipes)
    kinds = kinds_of(recipes[0]["corpus"])
    progress = Progress(0, len(pairs) * len(MODELS) * args.problems)
    found: list[Outcomes] = [{name: [] for name in MODELS} for _ in pairs]

    def tell(pair: Outcomes, name: str, done: "list[Outcome]") -> None:
        pair[name] = done
        right = (f"{n} {sum(o.correct for o in pair[n])}/{len(pair[n])}" for n in MODELS)
        progress.update(sum(len(x) for p in found for x in p.values()), ", ".join(right))

    for folders, one, outcomes in zip(pairs, recipes, found, strict=True):
        solve_pair(args, folders, args.out / place(one["seed"]), kinds, until, outcomes, tell)
    progress.close()
    return found


def solve_pair(
    args: argparse.Namespace,
    folders: Pair,
    out: Path,
    kinds: "Sequence[Kind]",
    until: float,
    found: Outcomes,
    tell: Callable[[Outcomes, str, "list[Outcome]"], None],
) -> None:
    """Fills `found` from what is in `out` and, where that is too little, by the models."""
    from hackle.zoo.mapreduce import evaluation
    from hackle.zoo.train.checkpoint import load_model

    @functools.cache
    def decoder(name: str) -> evaluation.Decoder:
        model = load_model(folders[name])
        return evaluation.DECODERS[name](model, max_new_tokens=args.max_new_tokens)

    for turn in range(TURN, args.problems + TURN, TURN):
        for name in MODELS:
            found[name] = evaluation.evaluate(
                functools.partial(decoder, name),
                kinds,
                out / f"{name}.jsonl",
                problems=min(turn, args.problems),
                tagged=name == "parallel",
                until=until,
                tell=functools.partial(tell, found, name),
            )


def trained_on(pair: Pair) -> dict[str, Any]:
    """The recipe that both of a pair have in common.

    Raises:
      UserError: they are no such pair.
    """
    from hackle.zoo.errors import UserError
    from hackle.zoo.mapreduce import SETS

    recipes = {name: recipe_of(folder) for name, folder in pair.items()}
    expected = {"parallel": "branches", "sequential": "documents"}
    for name, one in recipes.items():
        if one["corpus"] not in SETS or one["packing"] != expected[name]:
            raise UserError(
                f"{pair[name]}: corpus={one['corpus']!r} with packing={one['packing']!r}; "
                f"expected generated problems with packing={expected[name]!r}"
            )
    require_same(pair, recipes, but="packing")
    return recipes["parallel"]


def require_seeds(pairs: list[Pair], recipes: list[dict[str, Any]]) -> None:
    """Raises UserError unless pairs differ in their seeds, and in nothing else."""
    from hackle.zoo.errors import UserError

    for pair, one in zip(pairs[1:], recipes[1:], strict=True):
        both = {"first": pairs[0]["parallel"], "other": pair["parallel"]}
        require_same(both, {"first": recipes[0], "other": one}, but="seed")
    seeds = [one["seed"] for one in recipes]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--runs: pairs of the seeds {seeds}; expected another seed for each")


def require_same(folders: Pair, recipes: dict[str, dict[str, Any]], *, but: str) -> None:
    """Raises UserError where two recipes differ in more than `but` and where they ran."""
    from hackle.zoo.errors import UserError

    one, other = recipes.values()
    found = {key for key, value in one.items() if other[key] != value}
    if found := found - {but, "workers", "data_dir", "attention"}:
        raise UserError(f"{' and '.join(map(str, folders.values()))} differ in {sorted(found)}")


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder, as JSON has it."""
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.checkpoint import RunFolder

    run = RunFolder(folder)
    step = run.latest()
    if step is None:
        raise UserError(f"{folder} holds no checkpoint of a run")
    return run.identity(step)["recipe"]


def rows(found: list[Outcomes]) -> list[dict[str, Any]]:
    """The table: each model on all problems, on those of every kind, and of every pair."""
    from hackle.zoo.mapreduce.evaluation import summary

    every = {name: [one for pair in found for one in pair[name]] for name in MODELS}
    table = []
    for kind in ["all", *dict.fromkeys(one.kind for name in MODELS for one in every[name])]:
        for name in MODELS:
            these = [one for one in every[name] if kind in ("all", one.kind)]
            table.append({"problems of": kind, "model": name, **summary(these)})
    if len(found) > 1:
        for number, pair in enumerate(found, 1):
            for name in MODELS:
                table.append(
                    {"problems of": f"pair {number}", "model": name, **summary(pair[name])}
                )
    return table


def gap(found: list[Outcomes]) -> str:
    """The difference in accuracy, in words."""
    from hackle.zoo.mapreduce.evaluation import difference

    count, mean, error = difference([(pair["parallel"], pair["sequential"]) for pair in found])
    return (
        f"Accuracy of the parallel model less that of its twin, on {count} problems that both "
        f"were given: {mean:+.2f} % (standard error {error:.2f})."
    )


def faults(found: "list[Outcome]") -> list[dict[str, Any]]:
    """What is wrong with outputs that are not well formed, and how often."""
    counts = Counter(one.fault for one in found if not one.well_formed)
    return [{"fault": fault, "outputs": count} for fault, count in counts.most_common(8)]


def curves(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Validation over the training, means over the pairs: one row a check."""
    from hackle.zoo.train.report import read_metrics

    found: dict[int, dict[str, list[float]]] = {}
    for pair in pairs:
        for name in MODELS:
            for entry in read_metrics(pair[name]):
                for what in ("loss", "accuracy"):
                    if (value := entry.get(f"validation_{what}")) is not None:
                        at = found.setdefault(entry["step"], {})
                        at.setdefault(f"{name} {what}", []).append(value)
    columns = [f"{name} {what}" for what in ("loss", "accuracy") for name in MODELS]
    mean = lambda values: sum(values) / len(values) if values else None
    return [
        {"step": step} | {column: mean(found[step].get(column, ())) for column in columns}
        for step in sorted(found)
    ]


def write_report(
    args: argparse.Namespace,
    pairs: list[Pair],
    found: list[Outcomes],
    table: list[dict[str, Any]],
) -> None:
    import jax

    from hackle.zoo.train.report import plot_losses

    recipe = recipe_of(pairs[0]["parallel"])
    written = [one for pair in found for one in pair["parallel"]]
    checks, wrong = curves(pairs), faults(written)
    example = next((one for one in written if one.correct), None)
    several = f"{len(pairs)} pairs, each from other first weights and problems. " * (len(pairs) > 1)
    text = (
        f"{several}"
        f"Model `{recipe['model']}` with {recipe['overrides']}, {recipe['steps']:,} steps of "
        f"{recipe['batch']} x {recipe['length']} tokens of `{recipe['corpus']}`. The parallel "
        "model is trained on problems in Multiverse's form with branches, its twin on the same "
        "problems without tags, from the same first weights. Both decode greedily: the parallel "
        "model forks at the end of each goal and joins at the conclusion. Problems are held out by "
        "their hash. Tokens are new ones, and the critical path is how many of them had to wait "
        "for one another. The losses of the two are of other texts: tags are easy to foresee."
    )
    sections = [text, report.table(table), gap(found)]
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
        record={"recipe": recipe, "pairs": len(pairs), "rows": table, "curves": checks},
    )
    labels = {
        f"{name}{f' {number}' * (len(pairs) > 1)}": pair[name]
        for number, pair in enumerate(pairs, 1)
        for name in MODELS
    }
    plot = plot_losses(labels, path.with_suffix(".png"))
    print(f"report: {path}\nplot: {plot}")


if __name__ == "__main__":
    run(main)
