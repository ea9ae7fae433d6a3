"""What scripts share: one line per user error, exit code 2, sizes as options, a flag of XLA."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NoReturn

from hackle.pjit_configs.errors import ConfigError
from hackle.zoo.errors import UserError

# FLAG of hackle/layers/in_place.py: with it, kernels may write in place on GPUs.
XLA_FLAG = "--xla_gpu_enable_dynamic_slice_fusion=false"
# Packages of the extras `train` and `hf`, as they are imported.
OPTIONAL = ("absl", "array_record", "grain", "matplotlib", "optax", "orbax", "safetensors",
            "tensorboard", "tensorflow_datasets", "tokenizers", "tqdm")  # fmt: skip
EXIT_OK = 0
EXIT_USER_ERROR = 2


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits with its code; a bad input becomes one `error:` line and code 2."""
    allow_writing_in_place()
    sys.exit(call(main))


def allow_writing_in_place() -> None:
    """Sets `XLA_FLAG` for this process, whose JAX must not have started, and those it starts.

    A value that somebody chose stays; `hackle.layers.in_place` says what it means.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    affected = tuple(map(int, version("jax").split(".")[:2])) >= (0, 11)
    name = XLA_FLAG.partition("=")[0]
    if affected and not any(flag.partition("=")[0] == name for flag in flags):
        os.environ["XLA_FLAGS"] = " ".join([*flags, XLA_FLAG])


def call(main: Callable[[], int | None]) -> int:
    """`run` without the exit: the exit code of `main`."""
    try:
        return main() or EXIT_OK
    except (UserError, ConfigError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL:
            raise
        print(
            f"error: this needs the package {error.name}: pip install 'hackle[train,hf]', or in a "
            "checkout pip install -e '.[train,hf]'",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR


def report_option(parser: argparse.ArgumentParser, subject: str) -> None:
    """Adds `--report [NAME]`: the `name` that `report.write` takes, or None for no report."""
    parser.add_argument(
        "--report",
        nargs="?",
        const="",
        # Nothing given is no name, which argparse hands to the type, too.
        type=lambda text: text and report_name(text),
        metavar="NAME",
        help=f"write reports/{subject}[-NAME]_<hardware>_<date>.md",
    )


def report_name(text: str) -> str:
    """Type of an option that is part of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name; expected letters, digits, '.', '_' and '-'"
        )
    return text


def sizes(names: str) -> Callable[[str], tuple[int, ...]]:
    """Type of an option such as `8x1024`; `names`, e.g. "BxT", says what the numbers are."""

    def read(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != len(names.split("x")) or not all(p.isdigit() and int(p) for p in parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {names}; expected whole numbers above 0, with x between them"
            )
        return tuple(int(p) for p in parts)

    return read
