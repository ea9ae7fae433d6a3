"""Speed of the recurrent layers against the memory roof, the plain scan, and a rival's kernels.

What is timed is checked first: some channels of the very call that is timed, at all times, against
a float64 recurrence. A row whose check fails has no speed, and the exit code is 1.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import recurrent_rival
import report
from cli import report_option, run, sizes
from clock import ROUNDS
from hackle.zoo.errors import UserError
from recurrent_devices import devices_row
from recurrent_rows import (
    DTYPES,
    HEADS,
    SAMPLED,
    STATES,
    UNROLLED,
    Case,
    compile_ahead,
    copy_rate,
    layer_row,
    recurrence_row,
)
from rows import measured

EXAMPLES = """examples:
  python scripts/bench_recurrent.py --quick
  python scripts/bench_recurrent.py --rival path/to/ml-pararnn --seconds 480 --report
  python scripts/bench_recurrent.py --cells gru --shapes 8x1024 --lengths 2048 --dtypes float32 \\
      --methods auto newton shooting scan --layers --scan
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(p.add_argument, nargs="+")
    add("--cells", choices=STATES, default=list(STATES), help="default: both")
    add("--dtypes", choices=DTYPES, default=list(DTYPES), help="default: both")
    add(
        "--methods",
        default=["auto"],
        help="auto (default: what the layers choose), fused, shooting, newton, scan",
    )
    add = functools.partial(p.add_argument, nargs="*")
    add("--shapes", type=sizes("BxD"), metavar="BxD", help="of the table; none: no table")
    add("--lengths", type=int, metavar="T", help="of the table")
    add = functools.partial(add, type=sizes("BxDxT"), metavar="BxDxT")
    add("--layers", help="whole layers, by the first of --methods alone; none: no such table")
    first = "by the first of --methods and of --dtypes alone"
    add("--scan", help=f"sizes to compare with a plain scan, {first}")
    add("--devices", help=f"sizes to split over all devices, {first}")
    add = p.add_argument
    add("--quick", action="store_true", help="one small size where none is given")
    add("--rival", type=Path, help="built checkout of ml-pararnn to time beside us (CUDA, torch)")
    add("--seconds", type=float, default=480, help="start no row after this, default %(default)s")
    report_option(p, "recurrent")
    return p


