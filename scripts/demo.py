"""The first thing to run: a ParScale model and its P=1 trunk learn Python on the CPU, and write.

Both see the same tokens. Takes a few minutes on two cores; run again, it reuses what is finished.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import compare_streams
import report
from cli import run

PROMPTS = ("def read_lines(path):\n", "class Queue:\n    def __init__(self")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n  python scripts/demo.py\n  python scripts/demo.py --steps 1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="default %(default)s")
    p.add_argument("--data-dir", type=Path, default=Path("data"), help="default %(default)s")
    p.add_argument("--steps", type=int, default=200, help="default %(default)s")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from hackle.zoo.train.recipes import tiny

    begun = time.monotonic()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("hackle").setLevel(logging.INFO)
    warmup = min(40, max(args.steps // 5, 0))
    changes = dict(steps=args.steps, warmup=warmup, data_dir=str(args.data_dir))
    recipes = {str(streams): tiny(streams).replace(**changes) for streams in (1, 4)}
    results = compare_streams.compare(recipes, args.out)
    for r in results:
        write_samples(r.name, Path(r.summary.model))
    print("\n=== comparison, on the same tokens ===")
    print(report.table(compare_streams.rows(results)))
    print(
        "With so few tokens more streams need not be ahead yet: reports/ has longer runs on a GPU."
    )
    for r in results:
        s = r.summary
        print(f"validation loss P={r.name}: {s.validation_loss:.4f} at {s.tokens:,} tokens")
    print(f"plot: {compare_streams.plot(results, args.out)}")
    for r in results:
        print(f"checkpoint P={r.name}: {r.summary.checkpoint}  model: {r.summary.model}")
    if all(r.summary.already for r in results):
        print("reused: both models were trained by an earlier run")
    print(f"done in {time.monotonic() - begun:.0f} s; more text:")
    print(f"  {sys.executable} scripts/generate.py {args.out}/p4 --prompt 'import os'")
    return 0


def write_samples(streams: str, folder: Path) -> None:
    """Prints what the exported model writes after each prompt."""
    from hackle import zoo
    from hackle.zoo.data import load_tokenizer
    from hackle.zoo.generate import generate
    from hackle.zoo.generate.text import TextStream

    tokenizer = load_tokenizer(folder)
    new = generate(
        zoo.from_pretrained(folder),
        [tokenizer.encode(prompt) for prompt in PROMPTS],
        max_new_tokens=80,
        temperature=0.7,
        top_p=0.95,
        seed=1,
        eos=tokenizer.eos_id,
    )
    print(f"\n=== what P = {streams} writes (the first line was given) ===")
    for prompt, tokens in zip(PROMPTS, new, strict=True):
        text = TextStream(tokenizer)
        print(prompt + "".join(map(text.push, tokens)) + text.finish())
        print("---")


if __name__ == "__main__":
    run(main)
