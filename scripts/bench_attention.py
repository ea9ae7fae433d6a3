"""Speed of attention under described masks, beside cuDNN's causal attention and FlexAttention.

What is timed is checked first: some rows of the very program that is timed against float32. A row
whose check fails has no speed, and the exit code is 1. Where PyTorch sees a GPU, its FlexAttention
and cuDNN attention run in the same call.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import time
from typing import Any

import attention_rival
import report
from attention_rows import DTYPES, KINDS, SAMPLED, Case, Tokens, compile_ahead, fill
from cli import report_option, run, sizes
from clock import ROUNDS
from hackle.zoo.errors import UserError
from rows import measured

EXAMPLES = """examples:
  python scripts/bench_attention.py --quick
  python scripts/bench_attention.py --seconds 480 --report
  python scripts/bench_attention.py --kinds branch quarter --sizes 1x32768 \\
      --implementations pallas_gpu torch-flex --report branches
"""

OURS = ("reference", "xla", "cudnn", "pallas_gpu", "pallas_tpu")
# By platform, what is measured where none is named.
USUAL = {"gpu": ("cudnn", "pallas_gpu"), "tpu": ("pallas_tpu",)}
CAUSAL_ONLY = ("cudnn", "torch-cudnn")
BASELINE = "cudnn"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(p.add_argument, nargs="+")
    add("--kinds", choices=KINDS, default=list(KINDS), help="of masks, default: all")
    add("--sizes", type=sizes("BxT"), metavar="BxT", help="batch and tokens")
    add(
        "--implementations",
        choices=(*OURS, *attention_rival.IMPLEMENTATIONS),
        help="default: the fast ones of this device, and those of PyTorch",
    )
    add = p.add_argument
    add("--heads", type=sizes("HxKxE"), metavar="HxKxE", help="query heads, key heads, width")
    add("--dtype", choices=DTYPES, help="default: bfloat16, with --quick float32")
    add("--quick", action="store_true", help="one small size where none is given")
    add("--seconds", type=float, default=480, help="start no row after this, default %(default)s")
    report_option(p, "attention")
    return p


FULL = {
    "sizes": [(2, 8192), (1, 32768), (1, 131072)],
    "heads": (16, 2, 128),
    "dtype": "bfloat16",
}
QUICK = {"sizes": [(1, 1024)], "heads": (4, 2, 64), "dtype": "float32"}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name, default in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    heads, key_heads, _ = args.heads
    if heads % key_heads:
        raise UserError(f"--heads {heads} query heads are no multiple of {key_heads} key heads")
    rival = attention_rival.load()
    named = args.implementations or ()
    if rival is None and (torch := [n for n in named if n.startswith("torch")]):
        raise UserError(f"--implementations {torch[0]} needs PyTorch with a GPU, there is none")
    # The rest is PyTorch's; read when the devices are first used.
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.95" if rival is None else "0.6"
    import jax

    if args.implementations is None:
        args.implementations = [*USUAL.get(jax.default_backend(), ("xla",))]
        if rival is not None:
            args.implementations += attention_rival.IMPLEMENTATIONS
    start = time.monotonic()
    device = jax.devices()[0].device_kind
    print(f"{device}: {', '.join(args.implementations)}", flush=True)
    rows: list[dict[str, Any]] = []
    left_out = 0
    for size in args.sizes:
        some = cases(args, size)
        late = time.monotonic() - start > args.seconds
        programs = {} if late else compile_ahead(some)
        for case in some:
            if time.monotonic() - start > args.seconds:
                left_out += 1
                continue
            row = dataclasses.asdict(case) | measured(
                functools.partial(fill, case, programs, rival), rival
            )
            rows.append(row)
            print(json.dumps(row), flush=True)
    if left_out:
        print(f"{left_out} rows not started after {args.seconds:g} s", flush=True)
    sections = pages(args, rows, left_out)
    print("\n\n".join(sections))
    if args.report is not None:
        path = report.write(
            "attention",
            device,
            name=args.report,
            title="Speed of attention",
            sections=sections,
            record={"left out": left_out, "rows": rows},
        )
        print(f"report: {path}")
    return int(any(row["failed"] for row in rows))


def cases(args, size: tuple[int, ...]) -> list[Case]:
    """Of one size: the baseline first, then mask after mask."""
    pairs = [
        (kind, name)
        for kind, name in itertools.product(args.kinds, args.implementations)
        if kind == "causal" or name not in CAUSAL_ONLY
    ]
    pairs.sort(key=lambda pair: pair != ("causal", BASELINE))
    return [Case(kind, *size, *args.heads, args.dtype, name) for kind, name in pairs]


def pages(args, rows: list[dict[str, Any]], left_out: int) -> list[str]:
    """Text and tables."""
    heads, key_heads, width = args.heads
    text = [
        f"{args.dtype}, {heads} query heads, {key_heads} key heads of width {width}. All masks are "
        "causal; `branch`: blocks of 256 shared tokens, 4 sibling paths of 448, 128 tokens after "
        "them; `quarter`: one block of 4 equal paths; `packed`: 8 documents of random lengths. "
        "TFLOP/s count visible pairs alone: 4 E H of them forward, 14 E H forward and backward. "
        f"Medians of {ROUNDS} rounds of calls. `x cudnn` is the time over that of the "
        "causal attention of cuDNN in JAX at the same size, `x flex` over that of FlexAttention "
        "with the same mask. Ours makes its plan of tiles in every call; the block mask of "
        f"FlexAttention is made once, before its clock starts. Errors: relative, of some {SAMPLED} "
        "rows of queries, and of gradients of a loss on them, against float32. MiB: what the "
        "program needs besides its arguments and results."
    ]
    if left_out:
        text.append(f"{left_out} rows were not started for want of time.")
    head = {"kind": "mask", "batch": "B", "length": "T", "implementation": "implementation"}
    for what, name in (("forward", "Forward:"), ("both", "Forward and backward:")):
        found = with_ratios(rows, what)
        if found:
            error = "error" if what == "forward" else "gradient error"
            columns = {
                "area": "visible",
                f"{what} ms": "ms",
                f"{what} TFLOP/s": "TFLOP/s",
                "over baseline": "x cudnn",
                "over flex": "x flex",
                error: "error",
                f"{what} MiB": "MiB",
            }
            text += [name, report.columns(found, head | columns)]
    notes = [
        f"- {' '.join(str(row[k]) for k in head)}: {word}, {row[key]}"
        for row in rows
        for key, word in (("failed", "FAILED"), ("skipped", "skipped"))
        if row[key]
    ]
    return text + ["\n".join(notes)] * bool(notes)


def with_ratios(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Rows that have a time, beside the baseline and FlexAttention of their size."""
    times = {
        (r["kind"], r["batch"], r["length"], r["implementation"]): r[f"{what} ms"]
        for r in rows
        if f"{what} ms" in r and not r["failed"]
    }
    found = []
    for row in rows:
        size = (row["batch"], row["length"])
        mine = times.get((row["kind"], *size, row["implementation"]))
        if mine is None:
            continue
        baseline = times.get(("causal", *size, BASELINE))
        flex = times.get((row["kind"], *size, "torch-flex"))
        causal = row["length"] * (row["length"] + 1) / 2
        area = Tokens.of(row["kind"], row["length"]).pairs / causal
        ratios = {"over baseline": baseline and mine / baseline, "over flex": flex and mine / flex}
        found.append(row | ratios | {"area": area})
    return found


if __name__ == "__main__":
    run(main)
