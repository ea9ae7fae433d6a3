"""What every script shares: one line per user error, exit code 2."""

import sys
from collections.abc import Callable
from typing import NoReturn

from hackle.pjit_configs.errors import ConfigError
from hackle.zoo.errors import UserError

EXIT_OK = 0
EXIT_USER_ERROR = 2


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits with its code; a bad input becomes one `error:` line and code 2."""
    sys.exit(call(main))


def call(main: Callable[[], int | None]) -> int:
    """`run` without the exit: the exit code of `main`."""
    try:
        return main() or EXIT_OK
    except (UserError, ConfigError) as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
