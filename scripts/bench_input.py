"""Measures how fast packed batches come from the prepared corpus, after checking them."""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import report
from cli import run
from hackle.zoo.errors import UserError

if TYPE_CHECKING:
    from hackle.zoo.data import Prepared

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python scripts/bench_input.py
  python scripts/bench_input.py --length 4096 --batch 64 --cores 2
  python scripts/bench_input.py --corpus path/to/folder --packing stream --report
"""
PACKAGES = ("array-record", "tensorflow-datasets")  # besides those of every report


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--corpus", default="python", help='a folder of text, or "python" (default)')
    add("--data-dir", type=Path, default=ROOT / "data", help="default: data/ beside scripts/")
    add("--vocab-size", type=int, default=4096, help="default %(default)s")
    add("--batch", type=int, default=8, help="rows in a batch, default %(default)s")
    add("--length", type=int, default=2048, help="tokens in a row, default %(default)s")
    add("--packing", default="documents", help="documents (default) or stream")
    add("--threads", type=int, default=1, help="that make batches ahead, default %(default)s")
    add("--workers", type=int, default=0, help="processes instead of threads, default none")
    add("--cores", type=int, help="use only this many cores; default: all there are")
    add("--windows", type=int, default=5, help="the median is over these, default %(default)s")
    add("--seconds", type=float, default=3.0, help="length of a window, default %(default)s")
    add("--report", action="store_true", help="write reports/input_<hardware>_<date>.md")
    add("--hardware", help="name of the machine in the report, default: cpu<cores>")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for name in ("windows", "seconds", "batch"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name} {getattr(args, name)} is too small; expected more than 0")
    cores = limit_cores(args.cores)
    from hackle.zoo.data import batches, prepare

    start = time.perf_counter()
    prepared = prepare(args.corpus, args.data_dir, vocab_size=args.vocab_size)
    preparing = time.perf_counter() - start
    print(prepared.describe())
    shape = {"batch": args.batch, "length": args.length, "packing": args.packing}

    rows = gate(prepared, **shape)
    print(f"gate: {rows} rows equal the reference packer's")

    iterator = batches(prepared, "train", **shape, threads=args.threads, workers=args.workers)
    start = time.perf_counter()
    next(iterator)
    first = time.perf_counter() - start
    speeds = []
    for _ in range(args.windows):
        speeds.append(window(iterator, args.seconds))
        print(f"window: {speeds[-1] / 1e6:.1f} M tokens/s")
    result = {
        "benchmark": "input",
        "tokens_per_second": round(statistics.median(speeds)),
        "slowest_window": round(min(speeds)),
        **shape,
        "threads": args.threads,
        "workers": args.workers,
        "cores": cores,
        "first_batch_seconds": round(first, 3),
        "prepare_seconds": round(preparing, 2),
        "prepare_reused": prepared.reused,
        "corpus": prepared.corpus,
        "train_tokens": prepared.splits["train"].tokens,
        "machine": platform.machine(),
        "versions": {**report.versions(), **{name: version(name) for name in PACKAGES}},
    }
    print(
        f"median of {args.windows} windows of {args.seconds:g} s on {cores} cores: "
        f"{result['tokens_per_second'] / 1e6:.1f} M tokens/s"
    )
    if args.report:
        write_report(result, args.hardware or f"cpu{cores}")
    else:
        print(json.dumps(result))
    return 0


def limit_cores(cores: int | None) -> int:
    """Keeps this process on the first `cores` of its cores; returns how many it may use."""
    allowed = sorted(os.sched_getaffinity(0))
    if cores is None:
        return len(allowed)
    if not 1 <= cores <= len(allowed):
        raise UserError(f"--cores {cores}: expected 1 to {len(allowed)} on this machine")
    os.sched_setaffinity(0, allowed[:cores])
    return cores


def gate(prepared: "Prepared", *, batch: int, length: int, packing: Any) -> int:
    """Compares one whole epoch, in stored and in shuffled order, with the reference packer.

    Returns:
      Number of rows compared.

    Raises:
      AssertionError: a row differs. No speed is printed then.
    """
    from hackle.zoo.data import batch_source, reference
    from hackle.zoo.data.packing import Rows

    split = "validation"
    tokens, offsets = prepared.tokens(split), prepared.offsets(split)
    documents = [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    count = 0
    for seed in (None, 0):
        source = batch_source(
            prepared,
            split,
            batch=batch,
            length=length,
            seed=seed or 0,
            shuffle=seed is not None,
            epochs=1,
            packing=packing,
        )
        order = Rows(tokens, offsets, length=length, seed=seed)
        joined = [documents[i] for i in order.document_order(0)]
        expected = reference.pack(joined, length, packing)
        expected = [expected[i] for i in order.row_order(0)]
        got = [
            tuple(made[name][row].tolist() for name in ("tokens", "positions", "segment_ids"))
            for made in (source[i] for i in range(len(source)))
            for row in range(batch)
        ]
        empty = ([0] * length,) * 3
        filled = expected + [empty] * (len(got) - len(expected))
        for row, (mine, right) in enumerate(zip(got, filled, strict=True)):
            if mine != right:
                raise AssertionError(f"row {row} (seed {seed}) is not the reference packer's")
        count += len(expected)
    return count


def window(iterator: Any, seconds: float) -> float:
    """Tokens a second over at least `seconds`."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(iterator)["tokens"].size
    return count / elapsed


def write_report(result: dict[str, Any], hardware: str) -> None:
    """Writes the report; prints the JSON line too."""
    rows = [
        {"what": name.replace("_", " "), "value": value}
        for name, value in result.items()
        if name != "versions"
    ]
    note = (
        "Batches were first compared with a slow reference packer over one epoch of the "
        "validation split, in stored and in shuffled order. The corpus fits in memory; a larger "
        "one reads from its disk."
    )
    try:
        report.write(
            "input",
            hardware,
            title="Input pipeline: from the prepared corpus to packed batches",
            sections=[report.table(rows), note],
            record=result,
            folder=ROOT / "reports",
        )
    except OSError as error:
        raise UserError(f"cannot write a report in {ROOT / 'reports'}: {error}") from None


if __name__ == "__main__":
    run(main)
