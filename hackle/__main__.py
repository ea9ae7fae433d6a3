"""`python -m hackle ls`: the models that `hackle.zoo.create` knows, with their sizes."""

import argparse
import sys
from collections.abc import Sequence

import hackle


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hackle",
        description="List the models of the zoo.",
        epilog="example: python -m hackle ls parscale",
    )
    parser.add_argument("--version", action="version", version=f"hackle {hackle.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    ls = commands.add_parser("ls", help="list models (what happens without a command)")
    ls.add_argument("prefix", nargs="?", default="", help="show only names that start with this")
    return parser


def list_lines(prefix: str = "") -> list[str]:
    """One line per model whose name starts with `prefix`, under a header line."""
    from hackle.zoo import registry  # late: --help and --version need no jax

    rows = []
    for name in registry.list_models():
        if name.startswith(prefix):
            entry = registry.entry(name)
            total = entry.config.parameter_count()
            trunk = entry.config.parameter_count(embedding=False)
            rows.append((name, entry.family, f"{total:,}", f"{trunk:,}"))
    if not rows:
        return []
    rows.insert(0, ("model", "family", "parameters", "without embedding"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    template = "{{:<{}}}  {{:<{}}}  {{:>{}}}  {{:>{}}}".format(*widths)
    return [template.format(*row) for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    prefix = getattr(arguments, "prefix", "")
    lines = list_lines(prefix)
    if not lines:
        print(f"error: no model name starts with {prefix!r}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
