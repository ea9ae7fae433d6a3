"""Trains a model from a recipe, or goes on where an earlier call stopped."""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from cli import run

EXAMPLES = """examples:
  python scripts/train.py --list
  python scripts/train.py --recipe parscale-tiny-p4 --out runs/p4
  python scripts/train.py --recipe parscale-tiny-p4 --set steps=1000 --set batch=32 --out runs/long
  python scripts/train.py --recipe parscale-tiny-p4 --set model.depth=2 --dry-run
  python scripts/train.py --recipe parscale-tiny-p4 --set corpus=path/to/folder --out runs/mine

The same command again resumes a run that was stopped (Ctrl-C and SIGTERM save first), or says that
it is finished. Two stages:
  python scripts/train.py --recipe parscale-tiny-stage1 --out runs/trunk
  python scripts/train.py --recipe parscale-tiny-stage2-p4 --set start_from=runs/trunk --out runs/p4
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--recipe", help="name of a recipe; see --list")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field of the recipe, or model.FIELD of the model; may be given repeatedly",
    )
    add("--out", type=Path, help="folder of the run: checkpoints, metrics, plot, model")
    add("--seed", type=int, help="of parameters and data order; as --set seed=")
    add(
        "--resume",
        choices=["auto", "must", "never"],
        default="auto",
        help="go on from a checkpoint in --out: if there is one (auto), only so, or not at all",
    )
    add(
        "--distributed",
        nargs="?",
        const="",
        metavar="HOST:PORT,COUNT,INDEX",
        help="be one of several processes, as on a TPU slice of several hosts, where each runs "
        "this command with an --out that all see; the address of process 0, how many there are "
        "and which one this is are found out on Cloud TPU and under Slurm",
    )
    add("--dry-run", action="store_true", help="print what the run would be, and stop")
    add("--list", action="store_true", help="list recipes and their fields, and stop")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.recipes import recipe

    if args.list:
        return list_all()
    if args.distributed is not None:
        join(args.distributed)
    if args.recipe is None:
        raise UserError("give --recipe NAME; --list shows the names")
    chosen = recipe(args.recipe).set(args.set)
    if args.seed is not None:
        chosen = chosen.replace(seed=args.seed)
    if args.dry_run:
        return dry_run(chosen)
    if args.out is None:
        raise UserError("give --out DIR, where the run goes; or --dry-run")

    from hackle.zoo.train.loop import NonFiniteError
    from hackle.zoo.train.loop import run as train

    try:
        summary = train(chosen, args.out, resume=args.resume)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    import jax

    if jax.process_index() == 0:
        for line in describe(summary):
            print(line)
    return 0


def join(place: str) -> None:
    """Becomes one process of several: `place` is HOST:PORT,COUNT,INDEX, or empty if it is known.

    Raises:
      UserError: it is not of that form, or it is empty and nothing tells.
    """
    import jax

    from hackle.zoo.errors import UserError

    address, *numbers = place.split(",")
    if place and not (len(numbers) == 2 and all(n.isdigit() for n in numbers)):
        raise UserError(f"--distributed {place!r}; expected HOST:PORT,COUNT,INDEX")
    try:
        jax.distributed.initialize(address or None, *map(int, numbers))
    except (RuntimeError, ValueError) as error:
        hint = "" if place else "; no cluster tells, so give HOST:PORT,COUNT,INDEX"
        raise UserError(f"--distributed {place}: {error}{hint}") from error


def describe(summary) -> list[str]:
    """Lines about how a run ended."""
    lines = []
    seen = f"after {summary.step} steps, {summary.tokens:,} tokens"
    if summary.validation_loss is not None:
        lines.append(f"validation loss: {summary.validation_loss:.4f} {seen}")
    if summary.loss is not None:
        lines.append(f"training loss: {summary.loss:.4f} {seen}")
    if summary.tokens_per_second is not None:
        speed = f"speed: {summary.tokens_per_second:,.0f} tokens/s"
        if summary.mfu is not None:
            speed += f", MFU {100 * summary.mfu:.1f} %"
        lines.append(f"{speed}, {100 * summary.input_wait:.1f} % of it waiting for input")
    if summary.skipped:
        lines.append(f"skipped: {summary.skipped} steps that were not finite")
    for name in ("checkpoint", "model", "plot"):
        if getattr(summary, name) is not None:
            lines.append(f"{name}: {getattr(summary, name)}")
    return lines


def dry_run(recipe) -> int:
    from hackle.zoo.train.plan import Plan

    plan = Plan(recipe)
    for line in plan.describe():
        print(line)
    parts = plan.program.device_bytes()
    total = sum(parts.values())
    room = plan.preset.hbm_bytes
    print(
        "memory of a device: "
        + " + ".join(f"{name} {size(count)}" for name, count in parts.items())
        + f" = {size(total)}, without activations"
        + (f"; it has {size(room)}" if room else "")
    )
    print(f"logits: computed in {plan.program.loss_pieces} pieces of a row")
    decayed, kept = plan.decay_groups()
    print(f"weight decay {recipe.weight_decay:g} on: {', '.join(decayed) or 'nothing'}")
    print(f"no weight decay on: {', '.join(kept) or 'nothing'}")
    print("dry run: nothing was computed")
    return 0


def size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def list_all() -> int:
    from hackle.zoo.train.recipe import Recipe, field_names
    from hackle.zoo.train.recipes import RECIPES

    width = max(map(len, RECIPES))
    print("recipes:")
    for name, make in RECIPES.items():
        r = make()
        trained = "" if r.mode == "all" else f", {r.mode}"
        stage = " from another run" if r.start_from else ""
        print(
            f"  {name:{width}}  {r.model}{stage}, {r.corpus}, {r.steps} x {r.batch} x {r.length} "
            f"tokens, {r.preset}{trained}"
        )
    print("fields for --set, with their defaults:")
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for name in field_names():
        if name != "overrides":
            print(f"  {name}={defaults[name]}")
    print("  model.FIELD: of the model's config")
    return 0


def show_log() -> None:
    """Lets the library say, on stderr, which attention it chose and why."""
    log = logging.getLogger("hackle")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


if __name__ == "__main__":
    show_log()
    run(main)
