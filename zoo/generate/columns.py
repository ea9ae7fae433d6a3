"""Drawing texts that branch: the paths of a block as columns, side by side."""

import textwrap
from collections.abc import Callable, Sequence
from typing import TextIO

from hackle.zoo.generate.draft import Fork, Written

BETWEEN = " │ "
# Where columns would be narrower than this, fewer stand side by side.
NARROWEST = 16


def columns(
    parts: Sequence[Written | Fork], decode: Callable[[list[int]], str], width: int
) -> list[str]:
    """The lines of a draft's parts, none longer than `width` characters.

    Args:
      decode: text of tokens.
    """
    lines: list[str] = []
    run: list[int] = []
    for part in parts:
        if isinstance(part, Fork):
            lines += _wrapped(decode(run), width)
            run = []
            lines += _side_by_side(part, decode, width)
        else:
            run.append(part.token)
    return lines + _wrapped(decode(run), width)


def _side_by_side(fork: Fork, decode: Callable[[list[int]], str], width: int) -> list[str]:
    count = len(fork.paths)
    while count > 1 and _column(width, count) < NARROWEST:
        count -= 1
    room = _column(width, count)
    lines = []
    for first in range(0, len(fork.paths), count):
        drawn = [columns(path, decode, room) for path in fork.paths[first : first + count]]
        height = max(map(len, drawn))
        rows = zip(*(column + [""] * (height - len(column)) for column in drawn), strict=True)
        lines += [BETWEEN.join(cell.ljust(room) for cell in row).rstrip() for row in rows]
        lines.append("")
    return lines[:-1]


def _column(width: int, count: int) -> int:
    return max(1, (width - len(BETWEEN) * (count - 1)) // count)


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text; an empty line at its start or end is that of a tag."""
    found = []
    for line in text.strip("\n").split("\n") if text.strip("\n") else []:
        found += textwrap.wrap(line, width, drop_whitespace=False) or [""]
    return found


class Screen:
    """Lines that change while they are shown.

    In a terminal the last ones are drawn anew; what has left the screen stays as it was. Elsewhere
    lines are written once, when they are the last.
    """

    def __init__(self, out: TextIO, rows: int):
        self.out, self.window = out, max(1, rows - 1)
        self.live = out.isatty()
        self.first = self.shown = 0

    def update(self, lines: Sequence[str], *, last: bool = False) -> None:
        """Shows the lines instead of those before."""
        if self.live:
            back = f"\x1b[{self.shown}F\x1b[J" if self.shown else ""
            self.out.write(back + "".join(f"{line}\n" for line in lines[self.first :]))
            self.first = max(self.first, len(lines) - self.window)
            self.shown = len(lines) - self.first
        elif last:
            self.out.write("".join(f"{line}\n" for line in lines))
        self.out.flush()
