"""Sets finished runs of train.py side by side: losses, how far apart the curves are, and speed."""

import argparse
import json
from pathlib import Path
from typing import Any

import report
from cli import report_name, run

EXAMPLES = """examples:
  python scripts/compare_runs.py runs/fused runs/scan
  python scripts/compare_runs.py runs/fused runs/scan --steps 50 --report methods
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", type=Path, nargs="+", help="folders of runs; the first is the measure")
    p.add_argument("--steps", type=int, help="of the curves to compare; default all")
    p.add_argument("--report", type=report_name, metavar="NAME",
                   help="write reports/<NAME>_<hardware>_<date>.md")  # fmt: skip
    p.add_argument("--note", default="", help="a paragraph for the report")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.report import plot_losses

    names = [folder.name for folder in args.runs]
    if len(set(names)) < len(names):
        raise UserError(f"runs are told apart by the names of their folders, got {names}")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}; expected at least 1")
    curves = {folder.name: losses(folder, args.steps) for folder in args.runs}
    table = rows(args.runs, curves)
    picture = plot_losses(dict(zip(names, args.runs, strict=True)), args.runs[0] / "compared.png")
    print(f"{report.table(table)}\nplot: {picture}")
    if args.report is not None:
        write_report(args, table, curves)
    return 0


def losses(folder: Path, steps: int | None) -> dict[int, float]:
    """Training loss by step, of the first `steps`.

    Raises:
      UserError: there are none.
    """
    from hackle.zoo.errors import UserError
    from hackle.zoo.train.report import METRICS, read_metrics

    found = {
        entry["step"]: entry["loss"]
        for entry in read_metrics(folder)
        if entry.get("loss") is not None and (steps is None or entry["step"] <= steps)
    }
    if not found:
        raise UserError(f"{folder} holds no losses; expected a run with {METRICS}")
    return found


def rows(folders: list[Path], curves: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """The table: one row a run; the last column is over the steps that both runs have."""
    first = curves[folders[0].name]
    found = []
    for folder in folders:
        curve = curves[folder.name]
        both = first.keys() & curve.keys()
        file = folder / "summary.json"
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        speed, mfu = summary.get("tokens_per_second"), summary.get("mfu")
        found.append(
            {
                "run": folder.name,
                "steps": max(curve),
                "first loss": curve[min(curve)],
                "last loss": curve[max(curve)],
                "validation loss": summary.get("validation_loss"),
                "tokens/s": None if speed is None else round(speed),
                "MFU %": None if mfu is None else 100 * mfu,
                f"furthest from {folders[0].name}": (
                    f"{max(abs(curve[s] - first[s]) for s in both):.1e}" if both else None
                ),
            }
        )
    return found


def write_report(args: argparse.Namespace, table: list[dict], curves: dict[str, dict]) -> None:
    import jax

    last = max(max(curve) for curve in curves.values())
    shown = [s for s in range(1, last + 1) if s % max(1, last // 15) == 0 or s in (1, last)]
    points = [
        {"step": s} | {name: _exact(curve.get(s)) for name, curve in curves.items()} for s in shown
    ]
    path = report.write(
        args.report,
        jax.devices()[0].device_kind,
        title="Runs side by side",
        sections=[
            "Losses are mean nats a token of the batch of that step; speed is without compilation, "
            "validation and saving.",
            report.table(table),
            *([args.note] if args.note else []),
            "Training loss:",
            report.table(points),
        ],
        record={"rows": table, "curves": curves},
    )
    print(f"report: {path}")


def _exact(loss: float | None) -> str | None:
    return None if loss is None else f"{loss:.5f}"


if __name__ == "__main__":
    run(main)