# Columns that are no numbers: what a note begins with.
NOTES = {"failed": "FAILED, ", "skipped": "skipped, ", "rival note": "rival: "}
FULL = {
    "shapes": [(1, 1024), (8, 1024), (8, 4096), (32, 4096)],
    "lengths": [512, 2048, 8192, 32768],
    "layers": [(8, 1024, 2048), (8, 1024, 8192), (8, 4096, 2048)],
    "scan": [(8, 1024, 8192)],
    "devices": [],
}
QUICK = {
    "shapes": [(8, 128)],
    "lengths": [256],
    "layers": [(4, 128, 128)],
    "scan": [(8, 128, 256)],
    "devices": [],
}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name, default in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    # Nearly all of the memory, but for the rival's; read when the devices are first used.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.84" if args.rival else "0.95"
    import jax

    from hackle.layers.recurrent.dispatch import METHODS

    known = ("auto", *METHODS)
    if unknown := [m for m in args.methods if m not in known]:
        raise UserError(f"--methods {unknown[0]!r} is unknown; expected some of {', '.join(known)}")
    if args.lengths and min(args.lengths) < 1:
        raise UserError(f"--lengths {min(args.lengths)} is too small; expected at least 1")
    if wrong := [s for s in args.layers if s[1] % HEADS]:
        raise UserError(f"--layers width {wrong[0][1]} is not divisible by {HEADS} heads")
    devices = jax.device_count()
    if args.devices and devices < 2:
        raise UserError("--devices needs at least two, there is one")
    if wrong := [s for s in args.devices if s[2] % devices]:
        raise UserError(f"--devices: T {wrong[0][2]} does not divide over {devices} devices")
    rival = None if args.rival is None else recurrent_rival.load(args.rival)
    start = time.monotonic()
    rate = copy_rate()
    device = jax.devices()[0].device_kind
    print(f"{device}: copies at {rate / 1e9:,.0f} GB/s", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {"layers": [], "scan": [], "devices": [], "table": []}
    left_out = 0
    programs = {}
    for section in ("scan", "table"):
        some = [case for of, case in cases(args) if of == section]
        programs |= compile_ahead(some, backward=section == "table")
    for section, case in cases(args):
        if time.monotonic() - start > args.seconds:
            left_out += 1
            continue
        # One method has the rival beside it; what compares methods needs none.
        beside = (
            rival if section in ("table", "layers") and case.method == args.methods[0] else None
        )
        row = dataclasses.asdict(case) | measured(
            functools.partial(fill, section, case, rate, beside, programs), beside
        )
        rows[section].append(row)
        print(json.dumps({"section": section} | row), flush=True)
    if left_out:
        print(f"{left_out} rows not started after {args.seconds:g} s", flush=True)
    sections = pages(rows, rate, left_out)
    print("\n\n".join(sections))
    if args.report is not None:
        path = report.write(
            "recurrent",
            device,
            name=args.report,
            title="Speed of the recurrent layers",
            sections=sections,
            record={"copy bytes/s": round(rate), "left out": left_out, **rows},
        )
        print(f"report: {path}")
    return int(any(row["failed"] for some in rows.values() for row in some))


def fill(section: str, case: Case, rate: float, rival, programs, row: dict[str, Any]) -> None:
    """Fills `row`, as far as it comes.

    Args:
      rate: bytes per second of a copy.
      rival: a `recurrent_rival.Rival` to run beside ours, or None.
      programs: what was compiled ahead.
    """
    if section == "layers":
        layer_row(case, row, rival)
    elif section == "devices":
        devices_row(case, row)
    else:
        recurrence_row(case, row, rate, rival, programs, backward=section == "table")


def cases(args):
    """(section, case), what matters most first: time may run out."""
    for size, cell, dtype in itertools.product(args.layers, args.cells, args.dtypes):
        yield "layers", Case(cell, *size, dtype, args.methods[0])
    for size, cell in itertools.product(args.scan, args.cells):
        for method in dict.fromkeys((args.methods[0], "scan")):
            yield "scan", Case(cell, *size, args.dtypes[0], method)
    for size, cell in itertools.product(args.devices, args.cells):
        yield "devices", Case(cell, *size, args.dtypes[0], args.methods[0])
    table = [
        Case(cell, *size, length, dtype, method)
        for method in args.methods
        for dtype in args.dtypes
        for size in args.shapes
        for length in args.lengths
        for cell in args.cells
    ]
    order = {name: i for i, name in enumerate((*args.methods, *args.dtypes))}
    table.sort(key=lambda c: (order[c.method], order[c.dtype], c.size))
    yield from (("table", case) for case in table)


def pages(rows: dict[str, list[dict[str, Any]]], rate: float, left_out: int) -> list[str]:
    """Text and tables."""
    text = [
        f"Copies run at {rate / 1e9:,.0f} GB/s here (an elementwise JAX operation, bytes read and "
        "written). The floor of a row is the bytes it cannot avoid over that rate: s(3 + n) "
        "forward and s(3 + n + 1 + 3) backward per batch row, time and channel, with s bytes a "
        "number and n arrays of state (1 in a GRU, 2 in an LSTM). State weights are 0.5 N(0, 1), "
        "pre-activations N(0, 1), first states random. Medians of "
        f"{ROUNDS} rounds of calls; inputs that would stay in the cache are rotated. A short "
        f"one is timed as {UNROLLED} in one program, and a GPU's clock starts when calls wait in "
        "its queue, so that the host's time does not count. "
        f"Errors: largest of {SAMPLED} channels in all rows and at all times against float64; of "
        "gradients (pre-activations, weights, first state) over the largest entry. The rival's raw "
        "kernels start from zero and give no final state; its adjoint is the solve alone, without "
        "gradients of pre-activations and weights."
    ]
    if left_out:
        text.append(f"{left_out} rows were not started for want of time.")
    size = {"cell": "cell", "batch": "B", "width": "D", "length": "T", "dtype": "dtype"}
    size["method"] = "method"
    forward = {
        "forward ms": "ms",
        "forward GB/s": "GB/s",
        "forward floor ms": "floor ms",
        "forward / floor": "x floor",
        "error": "error",
        "rival ms": "rival ms",
        "rival / ours": "rival / ours",
        "rival error": "rival error",
    }
    both = {
        "both ms": "ms",
        "both GB/s": "GB/s",
        "both floor ms": "floor ms",
        "both / floor": "x floor",
        "gradient error": "error",
        "rival adjoint ms": "rival adjoint ms",
        "rival adjoint error": "rival adjoint error",
    }
    layer = {
        "forward ms": "forward ms",
        "both ms": "forward + backward ms",
        "error": "error",
        "rival forward ms": "rival forward ms",
        "rival both ms": "rival forward + backward ms",
        "rival / ours": "rival / ours",
        "rival error": "rival error",
        "rival steps ms": "rival step by step, forward ms",
        "rival steps / ours": "step by step / ours",
    }
    if rows["table"]:
        text += ["Forward of the recurrence:", report.columns(rows["table"], size | forward)]
        text += [
            "Forward and backward of the recurrence:",
            report.columns(rows["table"], size | both),
        ]
    ratios = [row["rival / ours"] for row in rows["table"] if "rival / ours" in row]
    if ratios:
        text.append(
            f"The rival's forward kernel over ours, {len(ratios)} sizes: at least "
            f"{min(ratios):.2f}, geometric mean {statistics.geometric_mean(ratios):.2f}."
        )
    if rows["scan"]:
        text += ["Forward, beside one step after the other:"]
        text += [
            report.columns(with_speedup(rows["scan"]), size | forward | {"against scan": "x scan"})
        ]
    if rows["devices"]:
        spread = {"devices": "devices"}
        spread |= {f"{name} {what} ms": f"{what}, {name}, ms" for what in ("forward", "both")
                  for name in ("one device", "all devices")}  # fmt: skip
        spread |= {f"{what} speedup": f"{what}, times faster" for what in ("forward", "both")}
        spread |= {"error": "error", "gradient error": "gradient error"}
        text += [
            "Time split over all devices, the same inputs again and again:",
            report.columns(rows["devices"], size | spread),
        ]
    if rows["layers"]:
        text += [
            f"The whole layer, {HEADS} heads, as wide inside as outside (error: of gradients, "
            "against the method scan, T at most 256, full matmul precision; timed at the default, "
            "TF32 for float32 on both sides):",
            report.columns(rows["layers"], size | layer),
        ]
    notes = [
        f"- {' '.join(str(row[k]) for k in size)}: {prefix}{row[key]}"
        for row in itertools.chain(*rows.values())
        for key, prefix in NOTES.items()
        if row.get(key)
    ]
    return text + ["\n".join(notes)] * bool(notes)


def with_speedup(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows beside their scan: how many times faster they are."""
    size = ("cell", "batch", "width", "length", "dtype")
    scans = {tuple(r[k] for k in size): r.get("forward ms") for r in rows if r["method"] == "scan"}
    found = []
    for row in rows:
        slow, fast = scans.get(tuple(row[k] for k in size)), row.get("forward ms")
        found.append(row | {"against scan": slow / fast if slow and fast else None})
    return found


if __name__ == "__main__":
    run(main)
