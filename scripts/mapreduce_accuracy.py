"""Trains a Multiverse model and its sequential twin on generated problems, and compares them.

Both see the same problems, the twin without tags and branches. Then both solve held-out problems:
accuracy, share of well-formed outputs, and the critical path. With --seeds, several such pairs,
each from other first weights and training problems. Everything is kept in OUT; the same command
again goes on where it stopped.
"""

import argparse
import functools
import json
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

EXAMPLES = """examples:
  python scripts/mapreduce_accuracy.py --recipe multiverse-tiny --out runs/mapreduce-tiny
  python scripts/mapreduce_accuracy.py --recipe multiverse-small --out runs/mapreduce \\
      --seeds 2 --problems 1200 --report
  python scripts/mapreduce_accuracy.py --runs runs/a/parallel runs/a/sequential --out runs/again
"""

MODELS = ("parallel", "sequential")
PACKINGS = {"parallel": "branches", "sequential": "documents"}
RECIPE = "multiverse-tiny"
# Problems that one model solves before the other takes its turn.
TURN = 48


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="folder of runs and outputs")
    p.add_argument("--recipe", help=f"of the parallel model; default {RECIPE}")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train.py")
    p.add_argument("--seeds", type=int, help="pairs to train, from the recipe's seed on; default 1")
    p.add_argument(
        "--runs", type=Path, nargs=2, action="append", metavar=("PARALLEL", "SEQUENTIAL"),
        help="finished runs to take instead of training; once for every pair",
    )  # fmt: skip
    p.add_argument("--problems", type=int, default=300, help="held out, for each pair; default 300")
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
    from hackle.zoo.local_path import local_path

    args.out = local_path(args.out, "--out")
    until = time.monotonic() + (math.inf if args.seconds is None else args.seconds)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hackle").setLevel(logging.INFO)
    for name in ("problems", "max_new_tokens", "seeds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"{name}={value}; expected at least 1")
    if args.seconds is not None and args.seconds < 0:
        raise UserError(f"seconds={args.seconds:g}; expected at least 0")
    if args.runs is None:
        pairs = train(args, until)
        if pairs is None:
            print("stopped; the same command goes on")
            return 0
    else:
        for name in ("recipe", "set", "seeds"):
            if getattr(args, name):
                raise UserError(f"--{name} is for training; expected none with --runs")
        pairs = by_seed(args, [dict(zip(MODELS, folders, strict=True)) for folders in args.runs])
    found = solve(args, pairs, until)
    table = rows(found)
    print(f"\n{report.table(table)}\n\n{gap(found)}")
    if min(len(one) for pair in found.values() for one in pair.values()) < args.problems:
        print("stopped before all problems were solved; the same command goes on")
    if args.report:
        write_report(args, pairs, found, table)
    return 0


# The run folders of a pair, and what its models wrote, by `MODELS`; pairs are known by their seed.
Pair = dict[str, Path]
Outcomes = dict[str, "list[Outcome]"]


def train(args: argparse.Namespace, until: float) -> dict[int, Pair] | None:
    """Trains all pairs; None when it was stopped before.

    Raises:
      UserError: the recipe is of no model that branches on generated problems.
    """
    from hackle import pjit_configs
    from hackle.zoo.errors import UserError
    from hackle.zoo.mapreduce import SETS
    from hackle.zoo.train.loop import run as train_one
    from hackle.zoo.train.plan import model_config
    from hackle.zoo.train.recipes import recipe, sequential

    first = recipe(args.recipe or RECIPE).set(args.set)
    if first.corpus not in SETS or first.packing != PACKINGS["parallel"]:
        raise UserError(
            f"corpus={first.corpus!r} with packing={first.packing!r}; "
            f"expected one of {', '.join(SETS)} with packing={PACKINGS['parallel']!r}"
        )
    config = model_config(first, pjit_configs.preset(first.preset))
    require_room(args, first.corpus, config.max_length)
    pairs = {}
    for seed in range(first.seed, first.seed + (args.seeds or 1)):
        one = first.replace(seed=seed)
        pairs[seed] = {name: args.out / f"seed-{seed}" / name for name in MODELS}
        for name, wanted in zip(MODELS, (one, sequential(one)), strict=True):
            print(f"\n=== {name}, seed {seed} ===", flush=True)
            left = until - time.monotonic()
            done = train_one(wanted, pairs[seed][name], seconds=None if math.isinf(left) else left)
            if not done.finished:
                return None
    return pairs


def require_room(args: argparse.Namespace, corpus: str, most: int) -> None:
    """Raises UserError where a prompt and its answer could be longer than a model can read."""
    from hackle.zoo.errors import UserError
    from hackle.zoo.mapreduce import kinds_of, sets

    kinds = kinds_of(corpus)
    asked = (sets.problem(kinds, "validation", index).prompt for index in range(args.problems))
    longest = max(map(len, asked))
    if longest + args.max_new_tokens > most:
        raise UserError(
            f"max_new_tokens={args.max_new_tokens}; expected at most {most - longest}, since the "
            f"model reads {most} tokens and prompts have up to {longest}"
        )


def by_seed(args: argparse.Namespace, pairs: list[Pair]) -> dict[int, Pair]:
    """Pairs by the seed of their recipe.

    Raises:
      UserError: two that are no pair, pairs that differ in more than their seeds, or models that
        cannot write as many tokens as asked for.
    """
    from hackle.zoo.errors import UserError

    found: dict[int, Pair] = {}
    known: list[dict[str, Any]] = []
    for pair in pairs:
        runs = identities(pair)
        require_pair(pair, runs)
        known.append(runs["parallel"]["recipe"])
        seed = known[-1]["seed"]
        if seed in found:
            raise UserError(f"--runs: two pairs of seed {seed}; expected another seed for each")
        found[seed] = pair
        folders = (pairs[0]["parallel"], pair["parallel"])
        require_same(folders, (known[0], known[-1]), but="seed")
    # One model and one corpus, whatever the seed.
    require_room(args, known[0]["corpus"], runs["parallel"]["model"]["config"]["max_length"])
    return found


def require_pair(pair: Pair, runs: dict[str, dict[str, Any]]) -> None:
    """Raises UserError unless two runs are twins, trained on the problems that there are now."""
    from hackle.zoo.errors import UserError
    from hackle.zoo.mapreduce import SETS, fingerprint

    recipes = [runs[name]["recipe"] for name in MODELS]
    for name, one in zip(MODELS, recipes, strict=True):
        if one["corpus"] not in SETS or one["packing"] != PACKINGS[name]:
            raise UserError(
                f"{pair[name]}: corpus={one['corpus']!r} with packing={one['packing']!r}; "
                f"expected generated problems with packing={PACKINGS[name]!r}"
            )
        if runs[name]["data"] != fingerprint(SETS[one["corpus"]], tagged=name == "parallel"):
            raise UserError(f"{pair[name]}: trained on problems of another release; train it anew")
    require_same(list(pair.values()), recipes, but="packing")


def require_same(folders: Sequence[Path], recipes: Sequence[dict[str, Any]], *, but: str) -> None:
    """Raises UserError where two recipes differ in more than `but` and where they ran."""
    from hackle.zoo.errors import UserError

    a, b = recipes
    found = {key for key in a | b if a.get(key) != b.get(key)}
    if found := found - {but, "workers", "data_dir", "attention"}:
        raise UserError(f"{' and '.join(map(str, folders))} differ in {sorted(found)}")


def identities(pair: Pair) -> dict[str, dict[str, Any]]:
    """What the run folders of a pair hold, as JSON has it: recipe, model and data.

    Raises:
      UserError: a run that did not come to its end.
    """
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.checkpoint import RunFolder

    found = {}
    for name, folder in pair.items():
        run = RunFolder(folder)
        step = run.latest()
        if step is None:
            raise UserError(f"{folder} holds no checkpoint of a run")
        found[name] = run.identity(step)
        if step != (last := found[name]["recipe"]["steps"]):
            raise UserError(f"{folder}: stopped at step {step}; expected a run of all {last} steps")
    return found


def solve(args: argparse.Namespace, pairs: dict[int, Pair], until: float) -> dict[int, Outcomes]:
    """Lets both models of a pair solve problems in turns, so that both have had the same ones."""
    from hackle.zoo.train.report import Progress

    found: dict[int, Outcomes] = {seed: {name: [] for name in MODELS} for seed in pairs}
    progress = Progress(0, len(pairs) * len(MODELS) * args.problems)

    def tell(seed: int, name: str, done: "list[Outcome]") -> None:
        found[seed][name] = done
        right = (f"{n} {sum(o.correct for o in x)}/{len(x)}" for n, x in found[seed].items())
        count = sum(len(x) for pair in found.values() for x in pair.values())
        progress.update(count, f"seed {seed}: {', '.join(right)}")

    for seed, pair in pairs.items():
        solve_pair(args, pair, args.out / f"seed-{seed}", until, functools.partial(tell, seed))
    progress.close()
    return found


def solve_pair(
    args: argparse.Namespace,
    pair: Pair,
    out: Path,
    until: float,
    tell: Callable[[str, "list[Outcome]"], None],
) -> None:
    """Goes on with what is in `out`; a model is loaded when it is asked."""
    from hackle.zoo.mapreduce import evaluation, kinds_of
    from hackle.zoo.train.checkpoint import load_model

    @functools.cache
    def decoder(name: str) -> evaluation.Decoder:
        model = load_model(pair[name])
        return evaluation.DECODERS[name](model, max_new_tokens=args.max_new_tokens)

    runs = identities(pair)
    require_asked(runs | {"max_new_tokens": args.max_new_tokens}, out)
    kinds = kinds_of(runs["parallel"]["recipe"]["corpus"])
    for turn in range(TURN, args.problems + TURN, TURN):
        for name in MODELS:
            done = evaluation.evaluate(
                functools.partial(decoder, name),
                kinds,
                out / f"{name}.jsonl",
                problems=min(turn, args.problems),
                tagged=name == "parallel",
                until=until,
                tell=functools.partial(tell, name),
            )
            tell(name, done)


def require_asked(asked: dict[str, Any], out: Path) -> None:
    """Raises UserError where `out` holds outcomes of other runs; else says whose they will be."""
    from hackle.zoo.errors import UserError

    text = json.dumps(asked, indent=1) + "\n"
    path = out / "asked.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise UserError(f"{out} holds outcomes of other runs or limits; choose another --out")


def rows(found: dict[int, Outcomes]) -> list[dict[str, Any]]:
    """The table: each model on all problems, on those of every kind, and of every seed."""
    from hackle.zoo.mapreduce.evaluation import summary

    every = {name: [one for pair in found.values() for one in pair[name]] for name in MODELS}
    parts = {"all": every}
    for kind in dict.fromkeys(one.kind for name in MODELS for one in every[name]):
        parts[kind] = {n: [one for one in x if one.kind == kind] for n, x in every.items()}
    if len(found) > 1:
        parts |= {f"seed {seed}": pair for seed, pair in found.items()}
    return [
        {"problems of": part, "model": name, **summary(some)}
        for part, outcomes in parts.items()
        for name, some in outcomes.items()
    ]


def gap(found: dict[int, Outcomes]) -> str:
    """The difference in accuracy, in words."""
    from hackle.zoo.mapreduce.evaluation import difference

    pairs = [(pair["parallel"], pair["sequential"]) for pair in found.values()]
    count, mean, error = difference(pairs)
    several = ", means over the seeds," * (len(pairs) > 1)
    return (
        f"Accuracy of the parallel model less that of its twin{several} on {count} problems that "
        f"both were given: {mean:+.2f} % (standard error {error:.2f}, of the choice of problems)."
    )


def faults(found: "list[Outcome]") -> list[dict[str, Any]]:
    """What is wrong with outputs that are not well formed, and how often."""
    counts = Counter(one.fault for one in found if not one.well_formed)
    return [{"fault": fault, "outputs": count} for fault, count in counts.most_common(8)]


def curves(pairs: dict[int, Pair]) -> list[dict[str, Any]]:
    """Validation over the training, means over the seeds: one row a check."""
    from hackle.zoo.train.report import read_metrics

    found: dict[int, dict[str, list[float]]] = {}
    for pair in pairs.values():
        for name, folder in pair.items():
            for entry in read_metrics(folder):
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
    pairs: dict[int, Pair],
    found: dict[int, Outcomes],
    table: list[dict[str, Any]],
) -> None:
    import jax

    from hackle.zoo.train.report import plot_losses

    recipe = identities(next(iter(pairs.values())))["parallel"]["recipe"]
    written = [one for pair in found.values() for one in pair["parallel"]]
    checks, wrong = curves(pairs), faults(written)
    example = next((one for one in written if one.correct), None)
    several = f"{len(pairs)} pairs, each of other first weights and training problems. "
    text = (
        f"{several * (len(pairs) > 1)}"
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
        record={"recipe": recipe, "seeds": list(pairs), "rows": table, "curves": checks},
    )
    labels = {
        f"{name}, seed {seed}" if len(pairs) > 1 else name: folder
        for seed, pair in pairs.items()
        for name, folder in pair.items()
    }
    plot = plot_losses(labels, path.with_suffix(".png"))
    print(f"report: {path}\nplot: {plot}")


if __name__ == "__main__":
    run(main)
