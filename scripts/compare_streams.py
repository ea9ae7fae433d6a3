"""Trains one recipe at several numbers of streams on the same tokens, and compares the losses.

Each run goes to OUT/p<P>; the same command again goes on or reuses what is finished.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import report
from cli import run

EXAMPLES = """examples:
  python scripts/compare_streams.py --recipe parscale-tiny --streams 1 4 --out runs/tiny
  python scripts/compare_streams.py --recipe parscale-small --streams 1 2 4 8 --control \\
      --out runs/small --report
"""

# Two streams without prefixes are equal: they compute what one does, twice.
CONTROL = "2-without-prefix"


@dataclasses.dataclass(frozen=True)
class Result:
    """One run of the comparison; `name` is its number of streams, or `CONTROL`."""

    name: str
    parameters: int
    summary: Any


def compare(recipes: dict[str, Any], out: Path) -> list[Result]:
    """Trains `recipes` (name -> recipe) one after the other into `out/p<name>`."""
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.loop import run as train
    from hackle.zoo.train.plan import Plan

    seen = {(r.steps, r.batch, r.length, r.seed, r.corpus, r.packing) for r in recipes.values()}
    if len(seen) > 1:
        raise UserError(f"the recipes do not see the same tokens: {sorted(map(str, seen))}")
    if any(not recipe.eval_batches for recipe in recipes.values()):
        raise UserError("eval_batches=0 leaves nothing to compare; expected at least 1")
    # All are checked before the first is trained.
    sizes = {name: Plan(recipe).config.parameter_count() for name, recipe in recipes.items()}
    results = []
    for name, recipe in recipes.items():
        print(f"\n=== P = {name} ===", flush=True)
        summary = train(recipe, out / f"p{name}")
        if not summary.finished:
            print("stopped; the same command goes on")
            raise SystemExit(0)
        results.append(Result(name, sizes[name], summary))
    return results


def rows(results: list[Result]) -> list[dict[str, Any]]:
    """The table: one row a run."""
    base = results[0].summary.validation_loss
    return [
        {
            "P": r.name,
            "parameters": r.parameters,
            "validation loss": r.summary.validation_loss,
            f"against P={results[0].name}": r.summary.validation_loss - base,
            "training loss": r.summary.loss,
            "tokens/s": None
            if r.summary.tokens_per_second is None
            else round(r.summary.tokens_per_second),
            "MFU %": None if r.summary.mfu is None else 100 * r.summary.mfu,
            "waiting for input %": None
            if r.summary.input_wait is None
            else 100 * r.summary.input_wait,
            "skipped steps": r.summary.skipped,
        }
        for r in results
    ]


def plot(results: list[Result], out: Path) -> Path:
    """Loss curves of all runs in one picture, OUT/loss.png."""
    from hackle.zoo.train.report import plot_losses

    return plot_losses({f"P={r.name}": out / f"p{r.name}" for r in results}, out / "loss.png")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--recipe", required=True, help="name without -p<P>, e.g. parscale-tiny")
    p.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="default 1 2 4 8")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in train.py")
    p.add_argument("--out", type=Path, required=True, help="folder of the runs")
    p.add_argument(
        "--control",
        action="store_true",
        help="also P=2 without prefixes, which equals P=1: what P=2 gains is due to the prefixes",
    )
    p.add_argument("--report", action="store_true", help="write reports/streams_<hardware>_<date>")
    p.add_argument("--note", default="", help="a paragraph for the report")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.train.recipes import recipe

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hackle").setLevel(logging.INFO)
    recipes = {str(p): recipe(f"{args.recipe}-p{p}").set(args.set) for p in args.streams}
    if args.control:
        twice = recipe(f"{args.recipe}-p2").set(args.set)
        recipes[CONTROL] = twice.replace(overrides={"prefix_length": 0}, export=False)
    results = compare(recipes, args.out)
    table = rows(results)
    picture = plot(results, args.out)
    print(f"\n{report.table(table)}\nplot: {picture}")
    if args.report:
        write_report(args.recipe, recipes, table, args.out, args.note)
    return 0


def write_report(
    name: str, recipes: dict[str, Any], table: list[dict], out: Path, note: str
) -> None:
    import jax

    from hackle.zoo.train.report import read_metrics
    from hackle.zoo.train.source import Source

    first = next(iter(recipes.values()))
    curves = []
    checks = {
        p: {e["step"]: e["validation_loss"] for e in read_metrics(out / f"p{p}")
            if "validation_loss" in e}
        for p in recipes
    }  # fmt: skip
    for step in sorted(next(iter(checks.values()))):
        curves.append({"step": step, "tokens": step * first.batch * first.length}
                      | {f"P={p}": checks[p].get(step) for p in recipes})  # fmt: skip
    text = (
        f"Recipe `{name}`: {first.steps:,} steps of {first.batch} x {first.length} tokens "
        f"({first.tokens:,} in all), the same tokens in the same order for every P. "
        f"{Source(first).description}. Losses are mean nats a token."
    )
    path = report.write(
        "streams",
        jax.devices()[0].device_kind,
        title="Validation loss against the number of streams, at equal tokens",
        sections=[
            text,
            report.table(table),
            *([note] if note else []),
            "Validation loss over the run:",
            report.table(curves),
        ],
        record={"recipe": first.to_json(), "rows": table, "curves": curves},
    )
    print(f"report: {path}")


if __name__ == "__main__":
    run(main)
