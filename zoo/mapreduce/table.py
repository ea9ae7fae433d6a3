"""Questions about a small table: each is answered alone, and the total is asked for."""

import dataclasses
import string
from typing import ClassVar

from hackle.zoo.mapreduce.draw import Draw
from hackle.zoo.mapreduce.problem import Kind, Problem, block, require, trace

ASKED = ("max", "min", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Kind):
    """`table pa12 pb5; qa3 qb44; ask max b, sum q`: a path for each question.

    Lines and columns have names of one letter, so that "max b" is about a column and "sum q"
    about a line; a cell is named by both, as in a spreadsheet. A path looks its cells up first:
    `max b: pb5 qb44`. The answer is the sum of all results.

    Attributes:
      lines, columns: of the table, at most; at least 2.
      questions: at most; at least 2.
      largest: of the numbers.
    """

    name: ClassVar[str] = "table"
    edition: ClassVar[int] = 2
    lines: int = 4
    columns: int = 4
    questions: int = 4
    largest: int = 99

    def __post_init__(self):
        most = len(string.ascii_lowercase) // 2
        for name in ("lines", "columns"):
            require(self, name, 2 <= getattr(self, name) <= most, f"2 to {most}")
        most = len(ASKED) * 4  # of the smallest table
        require(self, "questions", 2 <= self.questions <= most, f"2 to {most}")
        require(self, "largest", self.largest >= 1, "at least 1")

    def attempt(self, draw: Draw) -> Problem:
        height, width = draw.between(2, self.lines), draw.between(2, self.columns)
        names = draw.shuffle(string.ascii_lowercase)
        columns, lines = names[:width], names[width : width + height]
        cells = {
            line + column: draw.between(0, self.largest) for line in lines for column in columns
        }
        wanted = [f"{what} {name}" for what in ASKED for name in (*lines, *columns)]
        wanted = draw.shuffle(wanted)[: draw.between(2, self.questions)]
        rows = [
            " ".join(f"{name}{value}" for name, value in cells.items() if name[0] == line)
            for line in lines
        ]
        prompt = f"table {'; '.join(rows)}; ask {', '.join(wanted)}\n"
        solutions = [_answer(question, cells) for question in wanted]
        conclusion, total = _sums([value for _, value in solutions])
        goals, paths = [f"{q}\n" for q in wanted], [lines for lines, _ in solutions]
        thoughts = block("", goals, paths, conclusion)
        return Problem(self.name, prompt, trace(thoughts, str(total)))

    def solved_by(self, prompt: str, answer: str) -> bool:
        *lines, asked = prompt.strip().removeprefix("table ").split("; ")
        numbers: dict[str, list[int]] = {}
        for cell in " ".join(lines).split():
            for name in cell[:2]:
                numbers.setdefault(name, []).append(int(cell[2:]))
        total = 0
        for question in asked.removeprefix("ask ").split(", "):
            what, name = question.split()
            found = numbers[name]
            total += max(found) if what == "max" else min(found) if what == "min" else sum(found)
        return answer == str(total)


def _answer(question: str, cells: dict[str, int]) -> tuple[str, int]:
    """The lines of a path, and its result."""
    what, name = question.split()
    found = {cell: value for cell, value in cells.items() if name in cell}
    looked_up = " ".join(f"{cell}{value}" for cell, value in found.items())
    numbers = list(found.values())
    if what == "sum":
        lines, value = _sums(numbers)
    else:
        value = max(numbers) if what == "max" else min(numbers)
        lines = f"{value}\n"
    return f"{question}: {looked_up}\n{lines}", value


def _sums(values: list[int]) -> tuple[str, int]:
    """The lines of a running sum, and the sum."""
    text, total = "", values[0]
    for value in values[1:]:
        text += f"{total}+{value}={total + value}\n"
        total += value
    return text, total
