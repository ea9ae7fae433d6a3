"""`python -m hackle ls` and `presets`: the models and the meshes that are known by name."""

import argparse
import sys
from collections.abc import Sequence

import hackle


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hackle",
        description="What is there: models of the zoo and presets of pjit_configs.",
        epilog="example: python -m hackle ls parscale",
    )
    parser.add_argument("--version", action="version", version=f"hackle {hackle.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    ls = commands.add_parser("ls", help="list models and their sizes (also without a command)")
    ls.add_argument("prefix", nargs="?", default="", help="show only names that start with this")
    commands.add_parser("presets", help="list presets: mesh, rules and dtypes for some hardware")
    return parser


def model_lines(prefix: str = "") -> list[str]:
    """One line per model whose name starts with `prefix`, under a header; [] when there is none."""
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


def preset_lines() -> list[str]:
    """One line per preset."""
    from hackle import pjit_configs

    names = pjit_configs.list_presets()
    width = max(map(len, names))
    return [f"{name:<{width}}  {pjit_configs.preset(name).description}" for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.command == "presets":
        print("\n".join(preset_lines()))
        return 0
    prefix = getattr(arguments, "prefix", "")
    lines = model_lines(prefix)
    if not lines:
        print(f"error: no model name starts with {prefix!r}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
